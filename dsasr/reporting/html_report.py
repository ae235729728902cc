"""The report of one or more runs: one HTML page that needs no network, and its figures as PNGs.

`run_data` reads run folders, the figures draw, `findings` and `tables` say what was found, and the
template ``page.html.jinja`` puts all of it on the page; it escapes whatever comes from a run.
Figures without data are left out and listed.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dsasr.evaluation import error_analysis
from dsasr.evaluation.error_analysis import WorstResult
from dsasr.evaluation.normalize import check_rules
from dsasr.reporting import course_figures, figures, findings, tables
from dsasr.reporting.page import Figure, figure, render
from dsasr.reporting.run_data import RunData
from dsasr.reporting.tables import Table
from dsasr.utils.io import atomic_write


@dataclass(frozen=True)
class Errors:
    """The errors of one run: tables, and its worst transcripts with their sound."""

    run: str
    tables: list[Table]
    worst: list[tuple[WorstResult, str]]


def draw(runs: Sequence[RunData], out: Path) -> dict[str, Path]:
    """The figures that there is data for: title → PNG."""
    out.mkdir(parents=True, exist_ok=True)
    pictures = {
        f"Course of {run.name}": course_figures.timeline(
            run, out / f"timeline-{_slug(run.name)}.png"
        )
        for run in runs
    }
    for title, function, name in (
        (
            "Errors and hallucinations against training time",
            course_figures.against_time,
            "training",
        ),
        ("Gradients, speed, memory", course_figures.health, "health"),
        ("Drift", figures.cka, "cka"),
        ("Entropy over training", course_figures.over_training, "metrics"),
        ("Before and after joint training", figures.joint, "joint"),
        ("Who resolves what", figures.allocation, "allocation"),
    ):
        pictures[title] = function(runs, out / f"{name}.png")
    return {title: path for title, path in pictures.items() if path is not None}


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)


CAPTIONS = {
    "Course": "Stages of both branches: pretrain trains the encoder by CTC, sft the language model "
    "behind it. A dot is a published encoder, an arrow its swap into the sft branch, with the "
    "trigger; gray lines are such swaps. Learning rates as they were logged. Circles: loss on the "
    "validation set.",
    "Gradients": "Of each log interval. The norm is that of all gradients, before clipping; memory "
    "is the largest of any rank: on a GPU its peak, on a CPU what the process holds.",
    "Drift": "CKA of encoder frames on a fixed set of utterances: 1 where the representation has "
    "not moved. While pretraining, an encoder is published at each measurement below the "
    "threshold, and at the end. It is then the reference, so that CKA begins anew at 1: a line for "
    "each reference.",
    "Entropy over": "Encoder frames of held-out utterances. Low NSE: few directions carry the "
    "variance. PAI: what a linear probe learns about phonemes, a lower bound; CSAI: about words, "
    "beyond the phonemes around: no bound, for it counts phonemes that the probe without the "
    "encoder missed. Below zero: the probe is worse than none. Bands, and the bar of a single "
    "point: 95% bootstrap intervals over utterances. Labels come from the run's own CTC head and "
    "change with it.",
    "Before": "The encoder before joint training and after it. Whiskers: 95% "
    "bootstrap intervals over utterances. None found: the interval reaches zero, or what features "
    "of shuffled frames, or of phonemes alone, give; where a limit is given, a gain of that size "
    "would have been detected.",
    "Who": "Left: held-out frames, linear probes; H(P) is the entropy of the phonemes, H(S|P) "
    "that of the words when the phonemes around are known. Right: what the language model alone "
    "leaves open (H₀, the whole bar), what the audio resolves of it, and what stays open (H₁); no "
    "bar where no language model was measured. random: an encoder of that shape, untrained.",
    "Errors": "During training: error rates on the validation set; hallucinations on the suite "
    "made from a part of it, all noises together. Bands, and the bar of a single point: 95% "
    "intervals over utterances, none for fewer than 8.",
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


def missing(pictures: dict[str, Path]) -> Table | None:
    """The figures for which nothing was measured, and what measures it; None if all are there."""
    rows = [[title, command] for title, command in MEASURED_BY.items() if title not in pictures]
    return Table(["figure", "measured by"], rows, kind="left") if rows else None


def write(runs: Sequence[RunData], out: Path) -> Path:
    """``index.html`` and the PNGs in ``out``; returns the page's path."""
    pictures = draw(runs, out)
    names = [run.name for run in runs]
    page = render(
        "page.html.jinja",
        f"Speech recognition report: {', '.join(names)}",
        names=names,
        findings=[(run.name, findings.sentences(run, rules_of(run))) for run in runs],
        facts=findings.facts(runs),
        systems=tables.systems(runs),
        figures=[_figure(title, path) for title, path in pictures.items()],
        errors=[found for run in runs if (found := _errors(run))],
        examples=tables.examples(runs),
        stages=tables.stages(runs),
        missing=missing(pictures),
        recipes=[(_joined(run, job), text) for run in runs for job, text in run.recipes.items()],
        environments=[
            (_joined(run, job), tables.environment(values))
            for run in runs
            for job, values in run.all_environments.items()
        ],
    )
    path = out / "index.html"
    atomic_write(path, page + "\n")
    return path


def _joined(run: RunData, job: str) -> str:
    return run.name if job == run.name else f"{run.name}, {job}"


def _figure(title: str, path: Path) -> Figure:
    caption = next((text for start, text in CAPTIONS.items() if title.startswith(start)), "")
    return figure(title, path, caption)


def rules_of(run: RunData) -> str:
    """The normalization that the run was scored by, if its file is still there."""
    rules = run.suite.get("evaluated", {}).get("rules") or "standard"
    try:
        check_rules(rules)
    except ValueError:
        return "standard"
    return rules


def _errors(run: RunData) -> Errors | None:
    rules = rules_of(run)
    worst = error_analysis.worst(run.transcripts, rules)
    if not error_analysis.scored(run.transcripts):
        return None
    sounds = {key: base64.b64encode(clip).decode() for key, clip in run.clips.items()}
    confused = tables.confusion_table(run, rules)
    return Errors(
        run.name,
        [*tables.errors_by_group(run, rules), *([confused] if confused else [])],
        [(row, sounds.get(row.result.key, "")) for row in worst],
    )
