"""The largest batch budget that fits a memory: worst-case batches, stepped in a child process.

The child builds what the stage will hold (its branch with DeepSpeed's engine, and the other branch
offloaded beside it where the recipe has both in one job) and makes whole optimizer steps. Running
out of memory may end the child in any way; the parent takes that for an answer and starts another.
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
from dsasr.data.dataloader.augment_params import planned_seconds
from dsasr.data.dataloader.bucketing import FRAMES_PER_SECOND, BatchConfig, PlanConfig
from dsasr.data.dataloader.dataloader import build_dataset_parts
from dsasr.data.dataloader.padding_forecast import Forecast, forecast
from dsasr.data.shards.index_cache import load_or_build_index
from dsasr.data.shards.storage import ShardStorage
from dsasr.planning.batch_trial import Shape, serve
from dsasr.recipe import SUBSAMPLING, Recipe
from dsasr.stages import StageConfig
from dsasr.utils.errors import UserError

GIB = 1 << 30
ROUND = 100  # frames; budgets are multiples
SHARDS = 64  # of each dataset that a forecast looks at
PATIENCE = 900.0  # seconds for building, and for a trial's first step; later ones by experience
CHARS_PER_SECOND = 25.0  # an upper bound for the transcript of one over-long sample


@dataclass(frozen=True)
class Trial:
    """One budget that was tried. ``peak`` in bytes, of the process or the GPU; None: it died."""

    frames: int
    tokens: int
    shapes: tuple[Shape, ...]
    fits: bool
    peak: int | None = None
    seconds: float = 0.0
    why: str = ""


@dataclass(frozen=True)
class Found:
    """What a probe found. ``batch``: the stage's settings with the largest budget that fits."""

    stage: str
    device: str
    memory: int  # bytes that could be used
    held: int  # bytes that the stage holds before it makes a batch's step
    trials: tuple[Trial, ...]
    batch: BatchConfig | None
    complete: bool  # False: the search ended at its upper limit


def outlook(recipe: Recipe, stage: StageConfig, most_shards: int = SHARDS) -> Forecast:
    """The forecast of one epoch of a stage's mixture."""
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
    return forecast(parts, plan, load, lengths, most_shards)


def longest_frames(batch: BatchConfig) -> int:
    return math.ceil(batch.max_seconds * FRAMES_PER_SECOND)


def tokens_for(frames: int, batch: BatchConfig, told: Forecast) -> int:
    """The token budget to go with a frame budget.

    The recipe's ratio if it has one, else what nearly all batches of the data need; in any case
    enough for one over-long sample.
    """
    share = batch.tokens / batch.frames if batch.tokens else told.positions_per_frame
    seconds = min(frames, longest_frames(batch)) / FRAMES_PER_SECOND
    text = math.ceil(seconds * CHARS_PER_SECOND * batch.tokens_per_char)
    speech = -(-min(frames, longest_frames(batch)) // batch.frames_per_token)
    return max(math.ceil(share * frames), batch.prompt_tokens + speech + text + 1)


def worst_shapes(batch: BatchConfig, shortest: int, sft: bool) -> tuple[Shape, ...]:
    """Batches that a budget allows and that cost most, without doubles.

    As many as fit of the longest, of middling and of the ``shortest`` (frames) samples, with
    transcripts as long as the token budget permits; and one over-long sample by itself.
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


def search(
    fits: Callable[[int], bool], start: int, most: int, within: float = 0.05
) -> tuple[int, bool]:
    """The largest multiple of `ROUND` up to ``most`` that fits, to a share of ``within``.

    Doubles from ``start`` (or halves, where that is too much), then bisects. Returns (0, True)
    where nothing fits; False: ``most`` itself fits.
    """
    most = most // ROUND * ROUND
    low, high = 0, 0
    at = min(most, max(ROUND, start // ROUND * ROUND))
    while not high:
        if fits(at):
            low = at
            if at >= most:
                return low, False
            at = min(2 * at, most)
        else:
            high = at
    while not low and high > ROUND:
        at = max(ROUND, high // 2 // ROUND * ROUND)
        if fits(at):
            low = at
        else:
            high = at
    while low and high - low > max(ROUND, within * low):
        at = (low + high) // 2 // ROUND * ROUND
        if fits(at):
            low = at
        else:
            high = at
    return low, True


class Child:
    """A process that makes trials; started anew after each that did not fit."""

    def __init__(self, recipe: Recipe, stage: str, memory: int) -> None:
        self.given = (recipe, stage, memory)
        self.log = tempfile.NamedTemporaryFile("r", prefix="dsasr-trial-")  # noqa: SIM115
        self.process: Any = None
        self.slowest = 0.0
        self.memory = self.held = 0
        self.device = ""

    def peak(self, shapes: tuple[Shape, ...]) -> tuple[int | None, float, str]:
        """(peak bytes, seconds of the slowest step, "") or (None, 0, how the memory ended)."""
        if self.process is None:
            ended = self._start()
            if ended:
                return None, 0.0, ended
        with contextlib.suppress(OSError):  # it is dead, and the answer says how
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
            target=serve, args=(theirs, self.log.name, *self.given), daemon=True
        )
        self.process.start()
        theirs.close()
        kind, value = self._answer(PATIENCE)
        if kind != "ready":
            return value
        self.device, self.memory, self.held = value
        self.given = (*self.given[:2], self.memory)  # all trials under the same bound
        return ""

    def _answer(self, seconds: float) -> tuple[str, Any]:
        """What the child says; ("memory", how) where it ran out, died or hangs. Raises the rest."""
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
                    raise RuntimeError(f"the trial ended with exit code {code}: {end}") from None
                kind, value = "memory", f"killed by signal {-code}"
            if kind in ("ready", "peak"):
                return kind, value
            how = value
            if kind != "memory":
                self.stop()
                raise UserError(value) if kind == "user" else RuntimeError(value)
        self.stop()
        return "memory", how


def probe(
    recipe: Recipe,
    stage: StageConfig,
    *,
    memory: int = 0,
    margin: float = 0.05,
    most: int = 200_000,
    within: float = 0.05,
    tell: Callable[[Trial], None] = lambda trial: None,
) -> Found:
    """Find the largest budget of ``stage`` that leaves ``margin`` of ``memory`` bytes free.

    ``memory`` 0: all that the GPU, or the machine, has free. ``within``: share
    to which the answer is the largest. ``tell`` hears of every trial.
    Raises `UserError` where the stage itself does not fit.
    """
    told = outlook(recipe, stage)
    base, sft = recipe.dataloader(stage)[0].batch, stage.branch == "sft"
    if sft:
        base = replace(base, frames_per_token=SUBSAMPLING * recipe.model.adaptor.stack)
    child, trials = Child(recipe, stage.name, memory), []

    def fits(frames: int) -> bool:
        tokens = tokens_for(frames, base, told) if sft else base.tokens
        batch = replace(base, frames=frames, tokens=tokens)
        shapes = worst_shapes(batch, told.shortest, sft)
        peak, seconds, why = child.peak(shapes)
        if not child.memory:
            raise UserError(
                f"stage '{stage.name}' does not fit without any batch ({why}): give more memory, "
                "or another DeepSpeed setting (engine.deepspeed=zero3-offload)"
            )
        good = peak is not None and peak <= (1 - margin) * child.memory
        if peak is not None and not good:
            why = f"leaves less than {margin:.0%}"
            child.stop()  # memory that a process once had is not all given back
        trials.append(Trial(frames, tokens, shapes, good, peak, seconds, why))
        tell(trials[-1])
        return good

    try:
        frames, complete = search(fits, longest_frames(base), most, within)
    finally:
        child.stop()
    chosen = None
    if frames:
        chosen = replace(base, frames=frames, tokens=tokens_for(frames, base, told) if sft else 0)
    return Found(
        stage.name, child.device, child.memory, child.held, tuple(trials), chosen, complete
    )


def recipe_line(found: Found) -> str:
    """What to write into the stage's row of the recipe; also a ``key=value`` argument."""
    values = {
        k: v for k, v in config.to_plain(found.batch).items() if v != getattr(BatchConfig(), k)
    }
    flow = yaml.safe_dump(values, default_flow_style=True, sort_keys=False, width=1000).strip()
    return f"stages.{found.stage}.batch={flow}"


def table(found: Found) -> str:
    """The trials, by budget, and the line to write."""
    lines = [
        f"stage {found.stage} on {found.device}: {found.memory / GIB:.2f} GiB, of which "
        f"{found.held / GIB:.2f} are held before a batch comes",
        "",
        f"{'frames':>8} {'tokens':>8} {'worst batches':<44} {'peak GiB':>8} {'s/step':>7}  fits",
    ]
    for trial in sorted(found.trials, key=lambda t: t.frames):
        shapes = ", ".join(f"{s.samples}x{s.frames / FRAMES_PER_SECOND:g}s" for s in trial.shapes)
        peak = "-" if trial.peak is None else f"{trial.peak / GIB:.2f}"
        verdict = "yes" if trial.fits else f"no: {trial.why}"
        lines.append(
            f"{trial.frames:>8} {trial.tokens or '-':>8} {shapes:<44} {peak:>8} "
            f"{trial.seconds:>7.2f}  {verdict}"
        )
    lines.append("")
    if found.batch is None:
        return "\n".join([*lines, f"nothing fits: not even {ROUND} frames"])
    longest = longest_frames(found.batch)
    if found.batch.frames < longest:
        lines.append(
            f"samples above {found.batch.frames / FRAMES_PER_SECOND:g} s will be left out "
            f"(over_budget): batch.max_seconds={found.batch.max_seconds:g} does not fit"
        )
    if not found.complete:
        lines.append("more may fit: the search ended at its upper limit (--most)")
    return "\n".join([*lines, recipe_line(found)])


def stage_of(recipe: Recipe, name: str) -> StageConfig:
    """The stage of that name. Raises `UserError`."""
    names = [stage.name for stage in recipe.stages]
    if name not in names:
        raise UserError(f"no stage '{name}'{config.nearest(name, names)}")
    return recipe.stages[names.index(name)]


def check(recipe: Recipe) -> None:
    """Raise `UserError` for what the recipe's files lack, before any process starts."""
    Builder(recipe).check()
