"""Evaluation during training: error rates on the recipe's validation set, and the best so far."""

from __future__ import annotations

import contextlib
import math
import re
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from dsasr.build import Builder
from dsasr.data.dataloader.bad_samples import dropped_summary
from dsasr.data.dataloader.dataloader import DatasetConfig
from dsasr.data.shards.sample import DroppedSample
from dsasr.engine.branch_engine import BranchEngine
from dsasr.evaluation.audio_use import LEAST_GAIN, audio_gain
from dsasr.evaluation.error_rate import interval_ends
from dsasr.evaluation.eval_sets import Recording, longest_seconds, read_recordings
from dsasr.evaluation.mean_outputs import mean_outputs
from dsasr.evaluation.results import Result
from dsasr.evaluation.suite import build_suite
from dsasr.evaluation.transcribe import transcribe, transcribe_clips
from dsasr.model.speech_llm import SpeechLLM
from dsasr.recipe import Recipe
from dsasr.tracking.monitor import Monitor
from dsasr.tracking.run_log import HYPOTHESES
from dsasr.utils import distributed
from dsasr.utils.errors import UserError, first_line
from dsasr.utils.io import atomic_write, to_json
from dsasr.utils.masking import mask

T = TypeVar("T")
_PACKAGE = Path(__file__).parents[1]
FAILED_SECONDS = 120.0  # that a rank whose evaluation has failed waits for the others
ENDED_SECONDS = 3600.0  # and one whose evaluation has ended: others may still count errors
PLATEAU = 0.9  # phoneme error rate from which on CTC writes next to nothing (**ours**)
BAD_SAMPLES = "bad_validation_samples.jsonl"  # in the run folder, of the newest evaluation


class Validation:
    """The evaluations of a run and their scores.

    The score is the metric that `CheckpointConfig.best` names; lower is better.
    """

    def __init__(self, recipe: Recipe, builder: Builder, monitor: Monitor):
        self.recipe, self.builder, self.monitor = recipe, builder, monitor
        self.best: float | None = None
        self._evaluations = 0  # of this process
        self._last: tuple[int, float] = (-1, 0.0)  # steps of the newest evaluation, its score
        self._shown_keys: tuple[str, ...] = ()  # keys of the recordings last written to TensorBoard

    def evaluate(
        self,
        branch: BranchEngine,
        utterances: int,
        steps: int,
        progress: Callable[[list], Iterable] = iter,
    ) -> None:
        """Write the `error_rates` of ``branch`` after ``steps`` steps to metrics and log."""
        started, stage = time.monotonic(), branch.stage.name
        measure = partial(error_rates, self.recipe, self.builder, branch, utterances, progress)
        found = self.attempt(measure, stage, steps)
        if found is None:
            return
        rates, samples, bad = found
        self._name_bad_samples(bad, stage, steps)
        head = {"steps": steps, "branch": branch.name, "stage": f"valid_{stage}"}
        self.monitor.scalars(head, rates | {"evaluation_seconds": time.monotonic() - started})
        if samples:
            self._keep_hypotheses(samples, stage, steps)
            if self.monitor.has_board:
                self._show(samples, steps)
        self.monitor.event("evaluated", stage=stage, steps=steps, **rates)
        if rates.get("audio_gain", math.inf) < LEAST_GAIN:
            values = {"gain": rates["audio_gain"], "loss": rates["loss"]}
            self.monitor.event("audio_ignored", stage=stage, steps=steps, **values)
        errors = rates.get("phoneme_error_rate", 0.0)
        if branch.name == "pretrain" and errors >= PLATEAU:
            self.monitor.event("ctc_plateau", stage=stage, steps=steps, phoneme_error_rate=errors)
        score = rates.get(self.recipe.checkpoint.best)
        if score is not None and math.isfinite(score):
            self._last = (steps, score)
            self.best = score if self.best is None else min(score, self.best)

    def _show(self, samples: list[Result], steps: int) -> None:
        """Write transcripts beside their references to TensorBoard, and their sound where it is not
        that of the evaluation before."""
        self.monitor.text("sft", "valid/transcripts", _markdown(samples), steps)
        keys = tuple(result.key for result in samples)
        if keys == self._shown_keys:
            return
        self._shown_keys = keys
        waves: dict[str, Tensor] = {}
        for dataset in self.recipe.data.valid:
            # A set without any of these keys is one that cannot be read: neither stops a run.
            with contextlib.suppress(UserError, OSError):
                found = _recordings(dataset, self.recipe, self.builder, keys=keys)
                waves |= {recording.key: recording.wave for recording in found}
        for number, key in enumerate(keys, 1):
            if key in waves:
                name, rate = f"valid/audio_{number}", self.builder.front_end.rate
                self.monitor.audio("sft", name, waves[key], rate, steps)

    def _keep_hypotheses(self, samples: list[Result], stage: str, steps: int) -> None:
        """Write some transcripts of this evaluation to `HYPOTHESES`, in place of the last one's."""
        if not distributed.is_main_rank():
            return
        keys = ("key", "lang", "reference", "hypothesis")
        rows = [{key: getattr(result, key) for key in keys} for result in samples]
        with contextlib.suppress(OSError):  # a full disk stops no run
            atomic_write(
                self.recipe.folder / HYPOTHESES,
                "".join(f"{to_json(row | {'stage': stage, 'steps': steps})}\n" for row in rows),
            )

    def attempt(self, evaluation: Callable[[], T], stage: str, steps: int) -> T | None:
        """The result of an ``evaluation``; None where it fails on any rank: an event says why, and
        training goes on. Collective.

        Raises its error where the other ranks do not know of it and wait in the evaluation.
        """
        result, failure, reason = None, None, ""
        try:
            result = evaluation()
        except Exception as error:  # it runs the model: out of memory and much else
            failure = error
            reason = mask(f"{first_line(failure)}{_where(failure)}")
        self._evaluations += 1
        try:
            patience = FAILED_SECONDS if reason else ENDED_SECONDS
            reasons = distributed.failures(reason, f"evaluation {self._evaluations}", patience)
        except TimeoutError:
            if failure is not None:
                raise failure from None
            raise
        failed = [f"rank {number}: {text}" for number, text in enumerate(reasons) if text]
        if failed:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.monitor.event("evaluation_failed", stage=stage, steps=steps, reason=failed[0])
            return None
        return result

    def _name_bad_samples(self, bad: list[DroppedSample], stage: str, steps: int) -> None:
        """Name the samples that were left out in `BAD_SAMPLES`, and count them in an event."""
        if not distributed.is_main_rank() or not bad:
            return
        rows = [dict(zip(("cause", "shard", "key", "detail"), row, strict=True)) for row in bad]
        with contextlib.suppress(OSError):  # a full disk stops no run
            atomic_write(
                self.recipe.folder / BAD_SAMPLES,
                "".join(f"{to_json(row | {'stage': stage, 'steps': steps})}\n" for row in rows),
            )
        counts = Counter(cause for cause, *_ in bad)
        first = f"{bad[0][2]} in {bad[0][1]}: {bad[0][3]}"
        self.monitor.event("bad_validation_samples", steps=steps, first=first, **counts)

    def score(self, steps: int) -> float | None:
        """The score of the evaluation after ``steps`` steps, None if there was none."""
        return self._last[1] if self._last[0] == steps else None

    def is_best(self, steps: int) -> bool:
        """Whether the evaluation after ``steps`` steps has the best score so far."""
        return self._last == (steps, self.best)


def error_rates(
    recipe: Recipe,
    builder: Builder,
    branch: BranchEngine,
    utterances: int,
    progress: Callable[[list], Iterable] = iter,
) -> tuple[dict[str, float], list[Result], list[DroppedSample]]:
    """Rates by name over all ranks, some of the transcripts, and the samples that could not be
    read; collective.

    The rate of a pretrain branch is its phoneme error rate; those of an sft branch are scores of
    its transcripts, with the ends of their intervals (`interval_ends`). "loss" is the mean CTC loss
    a phoneme, or the mean NLL a token of the references. ``utterances`` limits the set (0: all).
    "audio_gain" is what an utterance's own audio lowers its NLL by (`audio_gain`), in nats a token.
    "left_out" counts samples that could not be read, "cut" transcripts cut at the token limit, if
    any. ``progress`` wraps the batches. Raises `UserError` where none could be read.
    """
    batches = builder.validation_batches(branch.name, utterances)
    own = [row for batch in batches for row in batch.bad]
    bad = [row for rows in distributed.all_gather_object(own) for row in rows]
    if not sum(distributed.all_gather_object(sum(map(len, batches)))):
        last = bad[-1] if bad else None
        causes = dropped_summary(Counter(cause for cause, *_ in bad), last)
        raise UserError(f"the validation set has no usable sample{causes}")
    left_out = {"left_out": float(len(bad))} if bad else {}
    means = partial(mean_outputs, device=distributed.device(), sum_ranks=distributed.all_reduce_sum)
    with branch.evaluating() as module:
        if branch.name == "pretrain":
            errors, loss = means(module, progress(batches), ("phoneme_errors", "ctc"))
            return {"phoneme_error_rate": errors, "loss": loss} | left_out, [], bad
        (loss,) = means(module, batches, ("nll",))
        gain = audio_gain(
            module, batches, device=distributed.device(), sum_ranks=distributed.all_reduce_sum
        )
        results = transcribe(
            module,
            progress(batches),
            builder.tokenizer,
            recipe.evaluation.decode.for_model(module),
            device=distributed.device(),
            any_rank=distributed.any_rank,
            gather=distributed.all_gather_object,
        )
        hallucinations = _hallucination_rates(recipe, builder, module)
    scores = results.scores(rules=recipe.evaluation.rules)
    rates = {"loss": loss} | scores.summary() | interval_ends(scores)
    if math.isfinite(gain):
        rates["audio_gain"] = gain
    if cut := sum(results.cut().values()):
        rates["cut"] = float(cut)
    count = recipe.evaluation.samples
    rows = results.rows[:: max(len(results.rows) // max(count, 1), 1)][:count]
    return rates | hallucinations | left_out, rows, bad


def _markdown(samples: list[Result]) -> str:
    """A table of references and transcripts, numbered like their sounds."""
    rows = [
        "| " + " | ".join(_plain(cell) for cell in (str(i), r.key, r.reference or "", r.hypothesis))
        for i, r in enumerate(samples, 1)
    ]
    return "\n".join(["| audio | key | reference | transcript |", "|---|---|---|---|", *rows])


def _plain(text: str) -> str:
    """``text`` as a cell of a Markdown table shows it."""
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~-])", r"\\\1", " ".join(text.split()))


def _recordings(
    dataset: DatasetConfig, recipe: Recipe, builder: Builder, **options: Any
) -> list[Recording]:
    """Recordings of a validation set; ``options`` as of `read_recordings`, which may raise."""
    recordings, _ = read_recordings(
        dataset.shards,
        rate=builder.front_end.rate,
        text=recipe.data.text,
        source=recipe.data.dataloader.source,
        fields=dataset.fields,
        max_seconds=longest_seconds(builder.front_end),
        **options,
    )
    return recordings


def _where(error: BaseException) -> str:
    """`` (file:line)`` of the innermost frame of this package that raised ``error``."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(_PACKAGE)]
    if isinstance(error, UserError):
        return ""
    return f" ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else ""


def _hallucination_rates(recipe: Recipe, builder: Builder, module: SpeechLLM) -> dict[str, float]:
    """Rates on the recipe's noise suite of validation recordings; none if the recipe has none."""
    evaluation, data = recipe.evaluation, recipe.data
    if not evaluation.suite_utterances or not data.valid:
        return {}
    recordings = []
    for dataset in data.valid:
        recordings += _recordings(dataset, recipe, builder, limit=evaluation.suite_utterances)
    results = transcribe_clips(
        module,
        build_suite(recordings, evaluation.suite, rate=builder.front_end.rate),
        builder.tokenizer,
        evaluation.decode.for_model(module),
        front_end=builder.front_end,
        device=distributed.device(),
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        any_rank=distributed.any_rank,
        gather=distributed.all_gather_object,
    )
    totals = results.hallucinations().summary() | {"utterances": float(len(recordings))}
    return {f"hallucination/{name}": value for name, value in totals.items()}
