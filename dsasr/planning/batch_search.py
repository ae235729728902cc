"""Search for the largest batch budget that fits a memory, by steps of worst-case batches.

A child process (`measure_batch`) builds the stage's branch with DeepSpeed's engine, the other
branch offloaded beside it where the recipe has both in one job, and makes whole optimizer steps.
Running out of memory may end the child in any way; the parent counts that as "does not fit" and
starts a new child.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import yaml

from dsasr import config
from dsasr.build import Builder, sub_seed
from dsasr.data.dataloader.augment_sampler import planned_seconds
from dsasr.data.dataloader.bucketing import FRAMES_PER_SECOND, BatchConfig
from dsasr.data.dataloader.dataloader import build_dataset_parts
from dsasr.data.dataloader.padding_forecast import Forecast, forecast
from dsasr.data.dataloader.window_plan import PlanConfig
from dsasr.data.shards.index_cache import load_or_build_index
from dsasr.data.shards.storage import ShardStorage
from dsasr.planning.measure_batch import Shape, serve
from dsasr.recipe import Recipe
from dsasr.stages import StageConfig
from dsasr.utils.errors import UserError

GIB = 1 << 30
ROUND = 100  # frames; budgets are multiples
SHARDS = 64  # of each dataset, for a forecast
# Seconds that a probe may take, and the building before it; 10 times the slowest step so far are
# added for each of its batches.
PATIENCE = 900.0
CHARS_PER_SECOND = 25.0  # an upper bound for the transcript of one over-long sample


@dataclass(frozen=True)
class BudgetProbe:
    """One budget and whether it fits."""

    frames: int
    tokens: int
    shapes: tuple[Shape, ...]  # the worst batches that were stepped
    fits: bool
    peak: int | None = None  # bytes of the process or the GPU; None: the child ended
    seconds: float = 0.0  # of the slowest step
    reason: str = ""  # why it does not fit


@dataclass(frozen=True)
class SearchResult:
    """The largest budget of a stage, and the probes that led to it."""

    stage: str
    device: str
    memory: int  # bytes that could be used
    resident: int  # bytes that the stage takes before the step of a batch
    probes: tuple[BudgetProbe, ...]
    batch: BatchConfig | None  # with the largest budget that fits; None: none does
    complete: bool  # False: the search ended at its upper limit


def forecast_stage(recipe: Recipe, stage: StageConfig, max_shards: int = SHARDS) -> Forecast:
    """The forecast of one epoch of a stage's mixture, from ``max_shards`` shards of each dataset
    (0: all)."""
    loader, datasets = recipe.dataloader(stage)
    sources = ShardStorage(loader.source)
    augment = recipe.data.augment
    plan = PlanConfig(
        batch=loader.batch,
        seed=sub_seed(recipe.seed, f"stream {stage.name}"),
        shuffle=loader.shuffle,
        window=loader.window,
        window_samples=loader.window_samples,
    )
    lengths = None if augment is None else planned_seconds(augment)
    parts = build_dataset_parts(datasets, sources, loader.temperature)
    load = partial(load_or_build_index, sources)
    return forecast(parts, plan, load, lengths, max_shards)


def longest_frames(batch: BatchConfig) -> int:
    return math.ceil(batch.max_seconds * FRAMES_PER_SECOND)


def token_budget(frames: int, batch: BatchConfig, epoch: Forecast) -> int:
    """The token budget to go with a frame budget.

    The recipe's ratio if it has one, else what nearly all batches of the data need; in any case
    enough for one over-long sample.
    """
    share = batch.tokens / batch.frames if batch.tokens else epoch.positions_per_frame
    seconds = min(frames, longest_frames(batch)) / FRAMES_PER_SECOND
    text = math.ceil(seconds * CHARS_PER_SECOND * batch.tokens_per_char)
    speech = -(-min(frames, longest_frames(batch)) // batch.frames_per_token)
    return max(math.ceil(share * frames), batch.prompt_tokens + speech + text + 1)


def worst_shapes(batch: BatchConfig, shortest: int, sft: bool) -> tuple[Shape, ...]:
    """The batches within a budget that take the most memory, without duplicates.

    As many samples as fit, once of the longest, once of middling and once of the ``shortest``
    (frames) length, with transcripts as long as the token budget permits; and one sample of the
    longest length alone.
    """
    longest = min(batch.frames, longest_frames(batch))
    shortest = max(1, min(shortest, longest))
    lengths = [longest, round(math.sqrt(longest * shortest)), shortest]
    shapes = [_shape(batch, min(batch.samples, batch.frames // n), n, sft) for n in lengths]
    shapes.append(_shape(batch, 1, longest, sft))
    return tuple(dict.fromkeys(shapes))


def _shape(batch: BatchConfig, samples: int, frames: int, sft: bool) -> Shape:
    fixed = batch.prompt_tokens + -(-frames // batch.frames_per_token)
    if not sft:
        return Shape(max(samples, 1), frames, 0)
    samples = max(1, min(samples, batch.tokens // (fixed + 2)))
    return Shape(samples, frames, max(1, batch.tokens // samples - fixed))


def bisect_budget(
    fits: Callable[[int], bool], start: int, limit: int, tolerance: float = 0.05
) -> tuple[int, bool]:
    """(the largest multiple of `ROUND` up to ``limit`` that fits, whether the search is complete).

    Doubles from ``start`` (or halves, where that does not fit), then bisects down to a share of
    ``tolerance``. (0, True) where nothing fits; (``limit``, False) where ``limit`` itself fits.
    """
    limit = limit // ROUND * ROUND
    low, high = 0, 0
    frames = min(limit, max(ROUND, start // ROUND * ROUND))
    while not high:
        if fits(frames):
            low = frames
            if frames >= limit:
                return low, False
            frames = min(2 * frames, limit)
        else:
            high = frames
    while not low and high > ROUND:
        frames = max(ROUND, high // 2 // ROUND * ROUND)
        low, high = (frames, high) if fits(frames) else (low, frames)
    while low and high - low > max(ROUND, tolerance * low):
        frames = (low + high) // 2 // ROUND * ROUND
        low, high = (frames, high) if fits(frames) else (low, frames)
    return low, True


class ProbeProcess:
    """A child process that steps batches; started anew after each budget that did not fit."""

    def __init__(self, recipe: Recipe, stage: str, memory: int) -> None:
        self.arguments = (recipe, stage, memory)
        self.log = tempfile.NamedTemporaryFile("r", prefix="dsasr-probe-")  # noqa: SIM115
        self.process: Any = None
        self.slowest = 0.0  # seconds of a step
        self.memory = self.resident = 0  # bytes, once a child is ready
        self.device = ""

    def peak(self, shapes: tuple[Shape, ...]) -> tuple[int | None, float, str]:
        """(peak bytes, seconds of the slowest step, "") or (None, 0, how the memory ran out)."""
        if self.process is None:
            ended = self._start()
            if ended:
                return None, 0.0, ended
        with contextlib.suppress(OSError):  # the child has died; the answer says how
            self.pipe.send(shapes)
        kind, value = self._answer(PATIENCE + 10 * self.slowest * len(shapes))
        if kind != "peak":
            return None, 0.0, value
        peak, seconds = value
        self.slowest = max(self.slowest, seconds)
        return peak, seconds, ""

    def stop(self) -> None:
        if self.process is not None:
            self.pipe.close()  # which ends it, unless it hangs
            self.process.join(10)
            self.process.kill()
            self.process.join()
            self.process = None

    def _start(self) -> str:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=serve, args=(theirs, self.log.name, *self.arguments), daemon=True
        )
        self.process.start()
        theirs.close()
        kind, value = self._answer(PATIENCE)
        if kind != "ready":
            return value
        self.device, self.memory, self.resident = value
        self.arguments = (*self.arguments[:2], self.memory)  # the same bound for all children
        return ""

    def _answer(self, seconds: float) -> tuple[str, Any]:
        """The child's answer; ("memory", how) where memory ran out, or the child died or hangs.

        Raises the child's other errors: `UserError`, or RuntimeError with its traceback.
        """
        how = f"no answer for {seconds:.0f} s"
        if self.pipe.poll(seconds):
            try:
                kind, value = self.pipe.recv()
            except (EOFError, OSError):
                self.process.join()
                code = self.process.exitcode
                if code is not None and code >= 0:
                    self.stop()
                    end = self.log.read()[-2000:]
                    raise RuntimeError(f"the probe ended with exit code {code}: {end}") from None
                kind, value = "memory", f"killed by signal {-code}"
            if kind in ("ready", "peak"):
                return kind, value
            how = value
            if kind != "memory":
                self.stop()
                raise UserError(value) if kind == "user" else RuntimeError(value)
        self.stop()
        return "memory", how


def search_budget(
    recipe: Recipe,
    stage: StageConfig,
    *,
    memory: int = 0,
    margin: float = 0.05,
    limit: int = 200_000,
    tolerance: float = 0.05,
    begin: Callable[[int], None] = lambda frames: None,
    report: Callable[[BudgetProbe], None] = lambda probe: None,
) -> SearchResult:
    """Find the largest budget of ``stage``, up to ``limit`` frames, that leaves ``margin`` of
    ``memory`` bytes free.

    ``memory`` 0: all that the GPU, or the machine, has free. ``tolerance``: the share to which the
    result is the largest. ``begin`` is called with the frames of every probe before it, which may
    take a minute, ``report`` with the probe.
    Raises `UserError` where the stage itself does not fit.
    """
    epoch = forecast_stage(recipe, stage)
    base, sft = recipe.dataloader(stage)[0].batch, stage.branch == "sft"
    if sft and (stacked := recipe.model.adaptor.frames_per_token):
        step = FRAMES_PER_SECOND * Builder(recipe).frame_seconds
        base = replace(base, frames_per_token=round(step * stacked))
    child, probes = ProbeProcess(recipe, stage.name, memory), []

    def with_frames(frames: int) -> BatchConfig:
        tokens = token_budget(frames, base, epoch) if sft else 0
        return replace(base, frames=frames, tokens=tokens)

    def fits(frames: int) -> bool:
        begin(frames)
        batch = with_frames(frames)
        shapes = worst_shapes(batch, epoch.shortest, sft)
        peak, seconds, reason = child.peak(shapes)
        if not child.memory:
            raise UserError(
                f"stage '{stage.name}' does not fit without any batch ({reason}): give more memory,"
                " or another DeepSpeed setting (engine.deepspeed=zero3-offload)"
            )
        enough = peak is not None and peak <= (1 - margin) * child.memory
        if peak is not None and not enough:
            reason = f"leaves less than {margin:.0%}"
            child.stop()  # a process does not return all memory that it once had
        probes.append(BudgetProbe(frames, batch.tokens, shapes, enough, peak, seconds, reason))
        report(probes[-1])
        return enough

    try:
        frames, complete = bisect_budget(fits, longest_frames(base), limit, tolerance)
    finally:
        child.stop()
    return SearchResult(
        stage=stage.name,
        device=child.device,
        memory=child.memory,
        resident=child.resident,
        probes=tuple(probes),
        batch=with_frames(frames) if frames else None,
        complete=complete,
    )


def recipe_line(result: SearchResult) -> str:
    """The budget as a ``key=value`` argument: what to write into the stage's row of the recipe."""
    values = {
        k: v for k, v in config.to_plain(result.batch).items() if v != getattr(BatchConfig(), k)
    }
    flow = yaml.safe_dump(values, default_flow_style=True, sort_keys=False, width=1000).strip()
    return f"stages.{result.stage}.batch={flow}"


def search_table(result: SearchResult) -> str:
    """The probes by budget, and the line for the recipe."""
    lines = [
        f"stage {result.stage} on {result.device}: {result.memory / GIB:.2f} GiB, of which "
        f"{result.resident / GIB:.2f} are taken before the first batch",
        "",
        f"{'frames':>8} {'tokens':>8} {'worst batches':<44} {'peak GiB':>8} {'s/step':>7}  fits",
    ]
    for probe in sorted(result.probes, key=lambda p: p.frames):
        shapes = ", ".join(f"{s.samples}x{s.frames / FRAMES_PER_SECOND:g}s" for s in probe.shapes)
        peak = "-" if probe.peak is None else f"{probe.peak / GIB:.2f}"
        verdict = "yes" if probe.fits else f"no: {probe.reason}"
        lines.append(
            f"{probe.frames:>8} {probe.tokens or '-':>8} {shapes:<44} {peak:>8} "
            f"{probe.seconds:>7.2f}  {verdict}"
        )
    lines.append("")
    if result.batch is None:
        return "\n".join([*lines, f"nothing fits: not even {ROUND} frames"])
    longest = longest_frames(result.batch)
    if result.batch.frames < longest:
        lines.append(
            f"samples above {result.batch.frames / FRAMES_PER_SECOND:g} s will be left out "
            f"(over_budget): max_seconds={result.batch.max_seconds:g} does not fit"
        )
    if not result.complete:
        lines.append("more may fit: the search ended at its upper limit (--most)")
    return "\n".join([*lines, recipe_line(result)])
