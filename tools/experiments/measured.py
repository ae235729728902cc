"""The results of the experiment: ratios of counts, and allocation rows of encoders."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from resampling import Ratio, interval
from systems import SYSTEMS

from dsasr.entropy_allocation.allocation_row import AllocationRow
from dsasr.evaluation.hallucination import wilson
from dsasr.utils.errors import UserError

Result = dict[str, Any]
ENCODERS = ("random", "before", "after")  # the allocation rows of a result
JOINT = {s.name for s in SYSTEMS if s.joint != "none"}


def load(folder: Path) -> dict[str, list[Result]]:
    """System → its results by seed, in the order of the table. Raises `UserError` without results,
    or where they are not of the same test clips and sizes."""
    results = [_result(path) for path in sorted(folder.glob("*-seed*.json"))]
    if not results:
        raise UserError(f"{folder} holds no results yet: run tools/reproduce.sh")
    tests = {tuple((c, len(r["clips"][c]["lang"])) for c in sorted(r["clips"])) for r in results}
    if len(tests) > 1:
        raise UserError(
            f"{folder} mixes test sets: delete the results with other --limit or --clips"
        )
    if len({json.dumps(r["sizes"], sort_keys=True) for r in results}) > 1:
        raise UserError(f"{folder} mixes sizes: delete the results that were trained with others")
    return {
        s.name: sorted(of_system, key=lambda r: r["seed"])
        for s in sorted(SYSTEMS, key=lambda s: s.label)
        if (of_system := [r for r in results if r["system"] == s.name])
    }


def _result(path: Path) -> Result:
    result = json.loads(path.read_text(encoding="utf-8"))
    rows = {side: AllocationRow.from_json(result[side]) for side in ENCODERS if result[side]}
    return result | rows


def errors(results: Sequence[Result], conditions: Sequence[str], lang: str | None = None) -> Ratio:
    """Errors over reference units."""
    return (
        _utterances(results, conditions, "errors", lang),
        _utterances(results, conditions, "units", lang),
    )


def hallucinated(results: Sequence[Result], conditions: Sequence[str]) -> Ratio:
    """Hallucinated utterances over utterances."""
    over = _utterances(results, conditions, "flagged", None)
    return over, np.full_like(over, len(conditions))


def nonspeech_rate(results: Sequence[Result]) -> Ratio:
    """Characters over minutes of non-speech."""
    kinds = sorted({c for r in results for c, clips in r["clips"].items() if "characters" in clips})

    def clips(key: str) -> np.ndarray:
        return np.array([[x for c in kinds for x in r["clips"][c][key]] for r in results], float)

    return clips("characters"), clips("seconds") / 60


def _utterances(results, conditions, key: str, lang: str | None) -> np.ndarray:
    """Sums over conditions, a column per utterance: an utterance at several SNRs is one draw, since
    its conditions are correlated."""
    rows = []
    for result in results:
        clips = [result["clips"][c] for c in conditions]
        in_lang = [lang in (None, la) for la in clips[0]["lang"]]
        rows.append(np.sum([c[key] for c in clips], axis=0)[in_lang])
    return np.array(rows, float)


def noisy(results: Sequence[Result]) -> list[str]:
    """Noisy conditions by falling SNR."""
    names = {c for r in results for c in r["clips"] if c.startswith("snr")}
    return sorted(names, key=lambda c: -float(c[3:]))


def langs(results: Sequence[Result]) -> list[str]:
    return sorted(set(results[0]["clips"]["clean"]["lang"]))


def span(ratio: Ratio, share: bool = False) -> tuple[float, float]:
    """The interval of a ratio; Wilson's of a share of utterances that is 0."""
    low, high = interval(ratio, 1.0 if share else math.inf)
    if share and not ratio[0].any():
        high = wilson(0, ratio[0].shape[1])[1]
    return low, high


def drift(results: Sequence[Result]) -> list[float]:
    """CKA of the encoder through joint SFT, by seed; nothing of a system that skips it."""
    if results[0]["system"] not in JOINT:
        return []
    values = [r["after"].cka_to_reference for r in results]
    return [value for value in values if math.isfinite(value)]


def seeds(results: Sequence[Result]) -> str:
    return f"{len(results)} seed" + ("s" if len(results) > 1 else "")
