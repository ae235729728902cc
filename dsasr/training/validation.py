"""Evaluation during training: error rates on the recipe's validation set, and the best so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from dsasr.build import Builder
from dsasr.engine.branch_engine import BranchEngine
from dsasr.evaluation.eval_sets import longest_seconds, read_recordings
from dsasr.evaluation.phoneme_error_rate import phoneme_error_rate
from dsasr.evaluation.suite import build_suite
from dsasr.evaluation.transcribe import transcribe, transcribe_clips
from dsasr.model.speech_llm import SpeechLLM
from dsasr.recipe import Recipe
from dsasr.tracking.monitor import Monitor
from dsasr.utils import distributed


class Validation:
    """The evaluations of a run and their scores.

    The score is the metric that `CheckpointConfig.best` names; lower is better.
    """

    def __init__(self, recipe: Recipe, build: Builder, monitor: Monitor):
        self.recipe, self.build, self.monitor = recipe, build, monitor
        self.best: float | None = None
        self._last: tuple[int, float] = (-1, 0.0)  # steps of the newest evaluation, its score

    def evaluate(
        self,
        branch: BranchEngine,
        utterances: int,
        steps: int,
        progress: Callable[[list], Iterable] = iter,
    ) -> None:
        """Write the `error_rates` of ``branch`` after ``steps`` steps to metrics and log."""
        started = time.monotonic()
        rates, samples = error_rates(self.recipe, self.build, branch, utterances, progress)
        stage = branch.stage.name
        head = {"steps": steps, "branch": branch.name, "stage": f"valid_{stage}"}
        self.monitor.scalars(head, rates | {"evaluation_seconds": time.monotonic() - started})
        if samples:
            self.monitor.text(f"valid_{stage}", samples, steps)
        self.monitor.event("evaluated", stage=stage, steps=steps, **rates)
        score = rates.get(self.recipe.checkpoint.best)
        if score is not None:
            self._last = (steps, score)
            self.best = score if self.best is None else min(score, self.best)

    def score(self, steps: int) -> float | None:
        """The score of the evaluation after ``steps`` steps, None if there was none."""
        return self._last[1] if self._last[0] == steps else None

    def is_best(self, steps: int) -> bool:
        """Whether the evaluation after ``steps`` steps has the best score so far."""
        return self._last == (steps, self.best)


def error_rates(
    recipe: Recipe,
    build: Builder,
    branch: BranchEngine,
    utterances: int,
    progress: Callable[[list], Iterable] = iter,
) -> tuple[dict[str, float], str]:
    """Rates by name over all ranks, and some references beside their transcripts; collective.

    The rate of a pretrain branch is its phoneme error rate; those of an sft branch are scores of
    its transcripts. ``utterances`` limits the set (0: all). "left_out" counts samples of the set
    that could not be read, if any. ``progress`` wraps the batches.
    """
    batches = build.validation_batches(branch.name, utterances)
    bad = sum(distributed.all_gather_object(sum(len(batch.bad) for batch in batches)))
    left_out = {"left_out": float(bad)} if bad else {}
    with branch.evaluating() as module:
        if branch.name == "pretrain":
            rate = phoneme_error_rate(
                module,
                progress(batches),
                device=distributed.device(),
                sum_ranks=distributed.all_reduce_sum,
            )
            return {"phoneme_error_rate": rate} | left_out, ""
        results = transcribe(
            module,
            progress(batches),
            build.tokenizer,
            recipe.evaluation.decode,
            device=distributed.device(),
            any_rank=distributed.any_rank,
            gather=distributed.all_gather_object,
        )
        hallucinations = _hallucination_rates(recipe, build, module)
    rates = results.scores(rules=recipe.evaluation.rules).summary()
    count = recipe.evaluation.samples
    rows = results.rows[:: max(len(results.rows) // max(count, 1), 1)][:count]
    samples = "\n\n".join(f"ref {r.reference}  \nhyp {r.hypothesis}" for r in rows)
    return rates | hallucinations | left_out, samples


def _hallucination_rates(recipe: Recipe, build: Builder, module: SpeechLLM) -> dict[str, float]:
    """Rates on the recipe's noise suite of validation recordings; none if the recipe has none."""
    evaluation, data = recipe.evaluation, recipe.data
    if not evaluation.suite_utterances or not data.valid:
        return {}
    recordings, _ = read_recordings(
        [s for d in data.valid for s in ([d.shards] if isinstance(d.shards, str) else d.shards)],
        rate=build.front_end.rate,
        text=data.text,
        source=data.dataloader.source,
        limit=evaluation.suite_utterances,
        max_seconds=longest_seconds(build.front_end),
    )
    results = transcribe_clips(
        module,
        build_suite(recordings, evaluation.suite, rate=build.front_end.rate),
        build.tokenizer,
        evaluation.decode,
        front_end=build.front_end,
        device=distributed.device(),
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        any_rank=distributed.any_rank,
        gather=distributed.all_gather_object,
    )
    totals = results.hallucinations().summary()
    return {f"hallucination/{name}": value for name, value in totals.items()}
