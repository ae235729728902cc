"""`StepReport`: what a branch reports of an optimizer step, for logs and checks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dsasr.data.batch import Batch


@dataclass(frozen=True)
class StepReport:
    """One optimizer step of one branch. ``sums``: name → this rank's (sum, count), not reduced yet.

    ``grad_norm`` is a tensor, because its value waits for the optimizer's kernels; a plain inf
    where DeepSpeed, which checks before it takes the step, found it not finite. ``gradients``:
    counts by part (`gradient_histograms`), where asked for.
    """

    branch: str
    stage: str
    step: int
    sums: dict[str, tuple[Tensor, Tensor]]
    lrs: dict[str, float]  # by part
    grad_norm: Tensor | float | None
    batches: tuple[Batch, ...]  # this rank's
    gradients: dict[str, list[int]] | None = None
