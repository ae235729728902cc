"""Prompts with phonemes instead of speech, for the pre-training of the demo's LM (**ours**).

A large language model knows pronunciations from its text (dictionaries, pinyin, rhyme); the demo's
small one learns them here. In part of its pre-training the prompt has simulated adaptor frames
instead of speech: each phoneme gets a random duration, and a frame of 160 ms is the sum of the
embeddings of the phonemes in its first and in its second half, each half with its own table.
The tables are discarded afterwards; the adaptor does not use them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

HALF = 0.08  # seconds of half an adaptor frame
SHORTEST, LONGEST = 0.04, 0.16  # seconds of a phoneme


class SimulatedAdaptorFrames(nn.Module):
    """Embeds phoneme ids as adaptor frames; ``size``: phonemes, ``width``: the model's."""

    def __init__(self, size: int, width: int, generator: torch.Generator):
        super().__init__()
        self.size = size
        self.table = nn.Parameter(torch.empty(2 * size, width))
        nn.init.normal_(self.table, std=0.02, generator=generator)

    def forward(self, phonemes: Sequence[int], rng: np.random.Generator) -> Tensor:
        """[A, D] for one utterance's phonemes, at a random speaking rate."""
        rate = rng.uniform(0.8, 1.25)
        seconds = rate * rng.uniform(SHORTEST, LONGEST, len(phonemes))
        starts = rng.uniform(0, 0.2) + np.concatenate(([0.0], np.cumsum(seconds)[:-1]))
        halves = ((starts + 0.5 * seconds) / HALF).astype(np.int64)
        rows = torch.from_numpy(np.asarray(phonemes) + self.size * (halves % 2))
        frames = torch.from_numpy(halves // 2)
        length = int(frames[-1]) + 1 + int(rng.integers(2)) if len(phonemes) else 1
        empty = self.table.new_zeros(length, self.table.shape[1])
        return empty.index_add(0, frames, self.table[rows])


def simulated_speech_batch(
    llm,
    frames: SimulatedAdaptorFrames,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    prefix: Sequence[int],
    suffix: Sequence[int],
    rng: np.random.Generator,
) -> tuple[Tensor, Tensor]:
    """Embeddings [B, L, D] of prefix + frames + suffix + transcript, and targets [B, L].

    ``pairs``: (phoneme ids, transcript tokens). Targets are -100 where there is no loss.
    """
    end_id = llm.config.eos_token_id
    embed = llm.get_input_embeddings()
    rows, targets = [], []
    for phonemes, tokens in pairs:
        simulated = frames(phonemes, rng)
        ids = torch.tensor([*prefix, *suffix, *tokens])
        text = embed(ids)
        cut = len(prefix)
        rows.append(torch.cat((text[:cut], simulated, text[cut:])))
        start = cut + len(simulated) + len(suffix) - 1
        target = torch.full((len(rows[-1]),), -100, dtype=torch.int64)
        target[start:] = torch.tensor([*tokens, end_id])
        targets.append(target)
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return padded, nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=-100)
