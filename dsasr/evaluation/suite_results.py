"""A recognizer on trial: clean, noisy, cut and speechless audio, with every transcript kept.

`cases` says what is played, `hear` decodes it, `Trials` holds the rows and sums them up: error
rates with intervals, hallucinations, each by language and condition; `compare` is the paired test
of two systems on the same cases. Rows are JSON lines, so that a set can be summed up again later.

A condition is ``clean``, ``snr20``…, ``cut50``… (percent kept), a made sound's name, or
``recorded``: non-speech that the shards hold (samples without text).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsasr.data.audio.features import Cmvn, FbankConfig
from dsasr.evaluation.decode import DecodeConfig, Decodes, decode
from dsasr.evaluation.error_rate import (
    PairedTest,
    Scores,
    paired_ratios,
    paired_test,
    ratio_interval,
)
from dsasr.evaluation.eval_sets import Recording, batches, empty_batch
from dsasr.evaluation.hallucination import HallucinationConfig, HallucinationReport, flags, written
from dsasr.evaluation.suite import Case, SuiteConfig, Utterance, best_prefix, kept, suite
from dsasr.model.speech_llm import SpeechLLM
from dsasr.utils.errors import UserError
from dsasr.utils.io import nonfinite_to_none, read_lines, to_json

PLAIN = SuiteConfig(nonspeech=(), snrs=(), truncations=())  # the recordings as they are
RECORDED = "recorded"
ALL, NONSPEECH = "all", "nonspeech"  # of several conditions: no condition's name


@dataclass(frozen=True)
class Trial:
    """One clip's transcript; ``reference`` is None for non-speech, ``entropy`` the mean predictive
    entropy of its tokens in nats (None: not finite), ``finished`` False where the token limit cut
    it."""

    key: str
    condition: str
    lang: str
    reference: str | None
    hypothesis: str
    seconds: float
    entropy: float | None
    finished: bool


def cases(
    recordings: Sequence[Recording], config: SuiteConfig = PLAIN, *, rate: int = 16000
) -> list[Case]:
    """The suite's cases made of ``recordings``; those without text are played as they are.

    Without speech there is no babble to be made, and it is left out.
    """
    speech = [Utterance(r.key, r.wave, r.text, r.lang) for r in recordings if r.text]
    if not speech:
        kinds = tuple(kind for kind in config.nonspeech if kind != "babble")
        config = replace(config, nonspeech=kinds)
    found = list(suite(speech, config, rate=rate))
    found += [
        Case(r.key, RECORDED, r.wave, None, r.lang, r.seconds(rate))
        for r in recordings
        if not r.text
    ]
    return found


def hear(
    model: SpeechLLM,
    played: Sequence[Case],
    tokenizer: Decodes,
    config: DecodeConfig,
    *,
    fbank: FbankConfig,
    cmvn: Cmvn,
    device: torch.device,
    frames: int = 8000,
    rank: int = 0,
    world: int = 1,
    any_rank: Callable[[bool], bool] = bool,
    gather: Callable[[Any], list[Any]] = lambda value: [value],
    progress: Callable[[Iterable], Iterable] = lambda items: items,
) -> Trials:
    """Decode ``played``, the same on every rank, which share it; all rows, on every rank."""
    own = {str(i): played[i] for i in range(rank, len(played), world)}
    held = [
        Recording(name, case.wave, case.text or "", case.lang, "") for name, case in own.items()
    ]
    made = list(batches(held, fbank_config=fbank, cmvn=cmvn, tokenizer=tokenizer, frames=frames))
    most = max(gather(len(made)))
    made += [empty_batch(fbank, tokenizer.pad_id)] * (most - len(made))
    rows: list[tuple[int, dict]] = []
    for batch in progress(made):
        for found in decode(model, batch.to(device), tokenizer, config, any_rank):
            case, entropies = own[found.key], found.token_entropies
            row = Trial(
                case.key, case.condition, case.lang, case.text, found.text, case.seconds,
                sum(entropies) / max(len(entropies), 1), found.finished,
            )  # fmt: skip
            rows.append((int(found.key), asdict(row)))
    merged = sorted((row for part in gather(rows) for row in part), key=lambda row: row[0])
    return Trials([Trial(**row) for _, row in merged])


@dataclass
class Trials:
    """The rows of a system, in the order of the cases."""

    rows: list[Trial] = field(default_factory=list)

    def conditions(self) -> list[str]:
        """In the order in which they were played."""
        return list(dict.fromkeys(row.condition for row in self.rows))

    def scores(self, condition: str = "clean", rules: str = "standard") -> Scores:
        """Error rates under a condition. Cut speech has none: what was spoken is not known."""
        found = Scores(rules=rules)
        for row in self.rows:
            if row.condition == condition and row.reference and kept(condition) is None:
                found.add(row.reference, row.hypothesis, row.lang, row.key)
        return found

    def hallucinations(self, config: HallucinationConfig | None = None) -> HallucinationReport:
        """Counts and examples by language and condition."""
        report = HallucinationReport(config or HallucinationConfig())
        for row in self.rows:
            named = {"condition": row.condition, "key": row.key}
            if row.reference is None:
                report.add_nonspeech(row.hypothesis, row.seconds, row.lang, **named)
            else:
                report.add(_spoken(row), row.hypothesis, row.lang, **named)
        return report

    def summary(self, rules: str = "standard") -> dict[str, Any]:
        """JSON-able: rates in fractions with 95% intervals by condition and language; counts.

        None stands for what does not exist, such as an error rate over references without a unit.
        """
        out: dict[str, Any] = dict(self.scores(rules=rules).summary())
        out["conditions"] = {}
        for condition in self.conditions():
            scores = self.scores(condition, rules)
            if not len(scores):
                continue
            out["conditions"][condition] = _rated(scores) | {
                "languages": {
                    lang: _rated(scores.only(lang)) | {"unit": part.unit}
                    for lang, part in scores.by_lang.items()
                }
            }
        report = self.hallucinations()
        out["hallucination"] = {
            "totals": report.summary(),
            "rows": list(report.rows()),
            "nonspeech": self.nonspeech(),
            "examples": [asdict(e) for e in report.examples],
        }
        return nonfinite_to_none(out)

    def nonspeech(self) -> dict[str, dict[str, float]]:
        """Characters a minute transcribed from non-speech, by condition and over `ALL` of them.

        ``rate`` is Σ characters / Σ minutes; ``low`` and ``high`` are its 95% `ratio_interval` over
        clips (ours). Both are NaN of a single clip and where no clip holds text: all draws would be
        alike, and the rule of three bounds how often a clip holds text, not how much.
        """
        clips = [row for row in self.rows if row.reference is None]
        found = {}
        for name in (*dict.fromkeys(row.condition for row in clips), *[ALL] * bool(clips)):
            held = [row for row in clips if name in (row.condition, ALL)]
            characters_N, minutes_N = _characters(held), _minutes(held)
            span = ratio_interval(characters_N, minutes_N)
            known = len(held) > 1 and characters_N.any()
            found[name] = {
                "rate": span.value,
                "low": span.low if known else math.nan,
                "high": span.high if known else math.nan,
                "clips": len(held),
                "clips_with_text": int((characters_N > 0).sum()),
            }
        return found

    def text(self) -> str:
        """JSON lines."""
        return "".join(to_json(vars(row)) + "\n" for row in self.rows)


def read(path: Path) -> Trials:
    """What `Trials.text` wrote. Raises `UserError`."""
    try:
        lines = read_lines(path)
        return Trials([Trial(**json.loads(line)) for line in lines])
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} holds no transcripts of tools/evaluate.py: {error}") from None


def compare(a: Trials, b: Trials, rules: str = "standard") -> dict[str, dict[str, float]]:
    """Paired tests of ``b`` against ``a`` by condition: both have heard the same cases.

    Of error rates a bootstrap over utterances (`error_rate.paired_test`): ``difference`` is
    b's rate less a's. Of hallucinated utterances the exact sign test (McNemar's):
    ``flagged_a``, ``flagged_b`` are counts, ``flagged_p`` two-sided. Of characters a minute of
    non-speech the same bootstrap over clips: ``characters_difference`` and the other fields of
    `PairedTest`; where neither wrote any text its interval is NaN, as in `Trials.nonspeech`. All
    conditions of non-speech together are the last row, `NONSPEECH`. Raises `UserError` where the
    cases differ or keys repeat.
    """
    named_a, named_b = ({(r.key, r.condition): r for r in t.rows} for t in (a, b))
    if len(named_a) < len(a.rows) or len(named_b) < len(b.rows):
        raise UserError("two data sets hold the same keys: evaluate and compare them one by one")
    if [(k, r.reference) for k, r in sorted(named_a.items())] != [
        (k, r.reference) for k, r in sorted(named_b.items())
    ]:
        raise UserError("the two systems heard other cases: evaluate both with the same options")
    pairs_by: dict[str, list[tuple[Trial, Trial]]] = {name: [] for name in a.conditions()}
    for r in a.rows:
        pairs_by[r.condition].append((r, named_b[r.key, r.condition]))
    speechless = [
        pair for pairs in pairs_by.values() for pair in pairs if pair[0].reference is None
    ]
    if speechless:
        pairs_by[NONSPEECH] = speechless
    out: dict[str, dict[str, float]] = {}
    for condition, pairs in pairs_by.items():
        only_a = sum(flagged(x) and not flagged(y) for x, y in pairs)
        only_b = sum(flagged(y) and not flagged(x) for x, y in pairs)
        row: dict[str, float] = {
            "utterances": len(pairs),
            "flagged_a": sum(flagged(x) for x, _ in pairs),
            "flagged_b": sum(flagged(y) for _, y in pairs),
            "flagged_p": sign_test(only_a, only_b),
        }
        scores = a.scores(condition, rules), b.scores(condition, rules)
        if scores[0].counts.reference:
            row |= asdict(paired_test(*scores))
        if clips := [pair for pair in pairs if pair[0].reference is None]:
            row |= {f"characters_{name}": x for name, x in asdict(_paces(clips)).items()}
        out[condition] = row
    return out


def sign_test(losses: int, wins: int) -> float:
    """Two-sided p-value of so many losses and wins under even odds; ties are left out."""
    n, k = losses + wins, min(losses, wins)
    if not n:
        return 1.0
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


def flagged(row: Trial) -> bool:
    """A hallucination on speech, any text on non-speech."""
    if row.reference is None:
        return written(row.hypothesis) > 0
    return bool(flags(_spoken(row), row.hypothesis, row.lang))


def _spoken(row: Trial) -> str:
    share, text = kept(row.condition), row.reference or ""
    return text if share is None else best_prefix(text, row.hypothesis, row.lang, share)


def _characters(rows: Iterable[Trial]) -> np.ndarray:
    return np.array([written(row.hypothesis) for row in rows], dtype=np.float64)


def _minutes(rows: Iterable[Trial]) -> np.ndarray:
    return np.array([row.seconds for row in rows]) / 60


def _paces(clips: Sequence[tuple[Trial, Trial]]) -> PairedTest:
    sides = [_characters(side) for side in zip(*clips, strict=True)]
    test = paired_ratios(*sides, _minutes(one for one, _ in clips))
    known = any(side.any() for side in sides)
    return test if known else replace(test, low=math.nan, high=math.nan)


def _rated(scores: Scores) -> dict[str, float]:
    span, counts = scores.interval(), scores.counts
    return {
        "rate": span.value,
        "low": span.low,
        "high": span.high,
        "substitutions": counts.substitutions,
        "deletions": counts.deletions,
        "insertions": counts.insertions,
        "units": counts.reference,
        "utterances": len(scores),
    }
