"""The report's tables as plain data: heads and cells, which the page's template escapes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dsasr.evaluation.error_analysis import by_group, confusions, duration_group
from dsasr.evaluation.error_rate import FEWEST_FOR_INTERVAL, Scores
from dsasr.evaluation.hallucination import wilson
from dsasr.evaluation.results import Results
from dsasr.reporting.run_data import Row, RunData, audio_hours
from dsasr.tracking.console import clock

NONE = "–"  # what was not measured
RATES = {"word": "WER", "char": "CER", "mixed": "MER"}
TIME = "time, [h:]mm:ss"
SPEAKERS = 10  # with the highest rates


@dataclass(frozen=True)
class Cell:
    """``text``, under it ``small``; ``sort`` is what the column is sorted by (None: the text)."""

    text: str
    small: str = ""
    sort: float | None = None


@dataclass(frozen=True)
class Table:
    """Rows of cells or of plain values under their ``head``.

    ``groups``: names over the head's columns, and how many of them each spans. ``kind``: CSS
    classes. ``note`` stands below.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[Any]]
    groups: Sequence[tuple[str, int]] = ()
    kind: str = ""
    note: str = ""
    title: str = ""

    @property
    def cells(self) -> list[list[Cell]]:
        return [[c if isinstance(c, Cell) else Cell(str(c)) for c in row] for row in self.rows]


SYSTEMS = (
    "Small print: 95% intervals over utterances or clips (bootstrap; of shares of utterances "
    "Wilson's; without any error, the upper bound by the exact rule of three over utterances), "
    f"none for fewer than {FEWEST_FOR_INTERVAL}; one run each, so that they do not "
    "cover other seeds. WER counts words, CER characters, MER words and characters of "
    "code-switched speech; all: every language in its own unit; dB: signal-to-noise ratio. "
    "Hallucinated: utterances with text that was not spoken; noisy: at any ratio. Non-speech: "
    "characters written a minute of noise, music and silence. Audio: the training audio, counted "
    "each time it is used."
)


def systems(runs: Sequence[RunData]) -> Table | None:
    """A row per system: errors with intervals by condition, hallucinations, non-speech, cost."""
    evaluated = [run for run in runs if run.suite]
    if not evaluated:
        return None
    cleans = [run.suite["conditions"].get("clean", {}).get("languages", {}) for run in evaluated]
    units = {lang: row["unit"] for clean in cleans for lang, row in clean.items()}
    conditions = dict.fromkeys(c for run in evaluated for c in run.suite["conditions"])
    noisy = [c for c in conditions if c != "clean"]
    head = ["system", *(f"{lang} {RATES[unit]}, clean" for lang, unit in units.items())]
    head += [f"{'all, ' * (len(units) > 1)}{shown_condition(c)}" for c in noisy]
    groups = [("", 1), ("errors, %", len(head) - 1), ("hallucinated, %", 2)]
    groups += [("non-speech", 1), ("training", 2)]
    head += ["clean", "noisy", "characters a minute", "audio, hours", TIME]
    rows = []
    for run, clean in zip(evaluated, cleans, strict=True):
        row = [run.name, *(rate(clean.get(lang)) for lang in units)]
        row += [rate(run.suite["conditions"].get(c)) for c in noisy]
        cells = run.suite["hallucination"]["rows"]
        row += [share([c for c in cells if c["condition"] == "clean"])]
        row += [share([c for c in cells if c["condition"].startswith("snr")])]
        row += [nonspeech_rate(run.suite["hallucination"])]
        hours = audio_hours(run)
        row += [Cell(_hours(hours), sort=hours), _clock(run.train_seconds)]
        rows.append(row)
    rest = ", ".join(run.name for run in runs if not run.suite)
    note = f" Not evaluated yet by dsasr evaluate … --suite --report: {rest}." if rest else ""
    return Table(head, rows, [g for g in groups if g[1]], "first-left", SYSTEMS + note)


def shown_condition(condition: str) -> str:
    """``5 dB``, ``cut to 50%`` or the name of a sound, with spaces that do not break."""
    for prefix, name in (("snr", "{} dB"), ("cut", "cut to {}%")):
        if condition.startswith(prefix):
            condition = name.format(condition.removeprefix(prefix))
    return condition.replace(" ", "\u00a0")


def _hours(hours: float) -> str:
    return f"{hours:,.{2 if hours < 10 else 1 if hours < 100 else 0}f}"


def _clock(seconds: float) -> Cell:
    return Cell(clock(seconds), sort=seconds)


def rate(row: Row | None) -> Cell:
    """An error rate in percent, with its interval if enough utterances were evaluated for one."""
    low, value, high = (row.get(k) if row else None for k in ("low", "rate", "high"))
    if value is None:
        return Cell(NONE)
    if row["utterances"] < FEWEST_FOR_INTERVAL:
        return Cell(f"{100 * value:.1f}", f"{row['utterances']} utterances", value)
    ends = () if low is None or high is None else (100 * low, 100 * high)
    return _with_interval(100 * value, *ends)


def _with_interval(value: float, *ends: float) -> Cell:
    return Cell(f"{value:.1f}", "…".join(f"{end:.1f}" for end in ends), value)


def share(cells: Sequence[Row]) -> Cell:
    """The share of hallucinated utterances in percent with Wilson's interval."""
    count = sum(c["utterances"] for c in cells)
    if not count:
        return Cell(NONE)
    hits = sum(c["flagged"] for c in cells)
    # Conditions share their utterances: the draws are the utterances of one, in all languages.
    per_condition = Counter()
    for cell in cells:
        per_condition[cell["condition"]] += cell["utterances"]
    draws = max(per_condition.values())
    if draws < FEWEST_FOR_INTERVAL:
        return Cell(f"{100 * hits / count:.1f}", f"{hits} of {count}", hits / count)
    return _with_interval(
        100 * hits / count, *(100 * x for x in wilson(hits / count * draws, draws))
    )


def nonspeech_rate(hallucination: Row) -> Cell:
    """Characters a minute of non-speech; without an interval where none is known."""
    row = hallucination.get("nonspeech", {}).get("all")
    if row is None:
        cells = [c for c in hallucination["rows"] if c["clips"]]
        seconds, characters = (sum(c[k] for c in cells) for k in ("seconds", "characters"))
        return _with_interval(60 * characters / seconds) if seconds else Cell(NONE)
    if not row["clips_with_text"]:
        return Cell("0", f"no text in {int(row['clips'])} clips", 0.0)
    few = row["clips"] < FEWEST_FOR_INTERVAL or row["low"] is None
    return _with_interval(row["rate"], *(() if few else (row["low"], row["high"])))


def stages(runs: Sequence[RunData]) -> Table:
    """The stages of each run, with the encoders that they went on with."""
    rows = []
    for run in runs:
        ends = {e["name"]: e for e in run.events if e["event"] == "stage_end"}
        for stage in run.schedule.stages if run.schedule else ():
            end = ends.get(stage.name)
            trains = ", ".join(f"{part} {peak:g}" for part, peak in stage.trains.items())
            swaps = sum(e["event"] == "swap" and e["stage"] == stage.name for e in run.events)
            steps = Cell(f"{stage.steps:,}", sort=stage.steps)
            seconds = _clock(end["stage_seconds"]) if end else Cell(NONE)
            rows.append([run.name, stage.name, steps, trains, swaps, seconds])
    head = ["run", "stage", "steps", "trains, at the peak learning rate", "swaps", TIME]
    note = "Swaps: how often the stage went on with a newer encoder that pretraining published."
    return Table(head, rows, kind="stages first-left", note=note)


def examples(runs: Sequence[RunData], limit: int = 12) -> Table | None:
    """Hallucinations of each run: one of each kind and condition before a second, equal ones
    once."""
    rows = []
    for run in runs:
        counts: Counter[tuple[str, str]] = Counter()
        ranked: dict[tuple[str, ...], int] = {}
        for e in run.suite.get("hallucination", {}).get("examples", []):
            cells = (e["kind"], e["detail"], e["reference"] or NONE, e["hypothesis"])
            row = (run.name, shown_condition(e["condition"]), *cells)
            if row not in ranked:
                ranked[row] = counts[e["kind"], e["condition"]]
                counts[e["kind"], e["condition"]] += 1
        rows += sorted(ranked, key=ranked.__getitem__)[:limit]
    if not rows:
        return None
    head = ["run", "condition", "kind", "why", "reference", "transcript"]
    note = (
        "Invented: much longer than what was said, and of other words. Loop: the same over and "
        "over. Chat: a refusal, an assistant's phrase or a subtitle's. Burst: many words on end "
        "that were not said. Nonspeech: any text where nobody speaks."
    )
    return Table(head, rows, kind="left", note=note)


def errors_by_group(run: RunData, rules: str) -> list[Table]:
    """Error rates by language, noise, duration and speaker, each where there is more than one."""
    results, tables = run.transcripts, []
    clean = results.scores(rules=rules)
    by_lang = by_group(results, clean, lambda row: row.lang)
    by_duration = by_group(results, clean, duration_group)
    by_speaker = by_group(results, clean, lambda row: row.speaker)
    noisy = [name for name in results.conditions() if name.startswith("snr")]
    compared = same_utterances(results, noisy)
    by_noise = {
        shown_condition(name): scores
        for name in ("clean", *noisy)
        if len(scores := compared.scores(name, rules))
    }
    worst_speakers = sorted(by_speaker, key=lambda name: -by_speaker[name].rate)[:SPEAKERS]
    durations = sorted(by_duration, key=lambda name: int(name.split()[0]))
    for title, name, groups, note in (
        ("By language", "language", dict(sorted(by_lang.items())), ""),
        ("By noise", "noise", by_noise, ""),
        ("By duration", "duration", {name: by_duration[name] for name in durations}, ""),
        ("By speaker", "speaker", {name: by_speaker[name] for name in worst_speakers},
         f"The {SPEAKERS} of {len(by_speaker)} with the most errors a unit."
         if len(by_speaker) > SPEAKERS else ""),
    ):  # fmt: skip
        if len(groups) > 1:
            tables.append(_group_table(title, name, groups, note))
    return tables


def same_utterances(results: Results, conditions: Sequence[str]) -> Results:
    """The rows under ``conditions``, and those of the same recordings as they are."""
    keys = {row.key for row in results.rows if row.condition in conditions}
    wanted = ("clean", *conditions)
    return Results([r for r in results.rows if r.key in keys and r.condition in wanted])


def _group_table(title: str, name: str, groups: dict[str, Scores], note: str) -> Table:
    rows = []
    for group, scores in groups.items():
        counts, interval = scores.counts, scores.interval()
        measured = {"rate": interval.value, "low": interval.low, "high": interval.high}
        kinds = (counts.substitutions, counts.deletions, counts.insertions)
        shares = [_percent_of(kind, counts.reference) for kind in kinds]
        rows.append(
            [group, rate(measured | {"utterances": len(scores)}), *shares, len(scores),
             Cell(f"{counts.reference:,}", sort=counts.reference)]
        )  # fmt: skip
    head = [name, "errors, %", "substituted", "deleted", "inserted", "utterances", "units"]
    return Table(head, rows, kind="first-left", note=note, title=title)


def _percent_of(count: int, total: int) -> Cell:
    return Cell(f"{100 * count / total:.1f}", sort=count / total) if total else Cell(NONE)


def confusion_table(run: RunData, rules: str) -> Table | None:
    """The most frequent errors."""
    rows = [
        [reference or NONE, written or NONE, times]
        for reference, written, times in confusions(run.transcripts, rules)
    ]
    if not rows:
        return None
    note = f"{NONE}: nothing; the unit was left out or added."
    head = ["spoken", "written", "times"]
    return Table(head, rows, kind="pairs", note=note, title="Confusions")


def environment(values: Row) -> Table:
    """Machine, versions and commit, one row each."""
    rows = []
    for name, value in values.items():
        if isinstance(value, dict):
            rows += [[inner, shown] for inner, shown in value.items()]
        else:
            rows.append([name, value])
    return Table(["", ""], rows, kind="left")
