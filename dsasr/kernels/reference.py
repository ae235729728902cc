"""The one plain reference of each op, which kernels, tests and benchmarks are held to.

Written for the eye: whole tensors, autograd's own gradients, float32 (float64 for float64 inputs).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "silu": F.silu,
    "relu": F.relu,
}


def wide(x: Tensor) -> Tensor:
    """float32 at least: what sums and exponentials are computed in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def softmax_entropy(logits: Tensor) -> Tensor:
    """−Σ p ln p over the last axis, in nats; entries of −inf add nothing."""
    log_p = wide(logits).log_softmax(-1)
    return -(log_p.exp() * log_p.masked_fill(log_p.isneginf(), 0.0)).sum(-1)


def linear_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    ignore_index: int = -100,
    bias_V: Tensor | None = None,
    soft_cap: float | None = None,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `dsasr.kernels.linear_entropy_right`; this one holds the [N, V] logits, several times."""
    z_NV = wide(hidden_ND) @ wide(weight_VD).T
    if bias_V is not None:
        z_NV = z_NV + bias_V
    if soft_cap:
        z_NV = soft_cap * (z_NV / soft_cap).tanh()
    nll_N = F.cross_entropy(
        z_NV,
        targets_N,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="none",
    )
    real_N = targets_N != ignore_index
    target_N = z_NV.gather(1, targets_N.where(real_N, 0)[:, None]).squeeze(1)
    right_N = (target_N >= z_NV.amax(1)) & real_N
    return nll_N, softmax_entropy(z_NV).where(real_N, 0.0), right_N


def stack_frames(frames_BSE: Tensor, lengths_B: Tensor, stack: int) -> Tensor:
    """[B, ceil(S / stack), stack · E]: ``stack`` frames side by side, 0 from ``lengths_B`` on."""
    batch, frames, width = frames_BSE.shape
    valid_BS = torch.arange(frames, device=frames_BSE.device) < lengths_B[:, None]
    masked = frames_BSE.masked_fill(~valid_BS[..., None], 0.0)
    padded = F.pad(masked, (0, 0, 0, -frames % stack))
    return padded.view(batch, padded.shape[1] // stack, stack * width)


def adaptor_padded(
    frames_BSE: Tensor,
    lengths_B: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    stack: int,
    activation: str = "gelu",
) -> tuple[Tensor, Tensor]:
    """The adaptor over every frame, padding too: ([B, A, D], lengths_B in adaptor frames)."""
    lengths_B = lengths_B.to(frames_BSE.device)
    stacked = stack_frames(frames_BSE, lengths_B, stack)
    hidden = ACTIVATIONS[activation](F.linear(stacked, w1, b1))
    return F.linear(hidden, w2, b2), (lengths_B + stack - 1) // stack


def adaptor(
    frames_BSE: Tensor,
    lengths_B: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    stack: int,
    activation: str = "gelu",
    out_LD: Tensor | None = None,
    index_N: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `dsasr.kernels.adaptor`; this one computes the padded frames too and drops them."""
    padded, out_lengths_B = adaptor_padded(
        frames_BSE, lengths_B, w1, b1, w2, b2, stack=stack, activation=activation
    )
    valid_BA = torch.arange(padded.shape[1], device=padded.device) < out_lengths_B[:, None]
    packed_ND = padded[valid_BA]
    out_lengths_B = out_lengths_B.to(lengths_B.device)
    if out_LD is None:
        return packed_ND, out_lengths_B
    return out_LD.index_copy_(0, index_N, packed_ND.to(out_LD.dtype)), out_lengths_B
