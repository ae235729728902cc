"""Random generators of a step, all derived from its batch's seed."""

from __future__ import annotations

import torch

from dsasr.data.batch import Batch
from dsasr.utils.hashing import hash64


def derive_seed(batch: Batch, purpose: str) -> int:
    """A 63-bit seed for ``purpose``; differs between ranks even if ``batch.seed`` does not.

    The batch's first key makes the difference: no two ranks have the same utterance at a step.
    """
    first = batch.keys[0] if batch.keys else ""
    return hash64(f"{batch.seed} {purpose} {first}") >> 1


def step_generator(batch: Batch, purpose: str) -> torch.Generator:
    """A CPU generator, seeded for ``purpose``."""
    return torch.Generator().manual_seed(derive_seed(batch, purpose))


def seed_dropout(batch: Batch) -> None:
    """Seed torch's global generators, from which dropout draws.

    A step then repeats bit by bit whatever ran before it: a resumed run needs no saved RNG state.
    """
    torch.manual_seed(derive_seed(batch, "dropout"))
