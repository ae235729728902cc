"""What a report has found, in sentences, and the facts that stand at its head."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from dsasr.evaluation.error_analysis import confusions
from dsasr.evaluation.error_rate import FEWEST_FOR_INTERVAL
from dsasr.reporting.run_data import Row, RunData, audio_hours
from dsasr.reporting.tables import NONE, RATES, same_utterances, shown_condition
from dsasr.tracking.console import clock


def sentences(run: RunData, rules: str) -> list[str]:
    """What is to be known of a run, the most important first."""
    found = [_errors(run), _noise(run, rules), _hallucinations(run), _kinds_of_error(run, rules)]
    found += [_left_out(run), _training(run), _loss(run), _problems(run)]
    return [sentence for sentence in found if sentence]


def _errors(run: RunData) -> str:
    clean = run.suite.get("conditions", {}).get("clean")
    if not clean:
        return ""
    parts = [
        f"{RATES[row['unit']]} {_percent(row)} on {lang or 'speech of unnamed language'}"
        for lang, row in clean["languages"].items()
        if row.get("rate") is not None
    ]
    return f"{_joined(parts)}, over {clean['utterances']:,} utterances." if parts else ""


def _percent(row: Row) -> str:
    low, high = row.get("low"), row.get("high")
    value = f"{100 * row['rate']:.1f}%"
    if low is None or high is None or row["utterances"] < FEWEST_FOR_INTERVAL:
        return value
    return f"{value} ({100 * low:.1f} to {100 * high:.1f})"


def _joined(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _noise(run: RunData, rules: str) -> str:
    """The noise with the highest error rate, beside the same utterances without it."""
    rates = {name: row.get("rate") for name, row in run.suite.get("conditions", {}).items()}
    noisy = {name: rate for name, rate in rates.items() if name.startswith("snr") and rate}
    if not noisy:
        return ""
    worst = max(noisy, key=noisy.__getitem__)
    same = same_utterances(run.transcripts, [worst]).scores(rules=rules)
    clean = same.rate if len(same) else rates.get("clean")
    count = run.suite["conditions"][worst]["utterances"]
    compared = "" if clean is None else f", without {100 * clean:.1f}%"
    return (
        f"At {shown_condition(worst)} of noise the error rate is {100 * noisy[worst]:.1f}%"
        f"{compared}, over {count:,} utterances."
    )


def _hallucinations(run: RunData) -> str:
    rows = run.suite.get("hallucination", {}).get("rows", [])
    speech, noisy = ([r for r in rows if is_one(r["condition"])] for is_one in (
        lambda name: name == "clean", lambda name: name.startswith("snr")))  # fmt: skip
    parts = []
    for of_kind, words in ((speech, "utterances"), (noisy, "noisy ones")):
        count = sum(r["utterances"] for r in of_kind)
        if count:
            parts.append(f"{sum(r['flagged'] for r in of_kind):,} of {count:,} {words}")
    found = f"Text that was not spoken: in {_joined(parts)}" if parts else ""
    nonspeech = run.suite.get("hallucination", {}).get("nonspeech", {}).get("all")
    if nonspeech:
        clips = f"{nonspeech['clips_with_text']:,} of {int(nonspeech['clips']):,} clips"
        found = f"{found or 'Text that was not spoken'}, and in {clips} without speech"
    return f"{found}." if found else ""


def _kinds_of_error(run: RunData, rules: str) -> str:
    clean = run.suite.get("conditions", {}).get("clean")
    if not clean:
        return ""
    kinds = {kind: clean[kind] for kind in ("substitutions", "deletions", "insertions")}
    total = sum(kinds.values())
    if not total:
        return "No error at all."
    most = max(kinds, key=kinds.__getitem__)
    found = f"{100 * kinds[most] / total:.0f}% of the {total:,} errors are {most}"
    frequent = [(a, b, n) for a, b, n in confusions(run.transcripts, rules) if n > 1]
    if frequent:
        spoken, written, times = frequent[0]
        words = f"“{written}” for “{spoken}”" if spoken and written else (
            f"“{spoken}” left out" if spoken else f"“{written}” added")  # fmt: skip
        found += f"; the most frequent: {words}, {times} times"
    return f"{found}."


def _left_out(run: RunData) -> str:
    cut = sum(not row.finished for row in run.transcripts.rows)
    left_out = run.suite.get("evaluated", {}).get("left_out") or {}
    parts = []
    if cut:
        parts.append(f"{cut:,} of {len(run.transcripts.rows):,} transcripts cut by the token limit")
    if left_out:
        causes = ", ".join(f"{name} {count:,}" for name, count in left_out.items())
        parts.append(f"{sum(left_out.values()):,} recordings left out ({causes})")
    if not parts:
        return "No transcript was cut, no recording left out." if run.suite.get("evaluated") else ""
    return f"{_joined(parts)}.".capitalize()


def _training(run: RunData) -> str:
    steps = max((m["steps"] for m in run.metrics), default=0)
    if len(run.jobs) > 1:  # each counts its own
        steps = sum(
            max((m["steps"] for m in run.metrics if m["branch"] == branch), default=0)
            for branch in ("pretrain", "sft")
        )
    swaps = sum(e["event"] == "swap" for e in run.events)
    planned = sum(stage.steps for stage in run.schedule.stages) if run.schedule else steps
    done = f"{steps:,} steps" if steps >= planned else f"{steps:,} of {planned:,} steps so far"
    hours = audio_hours(run)
    return (
        f"Trained for {done} on {hours:,.{1 if hours < 100 else 0}f} hours of audio in "
        f"{clock(run.train_seconds)}, with {swaps} encoder swap{'s' * (swaps != 1)}."
    )


def _loss(run: RunData) -> str:
    parts = []
    for branch, name in (("pretrain", "CTC"), ("sft", "transcript")):
        losses = [
            (m["loss"], m["steps"]) for m in run.validation if m["branch"] == branch and "loss" in m
        ]
        if not losses:
            continue
        best, at = min(losses)
        last, step = losses[-1]
        found = f"{name} loss {last:.3g} at step {step:,}, the last measured"
        if len(losses) > 1:
            found += " and the lowest" if last <= best else f" (lowest {best:.3g} at step {at:,})"
        parts.append(found)
    return f"On the validation set: {'; '.join(parts)}." if parts else ""


# Events that a reader has to know of, in words.
_PROBLEMS = {
    "audio_ignored": "evaluation{} at which the loss hardly depended on the audio",
    "ctc_plateau": "evaluation{} at which CTC was on its plateau",
    "refused": "encoder{} refused",
    "evaluation_failed": "evaluation{} failed",
    "checkpoint_failed": "checkpoint{} not saved",
    "publisher_lost": "wait{} for a publisher that was lost",
}


def _problems(run: RunData) -> str:
    counts = Counter(e["event"] for e in run.events)
    parts = [
        f"{counts[kind]} {words.format('s' * (counts[kind] != 1))}"
        for kind, words in _PROBLEMS.items()
        if counts[kind]
    ]
    dropped = [e for e in run.events if e["event"] == "bad_samples"]
    if dropped:
        causes = {
            k: v for k, v in dropped[-1].items() if k not in ("event", "seconds", "steps") and v
        }
        shown = ", ".join(f"{name} {count:,}" for name, count in causes.items())
        if causes:
            parts.append(f"{sum(causes.values()):,} training samples dropped ({shown})")
    return f"Problems: {_joined(parts)}." if parts else ""


def facts(runs: Sequence[RunData]) -> list[tuple[str, list[str]]]:
    """(name, its value for each run): what was evaluated, by what, when and where."""
    names = (
        "test set", "utterances", "checkpoint", "evaluated", "recipe", "seed", "commit", "hardware",
    )  # fmt: skip
    columns = [_facts(run) for run in runs]
    rows = [(name, [column[name] for column in columns]) for name in names]
    return [(name, values) for name, values in rows if set(values) != {NONE}]


def _facts(run: RunData) -> dict[str, str]:
    evaluated: Row = run.suite.get("evaluated", {})
    trained: Row = next(reversed(run.environments.values()), {})
    data = run.suite.get("data")
    commits = dict.fromkeys(
        c for c in (trained.get("commit"), evaluated.get("commit")) if c and c != "unknown"
    )
    machines = dict.fromkeys(x for x in (_hardware(trained), _hardware(evaluated)) if x)
    return {
        "test set": _text(", ".join(data) if isinstance(data, list) else data),
        "utterances": _text(evaluated.get("recordings")),
        "checkpoint": _text(evaluated.get("checkpoint")),
        "evaluated": _text(_time(evaluated.get("time") or "")),
        "recipe": _text(_recipe_line(run)),
        "seed": _text(run.seed),
        "commit": _text(" (training), ".join(commits) + " (evaluation)" * (len(commits) > 1)),
        "hardware": _text("; evaluated on ".join(machines)),
    }  # fmt: skip


def _time(iso: str) -> str:
    return iso.replace("T", " ").replace("+00:00", " UTC")


def _recipe_line(run: RunData) -> str:
    stages = run.schedule.stages if run.schedule else ()
    return " → ".join(f"{stage.name} {stage.steps:,}" for stage in stages)


def _hardware(environment: Row) -> str:
    if not environment:
        return ""
    gpus, cores = environment.get("gpus") or 0, environment.get("cores")
    ranks = environment.get("ranks")
    count = f"{gpus} × " if gpus > 1 else ""
    size = "" if gpus else f", {cores} cores"
    return f"{count}{environment.get('machine', '')}{size}{f', {ranks} ranks' if ranks else ''}"


def _text(value: Any) -> str:
    return NONE if value in (None, "") else f"{value:,}" if isinstance(value, int) else str(value)
