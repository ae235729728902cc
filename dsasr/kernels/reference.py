"""The plain reference of each op, which tests and benchmarks compare the fused ones with.

Written to be read: whole tensors, autograd's own gradients, float32 (float64 for float64 inputs).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dsasr.kernels.adaptor import ACTIVATIONS, AdaptorWeights


def wide(x: Tensor) -> Tensor:
    """``x`` in float32 at least, the dtype of sums and exponentials."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def softmax_entropy(logits: Tensor) -> Tensor:
    """`dispatch.softmax_entropy`: −Σ p ln p over the last axis; entries of −inf add nothing."""
    log_p = wide(logits).log_softmax(-1)
    return -(log_p.exp() * log_p.masked_fill(log_p.isneginf(), 0.0)).sum(-1)


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    ignore_index: int = -100,
    bias_V: Tensor | None = None,
    soft_cap: float | None = None,
    label_smoothing: float = 0.0,
    return_entropy: bool = False,
    return_accuracy: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """`dispatch.linear_cross_entropy`, with the [N, V] logits in memory, several times."""
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
    results, valid_N = [nll_N], targets_N != ignore_index
    if return_entropy:
        results.append(softmax_entropy(z_NV).where(valid_N, 0.0))
    if return_accuracy:
        target_N = z_NV.gather(1, targets_N.where(valid_N, 0)[:, None]).squeeze(1)
        results.append((target_N >= z_NV.amax(1)) & valid_N)
    return tuple(results) if len(results) > 1 else nll_N


def stack_frames(frames_BSE: Tensor, lengths_B: Tensor, stack: int) -> Tensor:
    """[B, ceil(S / stack), stack · E]: ``stack`` frames side by side, 0 from ``lengths_B`` on."""
    batch, frames, width = frames_BSE.shape
    valid_BS = torch.arange(frames, device=frames_BSE.device) < lengths_B[:, None]
    masked = frames_BSE.masked_fill(~valid_BS[..., None], 0.0)
    padded = F.pad(masked, (0, 0, 0, -frames % stack))
    return padded.view(batch, padded.shape[1] // stack, stack * width)


def adaptor_padded(
    frames_BSE: Tensor, lengths_B: Tensor, weights: AdaptorWeights
) -> tuple[Tensor, Tensor]:
    """The adaptor over every frame, padding too: ([B, A, D], lengths_B in adaptor frames)."""
    lengths_B = lengths_B.to(frames_BSE.device)
    stacked = stack_frames(frames_BSE, lengths_B, weights.stack)
    hidden = ACTIVATIONS[weights.activation](F.linear(stacked, weights.w1_HK, weights.b1_H))
    embeds_BAD = F.linear(hidden, weights.w2_DH, weights.b2_D)
    return embeds_BAD, (lengths_B + weights.stack - 1) // weights.stack


def adaptor(
    frames_BSE: Tensor,
    lengths_B: Tensor,
    weights: AdaptorWeights,
    *,
    out_LD: Tensor | None = None,
    index_N: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`dispatch.adaptor`: computes the padded frames too, and drops them."""
    padded_BAD, out_lengths_B = adaptor_padded(frames_BSE, lengths_B, weights)
    valid_BA = torch.arange(padded_BAD.shape[1], device=padded_BAD.device) < out_lengths_B[:, None]
    packed_ND = padded_BAD[valid_BA]
    out_lengths_B = out_lengths_B.to(lengths_B.device)
    if out_LD is None:
        return packed_ND, out_lengths_B
    return out_LD.index_copy_(0, index_N, packed_ND.to(out_LD.dtype)), out_lengths_B
