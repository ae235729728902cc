"""Error rates, hallucinations and paired tests as lines of text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dsasr.evaluation.doubt import MEANING
from dsasr.evaluation.hallucination import KINDS
from dsasr.evaluation.normalize import BY_SCRIPT
from dsasr.evaluation.results import Results
from dsasr.utils.troubleshooting import see

UNITS = {"word": "words", "char": "characters", "mixed": "words and characters"}


def _percent(rate: float | None) -> str:
    """A fraction in percent; "–" for a rate that does not exist."""
    return "–" if rate is None else f"{100 * rate:.2f}"


def _nonspeech(row: Mapping[str, Any]) -> str:
    """One row of `Results.nonspeech_rates` in words."""
    if not row["clips_with_text"]:
        return f"0 characters a minute of non-speech (no text in {row['clips']} clips)"
    span = "" if row["low"] is None else f" ({row['low']:.1f}…{row['high']:.1f})"
    rate = f"{row['rate']:.1f} characters a minute of non-speech{span}"
    return f"{rate}, text in {row['clips_with_text']} of {row['clips']} clips"


def format_results(results: Results, summary: Mapping[str, Any], pairs: int) -> Iterator[str]:
    """Error rates and hallucinations by condition, and ``pairs`` transcripts."""
    for condition, part in summary["conditions"].items():
        for lang, row in part["languages"].items():
            yield (
                f"{condition:>9} {lang:>6}: {_percent(row['rate']):>6}% errors "
                f"({_percent(row['low'])}…{_percent(row['high'])}) of {row['units']} "
                f"{UNITS[row['unit']]}: {row['substitutions']} sub, {row['deletions']} del, "
                f"{row['insertions']} ins"
            )
    parts = [part["languages"] for part in summary["conditions"].values()]
    units = {lang: UNITS[row["unit"]] for part in parts for lang, row in part.items()}
    if guessed := sorted(lang for lang in units if not lang or lang.endswith(BY_SCRIPT))[::-1]:
        told = ", ".join(f"{lang or 'other text'} in {units[lang]}" for lang in guessed)
        yield (
            f"no language is given for some utterances: their script decides, {told}; pack with "
            "--lang to say which it is"
        )
    for row in summary["hallucination"]["rows"]:
        where = f"{row['condition']:>9} {row['lang']:>6}"
        if row["utterances"]:
            kinds = ", ".join(f"{row[k]} {k}" for k in KINDS)
            yield f"{where}: {row['flagged']} of {row['utterances']} hallucinated ({kinds})"
    flagged = [row for row in summary["hallucination"]["rows"] if row["utterances"]]
    if any(row["loop"] for row in flagged):
        yield f"{'':>9} {'':>6}  loops{see('loops')}"
    if any(row["chat"] for row in flagged):
        yield f"{'':>9} {'':>6}  chat{see('refusals')}"
    for condition, row in summary["hallucination"]["nonspeech"].items():
        yield f"{condition:>9} {'':>6}: {_nonspeech(row)}"
    if summary["cut"]:
        counts = ", ".join(f"{count} {condition}" for condition, count in summary["cut"].items())
        total = sum(summary["cut"].values())
        line = f"{total} of {len(results.rows)} transcripts cut at the token limit ({counts})"
        yield f"{line}{see('cut')}"
    yield from _doubts(summary.get("doubt", {}))
    for example in summary["hallucination"]["examples"][:pairs]:
        head = f"{example['kind']} ({example['condition']}, {example['detail']})"
        yield f"  {head}\n    ref  {example['reference']}\n    hyp  {example['hypothesis']}"
    clean = [row for row in results.rows if row.condition == "clean"]
    for row in clean[:: max(len(clean) // max(pairs, 1), 1)][:pairs]:
        yield f"  ref  {row.reference}\n  hyp  {row.hypothesis}"


def _doubts(counts: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    for condition, row in counts.items():
        if not row["doubtful"]:
            continue
        kinds = ", ".join(f"{row[kind]} {kind}" for kind in MEANING if kind in row)
        yield (
            f"{condition:>9} {'':>6}: {row['doubtful']} of {row['transcripts']} in doubt "
            f"({kinds}), {row['wrong_doubtful']} of the {row['wrong']} that are wrong"
        )


def format_comparison(tests: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    """The paired tests of `compare`, one line per condition."""
    for condition, row in tests.items():
        line = f"{condition:>9}: hallucinated {row['flagged_b']:.0f} to {row['flagged_a']:.0f}"
        line += f", p {row['flagged_p']:.3f}"
        if "difference" in row:
            span = f"{100 * row['low']:+.2f}…{100 * row['high']:+.2f}"
            line += f"; errors {100 * row['difference']:+.2f} ({span}), p {row['p_value']:.3f}"
        if "characters_difference" in row:
            span = f"{row['characters_low']:+.1f}…{row['characters_high']:+.1f}"
            line += f"; characters/min {row['characters_difference']:+.1f} ({span})"
            line += f", p {row['characters_p_value']:.3f}"
        yield line
