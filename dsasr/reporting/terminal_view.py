"""A run on one screen of a terminal (``dsasr watch``), drawn with rich.

All text of the run passes `one_line`, and none is parsed as rich's markup.
"""

from __future__ import annotations

import io
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from dsasr.reporting.run_state import Job, Stage, hypotheses, number, series
from dsasr.tracking import console as lines
from dsasr.tracking.run_log import HYPOTHESES, Row
from dsasr.utils.terminal import beneath, one_line

BLOCKS, ASCII_BLOCKS = "▁▂▃▄▅▆▇█", "_.:-=+*#"
COLORS = {"running": "green", "stopping": "yellow", "finished": "cyan", "stopped": "yellow",
          "failed": "red", "waiting": "yellow"}  # fmt: skip
SIDE_BY_SIDE = 150  # columns from which the two jobs of a concurrent run stand side by side
EVENTS, PAIRS = 6, 3  # shown at most
GB = 1e9
PIPED_WIDTH = 110  # columns where there is no terminal


def console_of(file: TextIO, width: int | None = None) -> Console:
    """rich's console on ``file``, which takes all text as it is: no markup and no emoji codes."""
    return Console(file=file, width=width, markup=False, emoji=False, highlight=False)


def write(draw: Callable[[Console], RenderableType], width: int = PIPED_WIDTH) -> None:
    """Print what ``draw`` makes for a console; ``width``: its columns where standard output is no
    terminal. Text of others in it must have passed `one_line`."""
    out = beneath(sys.stdout)
    if out.isatty():
        console = console_of(out)
        console.print(draw(console))
        return
    console = console_of(io.StringIO(), width)
    console.print(draw(console))
    try:
        print("\n".join(map(str.rstrip, console.file.getvalue().splitlines())), flush=True)
    except BrokenPipeError:  # as of `| head`: what would follow is wanted by nobody
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())


def frame(jobs: Sequence[Job], width: int, height: int = 0, ascii_only: bool = False) -> Group:
    """The screen of a run's jobs; ``height``: lines that there are (0: any number)."""
    if len(jobs) > 1 and width >= SIDE_BY_SIDE:
        table = Table.grid(padding=(0, 2), expand=True)
        half = (width - 2) // 2
        for _ in jobs:
            table.add_column(width=half)
        table.add_row(*(Group(*_job(job, half, height, ascii_only)) for job in jobs))
        return Group(table)
    parts: list[RenderableType] = []
    for number_, job in enumerate(jobs):
        parts += [Text("")] * (number_ > 0)
        parts += _job(job, width, (height - len(jobs) + 1) // len(jobs), ascii_only)
    return Group(*parts)


def _job(job: Job, width: int, height: int, ascii_only: bool) -> list[RenderableType]:
    spark = max(min(width // 3, 40), 8)
    blocks = ASCII_BLOCKS if ascii_only else BLOCKS
    rows: list[RenderableType] = [Rule(_text(job.name, "bold"), style="dim", align="left")]
    rows += [_state(job), *(_text(problem, "red") for problem in job.problems)]
    body = [
        *_losses(job, spark, blocks),
        *_drift(job, spark, blocks),
        *_error_rates(job, spark, blocks),
        *_speed(job, spark, blocks),
        *_drops(job),
    ]
    names = [one_line(stage.name) for stage in job.stages] + [label for label, _ in body]
    label_width = min(max(map(len, names), default=0), max(width // 4, 8))
    rows += [_stage(job, stage, label_width, width, ascii_only) for stage in job.stages]
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True, style="bold", width=label_width, overflow="ellipsis")
    table.add_column(no_wrap=True, overflow="ellipsis")
    for label, value in body:
        table.add_row(_text(label), value)
    pairs, events = _hypotheses(job), _events(job)
    if height:
        room = max(height - len(rows) - len(body), 1)
        events = events[-max(min(room - len(pairs), EVENTS), 1) :]
        pairs = pairs[: max(room - len(events), 0)]
    return [*rows, table, *pairs, *events]


# -- lines ---------------------------------------------------------------------------------------


def _state(job: Job) -> Text:
    line = Text()
    line.append(job.state.name, f"bold {COLORS.get(job.state.name, '')}")
    if job.state.name == "failed":
        line.append_text(_text(f": {job.state.detail}"))
    cells = [f"{lines.clock(job.seconds)} trained"]
    left = job.seconds_left
    if left and job.state.name in ("running", "stopping"):
        cells.append(f"about {lines.clock(left)} left")
    age = job.changed()
    if age is not None and job.state.name != "finished":
        cells.append(f"last line {lines.clock(age)} ago")
    if job.state.name != "failed" and job.state.detail:
        cells.append(one_line(job.state.detail))
    line.append(f"  {' · '.join(cells)}")
    line.no_wrap, line.overflow = True, "ellipsis"
    return line


def _stage(job: Job, stage: Stage, label_width: int, width: int, ascii_only: bool) -> Text:
    """A stage's name, its bar, steps, and the time left while it runs."""
    digits = max((len(f"{s.steps:,}") for s in job.stages), default=0)
    counts = (
        f" {stage.done:>{digits},}/{stage.steps:<{digits},} {math.floor(stage.share * 100):>3}%"
    )
    running = job.state.name in ("running", "stopping") and stage in job.current
    seconds = job.stage_seconds_left(stage) if running else None
    tail = f"  {lines.clock(seconds)} left" if seconds else ""
    name = one_line(stage.name)[:label_width].ljust(label_width)
    size = max(width - len(name) - len(counts) - 16, 4)
    full = math.floor(size * stage.share)
    color = "green" if running else "cyan"
    line = _text(name, "bold" if running else "")
    line.append(" " + ("#" if ascii_only else "━") * full, color)
    line.append(("-" if ascii_only else "─") * (size - full), "bright_black")
    line.append(counts)
    line.append(tail, "bold")
    line.no_wrap, line.overflow = True, "crop"
    return line


def _losses(job: Job, width: int, blocks: str) -> list[tuple[str, Text]]:
    rows = []
    for key, label in lines.LOSSES.items():
        if values := series(job.trained, key):
            line = Text(sparkline(values, width, blocks, log=True), "cyan")
            line.append(f"  {lines.loss(values[0])} → {lines.loss(values[-1])} nats", "default")
            rows.append((label, line))
    if values := series(job.trained, "accuracy"):
        line = Text(sparkline(values, width, blocks), "cyan")
        line.append(f"  {lines.percent(values[-1])}", "default")
        rows.append(("accuracy", line))
    return rows


def _drift(job: Job, width: int, blocks: str) -> list[tuple[str, Text]]:
    rows = []
    values = series(job.metrics.rows, "cka")
    if values:
        threshold = (series(job.metrics.rows, "cka_threshold") or [math.nan])[-1]
        below = values[-1] < threshold
        line = Text(sparkline(values, width, blocks), "cyan")
        sign = "<" if below else "≥"
        line.append(
            f"  CKA {values[-1]:.4f} {sign} {threshold:g}", "yellow" if below else "default"
        )
        measured = f"{len(values)} measurement{'s' * (len(values) > 1)}"
        line.append(f"  ({measured}, lowest {min(values):.4f})", "default")
        rows.append(("drift", line))
    published = [e for e in job.events.rows if e.get("event") == "published"]
    swaps = [e for e in job.events.rows if e.get("event") == "swap"]
    cells = []
    if published:
        cells.append(f"{len(published)} published, the last {published[-1].get('snapshot')}")
    if swaps:
        cells.append(f"{len(swaps)} swapped in, the last {swaps[-1].get('snapshot')}")
    return rows + ([("encoders", _text("; ".join(cells)))] if cells else [])


def _error_rates(job: Job, width: int, blocks: str) -> list[tuple[str, Text]]:
    """Rates of the validation set, by language where it has any; newest and best."""
    evaluated = [e for e in job.events.rows if e.get("event") == "evaluated"]
    keys = dict.fromkeys(key for e in evaluated for key in e)
    rates = {k: v for k in keys if _is_rate(k) and (v := series(evaluated, k))}
    by_language = {k.partition("/")[0] for k in rates if "/" in k}
    rows = []
    for key, values in rates.items():
        name, _, language = key.partition("/")
        if not language and name in by_language:
            continue
        line = Text(sparkline(values, width, blocks), "cyan")
        line.append(f"  {lines.percent(values[-1])}", "default")
        if len(values) > 1:
            line.append(f"  (best {lines.percent(min(values))} of {len(values)})", "default")
        rows.append((f"{lines.ERROR_RATES[name]} {language}".rstrip(), line))
    if values := series(evaluated, "hallucination/flagged"):
        rows.append(("hallucinated", Text(lines.percent(values[-1]))))
    return rows


def _is_rate(key: str) -> bool:
    return key.partition("/")[0] in lines.ERROR_RATES and key.count("/") < 2


def _speed(job: Job, width: int, blocks: str) -> list[tuple[str, Text]]:
    rows, trained = [], job.trained
    values = series(trained, "audio_hours_per_hour")
    if any(values):
        line = Text(sparkline(values, width, blocks), "cyan")
        now = f"{values[-1]:,.1f} hours of audio an hour" if values[-1] else "text without audio"
        line.append(f"  {now}", "default")
        rows.append(("speed", line))
    if not trained:
        return rows
    last, cells = trained[-1], []
    if (seconds := number(last, "step_seconds")) is not None:
        cells.append(f"{lines.duration(seconds)} a step")
    if (share := number(last, "wait_share")) is not None:
        cells.append(f"data wait {lines.percent(share)}")
    rates = [v for key in last if key.startswith("lr_") and (v := number(last, key)) is not None]
    if rates:
        low, high = f"{min(rates):.1e}", f"{max(rates):.1e}"
        cells.append(f"lr {low}" if low == high else f"lr {low}…{high}")
    if (norm := number(last, "grad_norm")) is not None:
        cells.append(f"gradient {lines.loss(norm)}")
    rows.append(("step", Text(" · ".join(cells))))
    if memory := series(trained, "memory_bytes"):
        text = f"{memory[-1] / GB:.2f} GB of the fullest rank, at most {max(memory) / GB:.2f} GB"
        if offloaded := number(last, "offloaded_bytes"):
            text += f" · offloaded {offloaded / GB:.2f} GB"
        rows.append(("memory", Text(text)))
    return rows


def _drops(job: Job) -> list[tuple[str, Text]]:
    rows = []
    for kind, label in (("bad_samples", "dropped"), ("bad_validation_samples", "not scored")):
        if event := job.last_event(kind):
            counts = {k: v for k in event if k not in ("steps", "seconds")
                      and (v := number(event, k)) is not None}  # fmt: skip
            text = ", ".join(f"{cause} {count:,.0f}" for cause, count in counts.items())
            total = sum(counts.values())
            rows.append((label, _text(f"{total:,.0f} samples: {text}", "yellow")))
    return rows


def _hypotheses(job: Job) -> list[Text]:
    """Some references of the newest evaluation, above their hypotheses."""
    shown: list[Text] = []
    for row in hypotheses(job.folder, HYPOTHESES)[:PAIRS]:
        for key, label in (("reference", "said"), ("hypothesis", "heard")):
            line = Text(f"{label:<6}", "bright_black")
            line.append_text(_text(row.get(key) or "–"))
            line.no_wrap, line.overflow = True, "ellipsis"
            shown.append(line)
    return shown


def _events(job: Job) -> list[Text]:
    """The newest events, as the run printed them."""
    return [_event(row, job.steps[1]) for row in job.events.rows[-EVENTS:]]


def _event(row: Row, total: int) -> Text:
    kind = str(row.get("event"))
    fields: Mapping = {k: v for k, v in row.items() if k not in ("event", "seconds")}
    try:
        text = lines.event_line(int(row.get("steps") or 0), total, kind, fields)
    except (KeyError, TypeError, ValueError, AttributeError):  # of another version
        text = f"{kind}  {', '.join(fields)}"
    line = _text(text, "red" if kind in lines.WARNINGS else "bright_black")
    line.no_wrap, line.overflow = True, "ellipsis"
    return line


# -- parts of lines ------------------------------------------------------------------------------


def sparkline(values: Sequence[float], width: int, blocks: str = BLOCKS, log: bool = False) -> str:
    """``values`` as at most ``width`` blocks, each the mean of its share of them.

    ``log``: on a logarithmic scale where all are positive.
    """
    count = min(len(values), width)
    bounds = [i * len(values) // count for i in range(count + 1)]
    means = [math.fsum(values[a:b]) / (b - a) for a, b in pairwise(bounds)]
    if log and min(means) > 0:
        means = [math.log(mean) for mean in means]
    low, high = min(means), max(means)
    if high == low:
        return blocks[len(blocks) // 2 - 1] * count
    last = len(blocks) - 1
    return "".join(blocks[round((mean - low) / (high - low) * last)] for mean in means)


def _text(value: object, style: str = "") -> Text:
    return Text(one_line(str(value)), style)
