"""Entropy allocation of several checkpoints, one row each, and the files that the rows go to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dsasr.analysis import measure as measures
from dsasr.analysis import probed_encoders
from dsasr.entropy_allocation.v_information import SPIKES, VInformationConfig
from dsasr.utils.io import atomic_write, json_lines, json_text
from dsasr.utils.progress import Bar

Row = dict[str, Any]
Extent = Literal["all", "first", "none"]


@dataclass(frozen=True)
class Baselines:
    """Which checkpoints have a baseline measured beside them."""

    random: Extent = "all"  # the same encoder with random weights
    control: Extent = "all"  # shuffled labels
    limits: Extent = "first"  # the smallest gain that would have been detected


def _includes(extent: Extent, is_first: bool) -> bool:
    return extent == "all" or (extent == "first" and is_first)


def measure_all(
    checkpoints: Sequence[str],
    probes: measures.ProbeSet,
    settings: Mapping[str, Any],
    baselines: Baselines,
) -> list[Row]:
    """A row per checkpoint, each run's and each other architecture's first followed by the same
    encoder with random weights.

    ``first`` in a row names the checkpoint that its ``cka_to_first`` compares with; ``settings``
    are those of `VInformationConfig`.
    """
    rows, reference, seen = [], None, set()

    def config(control: bool) -> VInformationConfig:
        limited = any(row[key]["limit"] for row in rows for key in ("pai", "csai"))
        spikes = SPIKES if _includes(baselines.limits, not limited) else ()
        return VInformationConfig(**settings, control=control, spikes=spikes)

    with Bar(total=len(checkpoints), unit="checkpoint") as bar:
        for path in checkpoints:
            subject, is_first = probed_encoders.open_any(path), not rows
            controlled = config(_includes(baselines.control, is_first))
            row, features = measures.measure(subject, probes, controlled, reference)
            rows.append(row | ({"first": rows[0]["name"]} if "cka_to_first" in row else {}))
            kind = subject.about.get("run") or subject.about["path"], row["width"]
            if kind not in seen and _includes(baselines.random, is_first):
                seen.add(kind)
                baseline = probed_encoders.random_baseline(subject, seed=settings["seed"])
                controlled = config(baselines.control == "all")
                rows.append(measures.measure(baseline, probes, controlled)[0])
            reference = reference if reference is not None else features
            bar.update()
    return rows


def write(rows: Iterable[Row], home: str, measured: Row, out: Path | None) -> None:
    """All rows to ``out``, or each to its run's allocation.jsonl; to ``home``'s if it has none.

    Rows of other checkpoints that were ``measured`` in the same way stay there. Other rows are not
    comparable with these: they are removed, and their number is printed.
    """
    files: dict[Path, list[Row]] = {}
    for row in rows:
        path = out or Path(row.get("run", home)).resolve() / "allocation.jsonl"
        files.setdefault(path, []).append({**row, "measured": measured})
    for path, new in files.items():
        names = {row["name"] for row in new}
        old = [] if out else [r for r in json_lines(path) if r["name"] not in names]
        comparable = [r for r in old if r.get("measured") == measured]
        atomic_write(path, "".join(json_text(row) + "\n" for row in (*comparable, *new)))
        removed = len(old) - len(comparable)
        note = f"; {removed} measured otherwise left out" if removed else ""
        print(f"written: {path} ({', '.join(row['name'] for row in new)}{note})")
