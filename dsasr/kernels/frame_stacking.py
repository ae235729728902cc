"""The adaptor on valid frames only: which stacks there are, and its torch implementation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dsasr.kernels.reference import ACTIVATIONS


@dataclass(frozen=True)
class Stacks:
    """The N valid stacks of a padded batch, in utterance order.

    ``utterance_N`` and ``slot_N`` say where a stack begins: frame slot · stack of its utterance.
    ``left_N`` is how many of its frames exist, 1 to ``stack``.
    """

    utterance_N: Tensor
    slot_N: Tensor
    left_N: Tensor
    lengths_B: Tensor  # stacks of each utterance, on the device of the lengths given

    @classmethod
    def of(cls, lengths_B: Tensor, stack: int, frames: int, device: torch.device) -> Stacks:
        """Waits for the device that holds ``lengths_B``. Lengths above ``frames`` are cut."""
        lengths_B = lengths_B.clamp(0, frames)
        counts_B = (lengths_B + stack - 1) // stack
        ends_B = counts_B.cumsum(0)
        utterances_B = torch.arange(len(lengths_B), device=lengths_B.device)
        utterance_N = utterances_B.repeat_interleave(counts_B)
        first_N = (ends_B - counts_B)[utterance_N]
        slot_N = torch.arange(len(utterance_N), device=lengths_B.device) - first_N
        left_N = (lengths_B[utterance_N] - slot_N * stack).clamp(max=stack)
        moved = (x.to(device, non_blocking=True) for x in (utterance_N, slot_N, left_N))
        return cls(*moved, counts_B)

    def gather(self, frames_BSE: Tensor, stack: int) -> Tensor:
        """[N, stack · E]; frames that do not exist are zeros."""
        batch, frames, width = frames_BSE.shape
        padded = F.pad(frames_BSE, (0, 0, 0, -frames % stack))
        slots = padded.shape[1] // stack
        places_N = self.utterance_N * slots + self.slot_N
        stacked_NK = padded.reshape(batch * slots, stack * width).index_select(0, places_N)
        beyond_Nk = torch.arange(stack, device=frames_BSE.device) >= self.left_N[:, None]
        stacked_NkE = stacked_NK.view(-1, stack, width)
        return stacked_NkE.masked_fill(beyond_Nk[..., None], 0.0).view_as(stacked_NK)


def run(
    frames_BSE: Tensor,
    lengths_B: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    stack: int,
    activation: str,
    out_LD: Tensor | None,
    index_N: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The adaptor in torch operations: valid stacks are gathered before the first product."""
    stacks = Stacks.of(lengths_B, stack, frames_BSE.shape[1], frames_BSE.device)
    stacked_NK = stacks.gather(frames_BSE, stack)
    hidden_NH = ACTIVATIONS[activation](F.linear(stacked_NK, w1, b1))
    packed_ND = F.linear(hidden_NH, w2, b2)
    if out_LD is None:
        return packed_ND, stacks.lengths_B
    return out_LD.index_copy_(0, index_N, packed_ND.to(out_LD.dtype)), stacks.lengths_B
