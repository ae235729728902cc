"""The report of one or more runs: one HTML page that needs no network, and its figures as PNGs.

`run_data` reads run folders, `figures` draws, `write` puts both on the page. Figures without data
are left out and listed.
"""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from dsasr.reporting import figures
from dsasr.reporting.run_data import Row, RunData, audio_hours
from dsasr.tracking.console import clock
from dsasr.tracking.timeline_plot import DPI
from dsasr.utils.io import atomic_write

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #2b2b2b; background: #fff;
       max-width: 1160px; margin: 2.2em auto; padding: 0 1.4em; }
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
.stages :is(td, th):is(:nth-child(2), :nth-child(4)) { text-align: left; }
""".strip()


def draw(runs: Sequence[RunData], out: Path) -> dict[str, Path]:
    """The figures that there is data for: title → PNG."""
    out.mkdir(parents=True, exist_ok=True)
    pictures = {
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
        pictures[title] = function(runs, out / f"{name}.png")
    return {title: path for title, path in pictures.items() if path is not None}


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)


CAPTIONS = {
    "Course": "Stages of both branches: pretrain trains the encoder by CTC, sft the language model "
    "behind it. A dot is a published encoder, an arrow its swap into the sft branch, with the "
    "trigger; gray lines are such swaps.",
    "Drift": "CKA of encoder frames on a fixed set of utterances: 1 where the representation has "
    "not moved. Left: at each measurement below the threshold an encoder is published.",
    "Entropy over": "Encoder frames of held-out utterances. Low NSE: few directions carry the "
    "variance. PAI: what a linear probe learns about phonemes, a lower bound; CSAI: about words, "
    "beyond the phonemes around: no bound, for it counts phonemes that the probe without the "
    "encoder missed. Below zero: the probe is worse than none. Bands: 95% bootstrap intervals "
    "over utterances. Labels come from the run's own CTC head and change with it.",
    "Before": "The encoder before joint training and after it. Whiskers: 95% "
    "bootstrap intervals over utterances. None found: the interval reaches zero, or what features "
    "of shuffled frames, or of phonemes alone, give; where a limit is given, a gain of that size "
    "would have been detected.",
    "Who": "Left: held-out frames, linear probes; H(P) is the entropy of the phonemes, H(S|P) "
    "that of the words when the phonemes around are known. Right: what the language model alone "
    "leaves open (H₀, the whole bar), what the audio resolves of it, and what stays open (H₁); no "
    "bar where no language model was measured. random: an encoder of that shape, untrained.",
    "Errors": "During training: error rates on the validation set; hallucinations on the suite "
    "made from a part of it, all noises together.",
}


# Per figure, the command that measures its data.
MEASURED_BY = {
    "Drift": "a schedule with drift measurements",
    "Entropy over training": "training with probe.every=STEPS",
    "Before and after joint training": "dsasr probe RUN/snapshots/encoder-* RUN --data … "
    "(of a concurrent run RUN/sft), or training with probe.every=STEPS",
    "Who resolves what": "dsasr probe RUN/snapshots/encoder-* RUN --data … (or RUN/sft)",
    "Errors and hallucinations against training time": "training with evaluation.every=STEPS",
}


def missing(pictures: dict[str, Path]) -> str:
    """The figures for which nothing was measured, and what measures it; empty if none."""
    rows = [[title, command] for title, command in MEASURED_BY.items() if title not in pictures]
    if not rows:
        return ""
    return f"<h2>Not measured</h2>{_table(['figure', 'measured by'], rows, 'left')}"


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
            "<p>No system has been evaluated yet: dsasr evaluate RUN … --suite --report.</p>"
        )
    for title, path in pictures.items():
        caption = next((text for start, text in CAPTIONS.items() if title.startswith(start)), "")
        data = path.read_bytes()
        # Every figure at its size in inches, so that their text has one size.
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
    """A row per system: errors with intervals by condition, hallucinations, non-speech, cost."""
    evaluated = [run for run in runs if run.suite]
    if not evaluated:
        return ""
    cleans = [run.suite["conditions"].get("clean", {}).get("languages", {}) for run in evaluated]
    units = {lang: row["unit"] for clean in cleans for lang, row in clean.items()}
    conditions = dict.fromkeys(c for run in evaluated for c in run.suite["conditions"])
    noisy = [c for c in conditions if c != "clean"]
    head = ["system", *(f"{lang} {RATES[unit]}, clean" for lang, unit in units.items())]
    head += [Html(f"{'all, ' * (len(units) > 1)}{_condition_name(c)}") for c in noisy]
    groups = [("", 1), ("errors, %", len(head) - 1), ("hallucinated, %", 2)]
    groups += [("non-speech", 1), ("training", 2)]
    head += ["clean", "noisy", "characters a minute", "audio, hours", TIME]
    rows = []
    for run, clean in zip(evaluated, cleans, strict=True):
        row = [run.name, *(_rate(clean.get(lang)) for lang in units)]
        row += [_rate(run.suite["conditions"].get(c)) for c in noisy]
        cells = run.suite["hallucination"]["rows"]
        row += [_share([c for c in cells if c["condition"] == "clean"])]
        row += [_share([c for c in cells if c["condition"].startswith("snr")])]
        row += [_nonspeech_rate(run.suite["hallucination"])]
        row += [_hours(audio_hours(run)), clock(run.train_seconds)]
        rows.append(row)
    rest = ", ".join(escape(run.name) for run in runs if not run.suite)
    note = f" Not evaluated yet by dsasr evaluate … --suite --report: {rest}." if rest else ""
    table = _table(head, rows, groups=[g for g in groups if g[1]])
    return f"{table}<p>{escape(SYSTEMS)}{note}</p>"


RATES = {"word": "WER", "char": "CER", "mixed": "MER"}
TIME = "time, [h:]mm:ss"
SYSTEMS = (
    "Small print: 95% intervals over utterances or clips (bootstrap; of shares of utterances "
    "Wilson's); one run each, so that they do not cover other seeds. WER counts words, CER "
    "characters, MER words and characters of code-switched speech; all: every language in its own "
    "unit; dB: signal-to-noise ratio. Hallucinated: utterances with text that was not spoken; "
    "noisy: at any ratio. Non-speech: characters written a minute of noise, music and silence. "
    "Audio: the training audio, counted each time it is used."
)


def _condition_name(condition: str) -> Html:
    for prefix, name in (("snr", "{} dB"), ("cut", "cut to {}%")):
        if condition.startswith(prefix):
            condition = name.format(condition.removeprefix(prefix))
    return Html(escape(condition).replace(" ", "&nbsp;"))


def _hours(hours: float) -> str:
    return f"{hours:,.{2 if hours < 10 else 1 if hours < 100 else 0}f}"


def _rate(row: Row | None) -> str:
    """An error rate in percent with its interval."""
    low, value, high = (row.get(k) if row else None for k in ("low", "rate", "high"))
    if value is None:
        return "–"
    interval = () if low is None or high is None else (100 * low, 100 * high)
    return _with_interval(100 * value, *interval)


def _with_interval(value: float, *interval: float) -> str:
    small = f"<small>{'…'.join(f'{end:.1f}' for end in interval)}</small>" if interval else ""
    return Html(f"{value:.1f}{small}")


def _share(cells: Sequence[Row]) -> str:
    """The share of hallucinated utterances in percent with Wilson's interval."""
    from dsasr.evaluation.hallucination import wilson

    count = sum(c["utterances"] for c in cells)
    if not count:
        return "–"
    hits = sum(c["flagged"] for c in cells)
    # Conditions share their utterances: the draws are the utterances of one, in all languages.
    per_condition = Counter()
    for cell in cells:
        per_condition[cell["condition"]] += cell["utterances"]
    draws = max(per_condition.values())
    low, high = (100 * x for x in wilson(hits / count * draws, draws))
    return _with_interval(100 * hits / count, low, high)


def _nonspeech_rate(hallucination: Row) -> str:
    """Characters a minute of non-speech; without an interval where none is known."""
    row = hallucination.get("nonspeech", {}).get("all")
    if row is None:
        cells = [c for c in hallucination["rows"] if c["clips"]]
        seconds, characters = (sum(c[k] for c in cells) for k in ("seconds", "characters"))
        return _with_interval(60 * characters / seconds) if seconds else "–"
    if not row["clips_with_text"]:
        return Html(f"0<small>no text in {int(row['clips'])} clips</small>")
    return _with_interval(row["rate"], *(() if row["low"] is None else (row["low"], row["high"])))


def stages(runs: Sequence[RunData]) -> str:
    rows = []
    for run in runs:
        ends = {e["name"]: e for e in run.events if e["event"] == "stage_end"}
        for stage in run.schedule.stages if run.schedule else ():
            end = ends.get(stage.name)
            seconds = clock(end["stage_seconds"]) if end else "–"
            trains = ", ".join(f"{part} {rate:g}" for part, rate in stage.trains.items())
            swaps = sum(e["event"] == "swap" and e["stage"] == stage.name for e in run.events)
            rows.append([run.name, stage.name, f"{stage.steps:,}", trains, swaps, seconds])
    head = ["run", "stage", "steps", "trains, at the peak learning rate", "swaps", TIME]
    note = "Swaps: how often the stage went on with a newer encoder that pretraining published."
    return f"<h2>Stages</h2>{_table(head, rows, 'stages')}<p>{note}</p>"


def examples(runs: Sequence[RunData], limit: int = 12) -> str:
    """Hallucinations of each run: one of each kind and condition before a second."""
    rows = []
    for run in runs:
        counts: Counter[tuple[str, str]] = Counter()
        ranked = []
        for e in run.suite.get("hallucination", {}).get("examples", []):
            ranked.append((counts[e["kind"], e["condition"]], e))
            counts[e["kind"], e["condition"]] += 1
        for _, e in sorted(ranked, key=lambda pair: pair[0])[:limit]:
            cells = (e["kind"], e["detail"], e["reference"] or "–", e["hypothesis"])
            rows.append([run.name, _condition_name(e["condition"]), *cells])
    if not rows:
        return ""
    head = ["run", "condition", "kind", "why", "reference", "transcript"]
    return (
        f"<h2>Hallucinations, examples</h2>{_table(head, rows, 'left')}<p>Invented: much longer "
        "than what was said, and of other words. Loop: the same over and over. Chat: a refusal, an "
        "assistant's phrase or a subtitle's. Burst: many words on end that were not said. "
        "Nonspeech: any text where nobody speaks.</p>"
    )


class Html(str):
    """Text that is markup: all other text is escaped in tables."""


def _html(cell: Any) -> str:
    return cell if isinstance(cell, Html) else escape(str(cell))


def _table(
    head: Sequence[Any],
    rows: Sequence[Sequence[Any]],
    kind: str = "",
    groups: Sequence[tuple[str, int]] = (),
) -> str:
    """``groups``: names over the head's columns, and how many of them each spans."""
    over = "".join(f'<th colspan="{n}">{_html(name)}</th>' for name, n in groups)
    top = "".join(f"<th>{_html(cell)}</th>" for cell in head)
    if over:
        top = f"{over}</tr><tr>{top}"
    body = "".join("<tr>" + "".join(f"<td>{_html(c)}</td>" for c in row) + "</tr>" for row in rows)
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{top}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
