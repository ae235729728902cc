"""The tensors of a branch engine, and whether they are equal on all ranks."""

from __future__ import annotations

import torch

from dsasr.engine.branch_engine import BranchEngine
from dsasr.utils import distributed


def states(branch: BranchEngine) -> dict[str, torch.Tensor]:
    return {key: fragment.tensor.clone() for key, fragment in branch.fragments().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    differ = a.keys() != b.keys() or not all(torch.equal(a[k], b[k]) for k in a)
    return not distributed.any_rank(differ)
