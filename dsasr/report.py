"""The report of one or more runs: one HTML page that needs no network, and its pictures as PNGs.

`dsasr.run_data` reads run folders, `dsasr.figures` draws, `write` puts both on the page. What a run
has not measured is left out and named.
"""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from dsasr import figures
from dsasr.files import atomic_write
from dsasr.monitor import clock
from dsasr.pictures import DPI
from dsasr.run_data import Row, RunData, audio_hours

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #2b2b2b; background: #fff;
       max-width: 1080px; margin: 2.2em auto; padding: 0 1.4em; }
h1 { font-size: 1.6em; margin-bottom: .1em; } h2 { font-size: 1.15em; margin: 2.2em 0 .3em; }
p, figcaption { color: #555; max-width: 50em; } figure { margin: .6em 0 1.4em; }
img { max-width: 100%; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9em; font-variant-numeric: tabular-nums; }
th, td { padding: .35em .6em; text-align: right; border-bottom: 1px solid #e6e6e6; }
th[colspan] { border: none; padding-bottom: 0; font-weight: 400; color: #777;
              text-align: center; }
th { font-weight: 600; border-bottom: 1.5px solid #999; vertical-align: bottom; }
td:first-child, th:first-child { text-align: left; white-space: nowrap; }
td small { color: #777; display: block; white-space: nowrap; }
.left td, .left th { text-align: left; vertical-align: top; }
""".strip()


def draw(runs: Sequence[RunData], out: Path) -> dict[str, Path]:
    """The pictures that there is data for: title → PNG."""
    out.mkdir(parents=True, exist_ok=True)
    made = {
        f"Course of {run.name}": figures.timeline(run, out / f"timeline-{_slug(run.name)}.png")
        for run in runs
    }
    for title, function, name in (
        ("Drift", figures.cka, "cka"),
        ("Entropy over training", figures.over_training, "metrics"),
        ("Before and after joint training", figures.joint, "joint"),
        ("Who resolves what", figures.allocation, "allocation"),
        ("Errors and hallucinations against training time", figures.against_time, "training"),
    ):
        made[title] = function(runs, out / f"{name}.png")
    return {title: path for title, path in made.items() if path is not None}


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)


CAPTIONS = {
    "Course": "Stages of both branches. A dot is a published encoder, an arrow its way into the "
    "sft branch; grey lines are swaps.",
    "Drift": "CKA of encoder frames on a fixed set of utterances. Low: the representation moved.",
    "Entropy over": "Encoder frames of held-out utterances. Low NSE: few directions carry the "
    "variance. PAI: what a linear reader finds about phonemes; CSAI: about words, beyond the "
    "phonemes around. Bands: 95% bootstrap intervals over utterances. Labels come from the run's "
    "own CTC head and change with it.",
    "Before": "The encoder that joint training began with, and what it made of it. Whiskers: 95%.",
    "Who": "Left: held-out frames, linear readers. Right: what the language model alone leaves "
    "open (H₀, the whole bar), what the audio resolves of it, and what stays open.",
    "Errors": "On the validation set while training.",
}


# What makes a picture that is not there.
MAKERS = {
    "Drift": "a schedule with drift measurements",
    "Entropy over training": "training with allocation.every=STEPS",
    "Before and after joint training": "tools/allocation.py RUN/snapshots/encoder-* RUN --data …, "
    "or training with allocation.every=STEPS",
    "Who resolves what": "tools/allocation.py RUN/snapshots/encoder-* RUN --data …",
    "Errors and hallucinations against training time": "training with evaluation.every=STEPS",
}


def missing(pictures: dict[str, Path]) -> str:
    """The pictures for which nothing was measured, and what measures it; empty if none."""
    rows = [[title, escape(maker)] for title, maker in MAKERS.items() if title not in pictures]
    if not rows:
        return ""
    return f"<h2>Not measured</h2>{_table(['picture', 'made by'], rows, 'left')}"


def write(runs: Sequence[RunData], out: Path) -> Path:
    """``index.html`` and the PNGs in ``out``; returns the page's path."""
    pictures = draw(runs, out)
    names = ", ".join(run.name for run in runs)
    parts = [f"<h1>Entropy allocation</h1><p>{escape(names)}</p>"]
    table = systems(runs)
    if table:
        parts.append(f"<h2>Systems</h2>{table}")
    else:
        parts.append(
            "<p>No system has been tried yet: tools/evaluate.py RUN … --suite --report.</p>"
        )
    for title, path in pictures.items():
        caption = next((text for start, text in CAPTIONS.items() if title.startswith(start)), "")
        data = path.read_bytes()
        # An inch is an inch in every picture, so that their letters are of one size.
        width = 96 * int.from_bytes(data[16:20], "big") // DPI
        parts.append(
            f'<h2>{escape(title)}</h2><figure><img alt="{escape(title)}" width="{width}" '
            f'src="data:image/png;base64,{base64.b64encode(data).decode()}">'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
        )
    parts += [missing(pictures), stages(runs), examples(runs)]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(names)}</title><style>{STYLE}</style></head><body>"
        + "\n".join(parts)
        + "</body></html>\n"
    )
    path = out / "index.html"
    atomic_write(path, page)
    return path


# -- tables ------------------------------------------------------------------------------------


def systems(runs: Sequence[RunData]) -> str:
    """A row per system: errors with intervals by condition, hallucinations, non-speech."""
    tried = [run for run in runs if run.trial.get("conditions")]
    if not tried:
        return ""
    conditions = list(dict.fromkeys(c for run in tried for c in run.trial["conditions"]))
    langs = list(
        dict.fromkeys(lang for r in tried for lang in r.trial["conditions"]["clean"]["languages"])
    )
    noisy = [_said(c) for c in conditions if c != "clean"]
    head = ["system", *(f"{escape(lang)}, clean" for lang in langs), *noisy]
    groups = [("", 1), ("errors, %", len(head) - 1), ("hallucinated, %", 2)]
    groups += [("non-speech", 1), ("cost", 2)]
    head += ["clean", "noisy", "characters/min", "audio hours", "time"]
    rows = []
    for run in tried:
        held = run.trial["conditions"]
        clean = held["clean"]["languages"]
        row = [escape(run.name), *(_span(clean.get(lang)) for lang in langs)]
        row += [_span(held.get(c)) for c in conditions if c != "clean"]
        cells = run.trial["hallucination"]["rows"]
        row += [_share([c for c in cells if c["condition"] == "clean"])]
        row += [_share([c for c in cells if c["condition"].startswith("snr")])]
        row += [_pace([c for c in cells if c["clips"]])]
        row += [f"{audio_hours(run):.2f}", clock(run.longest)]
        rows.append(row)
    return (
        _table(head, rows, groups=groups)
        + "<p>Small print: 95% intervals (bootstrap, Wilson). One run each.</p>"
    )


def _said(condition: str) -> str:
    return f"{condition[3:]} dB" if condition.startswith("snr") else escape(condition)


def _span(held: Row | None) -> str:
    if not held:
        return "–"
    low, value, high = (100 * held[k] for k in ("low", "rate", "high"))
    return f"{value:.1f}<small>{low:.1f}…{high:.1f}</small>"


def _share(cells: Sequence[Row]) -> str:
    from dsasr.evaluation.hallucination import wilson

    count = sum(c["utterances"] for c in cells)
    if not count:
        return "–"
    hits = sum(c["flagged"] for c in cells)
    # The same utterances in each condition, so as many draws as one condition has in all languages.
    heard = Counter()
    for cell in cells:
        heard[cell["condition"]] += cell["utterances"]
    draws = max(heard.values())
    low, high = (100 * x for x in wilson(hits / count * draws, draws))
    return f"{100 * hits / count:.1f}<small>{low:.1f}…{high:.1f}</small>"


def _pace(cells: Sequence[Row]) -> str:
    seconds = sum(c["seconds"] for c in cells)
    return f"{60 * sum(c['characters'] for c in cells) / seconds:.0f}" if seconds else "–"


def stages(runs: Sequence[RunData]) -> str:
    rows = []
    for run in runs:
        ends = {e["name"]: e for e in run.events if e["event"] == "stage_end"}
        for stage in run.schedule.stages if run.schedule else ():
            end = ends.get(stage.name)
            spent = clock(end["stage_seconds"]) if end else "–"
            trains = ", ".join(f"{part} {rate:g}" for part, rate in stage.trains.items())
            swaps = sum(e["event"] == "swap" and e["stage"] == stage.name for e in run.events)
            rows.append(
                [escape(run.name), stage.name, f"{stage.steps:,}", escape(trains), swaps, spent]
            )
    head = ["run", "stage", "steps", "trains, highest rate", "encoders taken", "time"]
    return f"<h2>Stages</h2>{_table(head, rows)}"


def examples(runs: Sequence[RunData], most: int = 12) -> str:
    rows = []
    for run in runs:
        held = run.trial.get("hallucination", {}).get("examples", [])
        first: dict[tuple[str, str], int] = {}  # one of each kind and condition before a second
        for e in held:
            e["again"] = first[e["kind"], e["condition"]] = (
                first.get((e["kind"], e["condition"]), -1) + 1
            )
        for e in sorted(held, key=lambda e: e["again"])[:most]:
            cells = (run.name, e["kind"], e["condition"], e["reference"] or "–", e["hypothesis"])
            rows.append([escape(cell) for cell in cells])
    if not rows:
        return ""
    head = ["run", "kind", "condition", "reference", "transcript"]
    return f"<h2>Hallucinations, examples</h2>{_table(head, rows, 'left')}"


def _table(
    head: Sequence[Any],
    rows: Sequence[Sequence[Any]],
    kind: str = "",
    groups: Sequence[tuple[str, int]] = (),
) -> str:
    """``groups``: names over the head's columns, and how many of them each spans."""
    over = "".join(f'<th colspan="{n}">{name}</th>' for name, n in groups)
    top = "".join(f"<th>{cell}</th>" for cell in head)
    if over:
        top = f"{over}</tr><tr>{top}"
    body = "".join("<tr>" + "".join(f"<td>{c}</td>" for c in row) + "</tr>" for row in rows)
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{top}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
