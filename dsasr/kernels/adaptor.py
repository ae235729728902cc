"""The adaptor op over valid frames: its weights, the stacks of frames, and the torch version."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "silu": F.silu,
    "relu": F.relu,
}


@dataclass(frozen=True)
class AdaptorWeights:
    """A two-layer MLP over ``stack`` consecutive frames, side by side (K = stack · E).

    ``activation`` is gelu (exact), silu or relu.
    """

    w1_HK: Tensor
    b1_H: Tensor | None
    w2_DH: Tensor
    b2_D: Tensor | None
    stack: int
    activation: str = "gelu"


@dataclass(frozen=True)
class FrameStacks:
    """The N valid stacks of a padded batch, in utterance order.

    Stack n begins at frame ``slot_N[n]`` · stack of utterance ``utterance_N[n]`` and has
    ``frames_N[n]`` valid frames, 1 to ``stack``.
    """

    utterance_N: Tensor
    slot_N: Tensor
    frames_N: Tensor
    lengths_B: Tensor  # stacks of each utterance, on the device of the frame lengths

    @classmethod
    def of(cls, lengths_B: Tensor, stack: int, frames: int, device: torch.device) -> FrameStacks:
        """The stacks of utterances of ``lengths_B`` frames, clamped to ``frames``.

        N depends on the lengths: where they lie on a GPU, the host waits for it.
        """
        lengths_B = lengths_B.clamp(0, frames)
        counts_B = (lengths_B + stack - 1) // stack
        ends_B = counts_B.cumsum(0)
        utterances_B = torch.arange(len(lengths_B), device=lengths_B.device)
        utterance_N = utterances_B.repeat_interleave(counts_B)
        first_N = (ends_B - counts_B)[utterance_N]
        slot_N = torch.arange(len(utterance_N), device=lengths_B.device) - first_N
        frames_N = (lengths_B[utterance_N] - slot_N * stack).clamp(max=stack)
        index = (x.to(device, non_blocking=True) for x in (utterance_N, slot_N, frames_N))
        return cls(*index, counts_B)

    def gather(self, frames_BSE: Tensor, stack: int) -> Tensor:
        """The stacks' frames side by side, [N, stack · E]; invalid frames are zeros."""
        batch, frames, width = frames_BSE.shape
        padded = F.pad(frames_BSE, (0, 0, 0, -frames % stack))
        slots = padded.shape[1] // stack
        index_N = self.utterance_N * slots + self.slot_N
        stacked_NK = padded.reshape(batch * slots, stack * width).index_select(0, index_N)
        invalid_Nk = torch.arange(stack, device=frames_BSE.device) >= self.frames_N[:, None]
        stacked_NkE = stacked_NK.view(-1, stack, width)
        return stacked_NkE.masked_fill(invalid_Nk[..., None], 0.0).view_as(stacked_NK)


def run(
    frames_BSE: Tensor,
    lengths_B: Tensor,
    weights: AdaptorWeights,
    *,
    out_LD: Tensor | None = None,
    index_N: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`dispatch.adaptor` in torch: valid stacks are gathered before the first product."""
    stacks = FrameStacks.of(lengths_B, weights.stack, frames_BSE.shape[1], frames_BSE.device)
    stacked_NK = stacks.gather(frames_BSE, weights.stack)
    hidden_NH = ACTIVATIONS[weights.activation](F.linear(stacked_NK, weights.w1_HK, weights.b1_H))
    packed_ND = F.linear(hidden_NH, weights.w2_DH, weights.b2_D)
    if out_LD is None:
        return packed_ND, stacks.lengths_B
    return out_LD.index_copy_(0, index_N, packed_ND.to(out_LD.dtype)), stacks.lengths_B
