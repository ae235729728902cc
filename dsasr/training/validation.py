"""Error rates of a branch while it trains, on the recipe's validation set; which was the best."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable

from dsasr.build import Builder
from dsasr.engine.branch_engine import BranchEngine
from dsasr.evaluation import eval_sets, held_out, suite_results
from dsasr.recipe import Recipe
from dsasr.tracking.monitor import Monitor
from dsasr.utils import distributed


class Validation:
    """A run's evaluations, and their scores: lower is better (`CheckpointConfig.best`)."""

    def __init__(self, recipe: Recipe, build: Builder, monitor: Monitor):
        self.recipe, self.build, self.monitor = recipe, build, monitor
        self.best: float | None = None
        self._last: tuple[int, float] = (-1, 0.0)  # steps, and the score there

    def evaluate(
        self,
        branch: BranchEngine,
        utterances: int,
        steps: int,
        watched: Callable[[list], Iterable] = iter,
    ) -> None:
        """`error_rates` of ``branch`` into metrics and the log; ``steps``: so many are made."""
        started = time.monotonic()
        values, shown = error_rates(self.recipe, self.build, branch, utterances, watched)
        stage = branch.stage.name
        head = {"steps": steps, "branch": branch.name, "stage": f"valid_{stage}"}
        self.monitor.scalars(head, values | {"evaluation_seconds": time.monotonic() - started})
        if shown:
            self.monitor.text(f"valid_{stage}", shown, steps)
        self.monitor.event("evaluated", stage=stage, steps=steps, **values)
        score = values.get(self.recipe.checkpoint.best)
        if score is not None:
            self._last = (steps, score)
            self.best = score if self.best is None else min(score, self.best)

    def score(self, steps: int) -> float | None:
        """Of the evaluation after ``steps`` steps, if there was one."""
        return self._last[1] if self._last[0] == steps else None

    def is_best(self, steps: int) -> bool:
        """Whether that evaluation's score is the best so far."""
        return self._last == (steps, self.best)


def error_rates(
    recipe: Recipe,
    build: Builder,
    branch: BranchEngine,
    utterances: int,
    watched: Callable[[list], Iterable] = iter,
) -> tuple[dict[str, float], str]:
    """Rates by name over all ranks, and some transcripts beside their references; collective.

    Of a pretrain branch the phoneme error rate; of an sft branch what its transcripts give.
    ``utterances`` limits the set; 0: all of it. "left_out": samples of it that were bad, if any.
    ``watched`` goes round the batches.
    """
    held = build.held_out(branch.name, utterances)
    dropped = sum(distributed.all_gather_object(sum(len(batch.bad) for batch in held)))
    told = {"left_out": float(dropped)} if dropped else {}
    batches = watched(held)
    with branch.evaluating() as module:
        if branch.name == "pretrain":
            rate = held_out.phoneme_error_rate(
                module, batches, device=distributed.device(), sum_ranks=distributed.all_reduce_sum
            )
            return {"phoneme_error_rate": rate} | told, ""
        found = held_out.transcribe(
            module,
            batches,
            build.tokenizer,
            recipe.evaluation.decode,
            device=distributed.device(),
            any_rank=distributed.any_rank,
            gather=distributed.all_gather_object,
        )
        invented = _hallucinations(recipe, build, module)
    summary = found.scores(recipe.evaluation.rules).summary()
    samples = recipe.evaluation.samples
    rows = found.rows[:: max(len(found.rows) // max(samples, 1), 1)][:samples]
    shown = "\n\n".join(f"ref {r.reference}  \nhyp {r.hypothesis}" for r in rows)
    values = {k: v for k, v in summary.items() if not math.isnan(v)}
    return values | invented | told, shown


def _hallucinations(recipe: Recipe, build: Builder, module) -> dict[str, float]:
    """The recipe's small suite, made of validation recordings; nothing if it wants none."""
    chosen, data = recipe.evaluation, recipe.data
    if not chosen.suite_utterances or not data.valid:
        return {}
    held, _ = eval_sets.read(
        [s for d in data.valid for s in ([d.shards] if isinstance(d.shards, str) else d.shards)],
        rate=data.fbank.rate,
        text=data.text,
        source=data.dataloader.source,
        limit=chosen.suite_utterances,
    )
    found = suite_results.hear(
        module,
        suite_results.cases(held, chosen.suite, rate=data.fbank.rate),
        build.tokenizer,
        chosen.decode,
        fbank=data.fbank,
        cmvn=build.cmvn,
        device=distributed.device(),
        rank=distributed.rank(),
        world=distributed.world_size(),
        any_rank=distributed.any_rank,
        gather=distributed.all_gather_object,
    )
    totals = found.hallucinations().summary()
    return {f"hallucination/{name}": value for name, value in totals.items()}
