"""Where prompts, speech, transcripts and targets stand in the language model's rows.

A row has one utterance, or several (``pack``), whose positions restart and which do not attend to
each other. All is laid out by index, straight from valid positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def plan_rows(lengths: Sequence[int], pack: int) -> list[list[int]]:
    """The utterances of each row of at most ``pack`` positions; 0: one utterance a row.

    As many rows as first fit (longest first) needs, then filled evenly where that makes the longest
    row, which all are padded to, shorter. An utterance longer than ``pack`` has a row to itself.
    """
    if pack == 0:
        return [[index] for index in range(len(lengths))]
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    rows: list[list[int]] = []
    sizes: list[int] = []
    for index in order:
        fit = next((r for r, size in enumerate(sizes) if size + lengths[index] <= pack), None)
        if fit is None:
            rows.append([])
            sizes.append(0)
            fit = -1
        rows[fit].append(index)
        sizes[fit] += lengths[index]
    even: list[list[int]] = [[] for _ in rows]
    filled = [0] * len(rows)
    for index in order:
        emptiest = filled.index(min(filled))
        even[emptiest].append(index)
        filled[emptiest] += lengths[index]
    return even if max(filled, default=0) < max(sizes, default=0) else rows


def ragged(starts_B: Tensor, counts_B: Tensor) -> Tensor:
    """The ranges start_b … start_b + count_b - 1, concatenated."""
    ends_B = counts_B.cumsum(0)
    total = int(ends_B[-1]) if len(ends_B) else 0
    return torch.repeat_interleave(starts_B - ends_B + counts_B, counts_B) + torch.arange(total)


@dataclass(frozen=True)
class Layout:
    """Positions of speech, text and targets in R rows of L; indices into [R·L], on the CPU.

    ``speech_N``: the speech embeddings, utterance by utterance; ``text_M``: all prefixes, all
    suffixes, all transcripts (without the end token, which is a target only); ``targets_N``: the
    positions that predict the transcript and the end token; ``positions_RL`` restart with each
    utterance; ``starts_B`` and ``lengths_B``: where each utterance begins, and its positions.
    """

    rows: int
    length: int
    speech_N: Tensor
    text_M: Tensor
    targets_N: Tensor
    positions_RL: Tensor
    starts_B: Tensor
    lengths_B: Tensor


def lay_out(
    speech_B: Tensor,
    tokens_B: Tensor,
    prefix: int | Tensor,
    suffix: int | Tensor,
    pack: int = 0,
    left_pad: bool = False,
) -> Layout:
    """Place utterances of ``speech_B`` embeddings and ``tokens_B`` target tokens into rows.

    ``prefix`` and ``suffix`` count the prompt's tokens before and after the speech, of all or of
    each utterance [B]. With no tokens at all (decoding), the layout is that of the prompts.
    """
    prefix_B, suffix_B = (torch.as_tensor(n).expand_as(speech_B) for n in (prefix, suffix))
    inputs_B = (tokens_B - 1).clamp_min(0)
    lengths_B = prefix_B + speech_B + suffix_B + inputs_B
    plan = plan_rows(lengths_B.tolist(), pack)
    sizes = [sum(int(lengths_B[index]) for index in row) for row in plan]
    length = max(sizes, default=0)
    starts_B = torch.zeros_like(lengths_B)
    for number, (row, size) in enumerate(zip(plan, sizes, strict=True)):
        start = number * length + (length - size if left_pad else 0)
        for index in row:
            starts_B[index] = start
            start += int(lengths_B[index])
    after_speech_B = starts_B + prefix_B + speech_B
    tokens_start_B = after_speech_B + suffix_B
    positions = torch.zeros(len(plan) * length, dtype=torch.int64)
    positions[ragged(starts_B, lengths_B)] = ragged(torch.zeros_like(lengths_B), lengths_B)
    return Layout(
        rows=len(plan),
        length=length,
        speech_N=ragged(starts_B + prefix_B, speech_B),
        text_M=torch.cat(
            (
                ragged(starts_B, prefix_B),
                ragged(after_speech_B, suffix_B),
                ragged(tokens_start_B, inputs_B),
            )
        ),
        targets_N=ragged(tokens_start_B - 1, tokens_B),
        positions_RL=positions.view(len(plan), length),
        starts_B=starts_B,
        lengths_B=lengths_B,
    )
