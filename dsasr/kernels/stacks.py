"""The adaptor on valid frames only: stack frames, two linear layers, into the LLM's embeddings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dsasr.kernels.reference import ACTIVATIONS


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
    stacked_NK, out_lengths_B = valid_stacks(frames_BSE, lengths_B, stack)
    hidden_NH = ACTIVATIONS[activation](F.linear(stacked_NK, w1, b1))
    packed_ND = F.linear(hidden_NH, w2, b2)
    if out_LD is None:
        return packed_ND, out_lengths_B
    return out_LD.index_copy_(0, index_N, packed_ND.to(out_LD.dtype)), out_lengths_B


def valid_stacks(frames_BSE: Tensor, lengths_B: Tensor, stack: int) -> tuple[Tensor, Tensor]:
    """[N, stack · E] of the valid stacks in utterance order, and their number of each utterance."""
    batch, frames, width = frames_BSE.shape
    device = frames_BSE.device
    out_lengths_B = (lengths_B + stack - 1) // stack
    padded = F.pad(frames_BSE, (0, 0, 0, -frames % stack))
    slots = padded.shape[1] // stack
    valid_BA = torch.arange(slots, device=lengths_B.device) < out_lengths_B[:, None]
    rows_N = valid_BA.flatten().nonzero().squeeze(1).to(device)
    stacked_NK = padded.reshape(batch * slots, stack * width).index_select(0, rows_N)
    # Frames of the last, partial stack that lie beyond their utterance.
    first_N = (rows_N % slots) * stack
    left_N = lengths_B.to(device)[rows_N // slots] - first_N
    beyond_Nk = torch.arange(stack, device=device) >= left_N[:, None]
    stacked_NkE = stacked_NK.view(-1, stack, width)
    return stacked_NkE.masked_fill(beyond_Nk[..., None], 0.0).view_as(stacked_NK), out_lengths_B
