"""What the results of the experiment hold: ratios of counts, and rows of encoders."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from resampling import Ratio, interval
from systems import SYSTEMS

from dsasr.evaluation.hallucination import wilson
from dsasr.utils.errors import UserError

Result = dict[str, Any]
JOINT = {s.name for s in SYSTEMS if s.joint != "none"}


def load(folder: Path) -> dict[str, list[Result]]:
    """System → its results by seed, in the order of the table. Raises `UserError` without results,
    or where they are not of the same test clips and sizes."""
    found = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.glob("*-seed*.json"))]
    if not found:
        raise UserError(f"{folder} holds no results yet: run tools/reproduce.sh")
    heard = {tuple((c, len(r["clips"][c]["lang"])) for c in sorted(r["clips"])) for r in found}
    if len(heard) > 1:
        raise UserError(
            f"{folder} mixes test sets: delete the results with other --limit or --clips"
        )
    if len({json.dumps(r["sizes"], sort_keys=True) for r in found}) > 1:
        raise UserError(f"{folder} mixes sizes: delete the results that were trained with others")
    return {
        s.name: sorted(held, key=lambda r: r["seed"])
        for s in sorted(SYSTEMS, key=lambda s: s.label)
        if (held := [r for r in found if r["system"] == s.name])
    }


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


def invented(results: Sequence[Result]) -> Ratio:
    """Characters over minutes of non-speech."""
    kinds = sorted({c for r in results for c, held in r["clips"].items() if "characters" in held})

    def clips(key: str) -> np.ndarray:
        return np.array([[x for c in kinds for x in r["clips"][c][key]] for r in results], float)

    return clips("characters"), clips("seconds") / 60


def _utterances(results, conditions, key: str, lang: str | None) -> np.ndarray:
    """Sums over conditions, a column per utterance: an utterance at several SNRs is one draw, since
    its conditions are alike."""
    rows = []
    for result in results:
        held = [result["clips"][c] for c in conditions]
        keep = [lang in (None, la) for la in held[0]["lang"]]
        rows.append(np.sum([c[key] for c in held], axis=0)[keep])
    return np.array(rows, float)


def noisy(results: Sequence[Result]) -> list[str]:
    """Conditions by falling SNR."""
    found = {c for r in results for c in r["clips"] if c.startswith("snr")}
    return sorted(found, key=lambda c: -float(c[3:]))


def langs(results: Sequence[Result]) -> list[str]:
    return sorted(set(results[0]["clips"]["clean"]["lang"]))


def span(ratio: Ratio, share: bool = False) -> tuple[float, float]:
    """The interval of a ratio; of a share of utterances of which none is counted, Wilson's."""
    low, high = interval(ratio, 1.0 if share else math.inf)
    if share and not ratio[0].any():
        high = wilson(0, ratio[0].shape[1])[1]
    return low, high


def drift(held: Sequence[Result]) -> list[float]:
    """CKA of the encoder through joint SFT, by seed; nothing of a system that skips it."""
    if held[0]["system"] not in JOINT:
        return []
    return [r["cka_through_joint"] for r in held if r["cka_through_joint"] is not None]


def counted(held: Sequence[Result]) -> str:
    return f"{len(held)} seed" + ("s" if len(held) > 1 else "")


def reading(row: Result, name: str) -> float:
    held = row[name]
    return held["value"] if isinstance(held, dict) else held
