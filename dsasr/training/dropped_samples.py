"""The samples that a run has dropped, over all ranks: counted, logged, and too many end the run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from dsasr.data.dataloader.bad_samples import BadSampleLog, dropped_summary
from dsasr.data.shards.sample import DroppedSample
from dsasr.engine.step_report import StepReport
from dsasr.recipe import Recipe
from dsasr.tracking.monitor import Monitor
from dsasr.utils import distributed
from dsasr.utils.errors import UserError

EMPTY_STEPS = 50  # in a row without a usable sample on any rank, after which the run stops


class DroppedSamples:
    """Dropped samples by cause; each rank has its own `BadSampleLog`."""

    def __init__(self, recipe: Recipe, monitor: Monitor, counts: Mapping[str, int], steps: int):
        """``counts``, ``steps``: those of the checkpoint that the run resumes from; empty and 0
        for a run that starts afresh.

        Create it before the first collective call: no rank may write its file while rank 0
        truncates it.
        """
        self._monitor = monitor
        self._log = BadSampleLog(
            recipe.folder / "bad_samples.jsonl", recipe.data.bad_limits, rank=distributed.rank()
        )
        self._log.resume(counts, steps)
        self._logged = dict(counts)  # the counts in the last event
        self._empty_steps: Counter[str] = Counter()  # this rank's last ones in a row, by branch

    def add(self, bad: Iterable[DroppedSample], **context: Any) -> None:
        """Record a batch's ``bad`` samples on this rank, as `BadSampleLog.add`."""
        self._log.add(bad, **context)

    def count(self) -> dict[str, int]:
        """Dropped samples of the run by cause, over all ranks; collective."""
        total: Counter[str] = Counter()
        for counts in distributed.all_gather_object(dict(self._log.counts)):
            total.update(counts)
        return dict(sorted(total.items()))

    def count_step(self, report: StepReport) -> None:
        """Count a step without a usable sample on this rank, or end the row of them."""
        empty = not any(map(len, report.batches))
        self._empty_steps[report.branch] += 1
        self._empty_steps[report.branch] *= empty

    def check(self, report: StepReport, steps: int, last: bool, usable: bool) -> None:
        """Log counts that have changed. Collective.

        ``last``: the step is its stage's last; ``usable``: a rank had a usable sample since the
        last line of metrics. Raises `UserError` past a limit of the recipe, and where no rank has
        had a usable sample for `EMPTY_STEPS` steps, or in all the stage.
        """
        counts = self.count()
        if counts != self._logged:
            self._logged = counts
            head = {"steps": steps, "branch": report.branch, "stage": "bad_samples"}
            self._monitor.scalars(head, counts)
            self._monitor.event("bad_samples", steps=steps, **counts)
        self._log.check(counts)
        if not usable:
            self._check_usable(report, last, counts)

    def _check_usable(self, report: StepReport, last: bool, counts: dict[str, int]) -> None:
        empty = min(distributed.all_gather_object(self._empty_steps[report.branch]))
        if empty >= EMPTY_STEPS or (last and empty > report.step):
            dropped = {k: v for k, v in counts.items() if v}
            newest = next(reversed(self._log.last.values()), None)
            raise UserError(
                f"stage {report.stage}: no usable sample in the last {empty} steps"
                f"{dropped_summary(dropped, newest)}; all are named in {self._log.rank_0_name}"
            )
