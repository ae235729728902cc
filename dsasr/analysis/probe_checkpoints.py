"""Entropy allocation of several checkpoints on one probe set: rows, a table, and their files."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from dsasr.analysis import probed_encoders
from dsasr.analysis.measure_allocation import Reference, measure
from dsasr.analysis.probe_set import ProbeSet
from dsasr.entropy_allocation.allocation_row import (
    AllocationRow,
    CtcEntropy,
    Estimate,
    LlmAllocation,
)
from dsasr.entropy_allocation.pai_csai import VInformationConfig
from dsasr.utils.io import atomic_write, read_json_lines, to_json
from dsasr.utils.progress import Bar

ALLOCATION = "allocation.jsonl"  # in a run folder
Extent = Literal["all", "first", "none"]


@dataclass(frozen=True)
class Baselines:
    """Which checkpoints have a baseline measured beside them.

    ``random``: the same encoder with random weights (all: one of each run and architecture).
    ``control``: shuffled frames; CSAI's control of phonemes alone is measured with each.
    ``limits``: the detection limit where nothing is detected (first: until one is known).
    """

    random: Extent = "all"
    control: Extent = "all"
    limits: Extent = "first"


def measure_all(
    checkpoints: Sequence[str],
    probe_set: ProbeSet,
    config: VInformationConfig,
    baselines: Baselines,
    measured: Callable[[list[AllocationRow]], Any] = lambda rows: None,
) -> list[AllocationRow]:
    """A row per checkpoint, and one per random encoder. CKA is to the first checkpoint.

    ``config`` applies to all, but for the control and the planted shares, which ``baselines`` set.
    ``measured`` is called with all rows so far after each checkpoint.
    """
    rows: list[AllocationRow] = []
    reference: Reference | None = None
    architectures = set()

    def options(control: bool) -> VInformationConfig:
        known = any(0 < e.detection_limit < math.inf for r in rows for e in (r.pai, r.csai))
        shares = config.planted_shares if _applies(baselines.limits, known) else ()
        return replace(config, control=control, planted_shares=shares)

    with Bar(total=len(checkpoints), unit="checkpoint") as bar:
        for path in checkpoints:
            encoder, later = probed_encoders.open_encoder(path), bool(rows)
            control = _applies(baselines.control, later)
            row, features = measure(encoder, probe_set, options(control), reference)
            rows.append(row)
            architecture = encoder.source.run or encoder.source.path, row.width
            if architecture not in architectures and _applies(baselines.random, later):
                architectures.add(architecture)
                baseline = probed_encoders.random_baseline(encoder, seed=config.seed)
                control = baselines.control == "all"
                rows.append(measure(baseline, probe_set, options(control))[0])
            measured(rows)
            reference = reference or Reference(encoder.source.name, features)
            bar.update()
    return rows


def _applies(extent: Extent, later: bool) -> bool:
    return extent == "all" or (extent == "first" and not later)


class RowFiles:
    """The files that rows go to, as they are measured: all to ``out``, or each to its run's
    allocation.jsonl, to ``home``'s if it has no run.

    Rows of other checkpoints with the same ``settings`` stay in that file; rows with other
    settings, which are not comparable, are removed. What is in ``out`` is replaced.
    """

    def __init__(self, home: str, settings: dict[str, Any], out: Path | None = None):
        self.home, self.settings, self.out = home, settings, out
        self._names: dict[Path, list[str]] = {}
        self._removed: Counter[Path] = Counter()

    def write(self, rows: Iterable[AllocationRow]) -> None:
        """Write all ``rows`` so far."""
        files: dict[Path, list[dict[str, Any]]] = {}
        for row in rows:
            path = self.out or Path(row.encoder.run or self.home).resolve() / ALLOCATION
            files.setdefault(path, []).append(replace(row, settings=self.settings).to_json())
        for path, new in files.items():
            names = self._names[path] = [row["encoder"]["name"] for row in new]
            # Unparsed: a file of another version has other settings too.
            there = [] if self.out else read_json_lines(path)
            old = [row for row in there if _name(row) not in names]
            same = [row for row in old if row.get("settings") == self.settings]
            atomic_write(path, "".join(to_json(row) + "\n" for row in (*same, *new)))
            self._removed[path] += len(old) - len(same)

    def messages(self) -> list[str]:
        """A line for each file."""
        lines = []
        for path, names in self._names.items():
            count = self._removed[path]
            note = f"; {count} measured with other settings removed" if count else ""
            lines.append(f"written: {path} ({', '.join(names)}{note})")
        return lines


def _name(row: dict[str, Any]) -> str:
    encoder = row.get("encoder")
    return encoder["name"] if isinstance(encoder, dict) else row.get("name", "")


# -- the table ---------------------------------------------------------------------------------

HEAD = ("checkpoint", "NSE", "rank", "PAI", "of H(P)", "CSAI", "of H(S|P)", "CKA", "CTC H", "H0",
        "H1", "H0-H1", "LLM H")  # fmt: skip


def table(rows: Sequence[AllocationRow]) -> str:
    """Rows as text. PAI and CSAI are in nats a frame with their 95% interval, the controls in
    brackets (shuffled, and CSAI's of phonemes alone); ``none (<x)`` where nothing is detected and
    x is the detection limit."""
    lines = [HEAD, *(_cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEAD))]
    text = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return "\n".join(line.rstrip() for line in text)


def _cells(row: AllocationRow) -> tuple[str, ...]:
    ctc, llm = row.ctc or CtcEntropy(), row.llm or LlmAllocation()
    numbers = (row.cka_to_reference, ctc.entropy, llm.nll_without_audio, llm.nll_with_audio,
               llm.resolved, llm.entropy_with_audio)  # fmt: skip
    estimates = [text for e in (row.pai, row.csai) for text in (_estimate(e), _share(e))]
    return (
        row.encoder.name,
        _number(row.nse),
        _number(row.effective_rank, 1),
        *estimates,
        *map(_number, numbers),
    )


def _number(value: float, digits: int = 3) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "–"


def _estimate(estimate: Estimate) -> str:
    controls = [_number(estimate.shuffled, 2)]
    if math.isfinite(estimate.phoneme_only):
        controls.append(_number(estimate.phoneme_only))
    control = f"[{' '.join(controls)}]"
    if not estimate.detected and not estimate.underfit:
        limit = estimate.detection_limit
        known = f" (<{_number(limit)})" if math.isfinite(limit) else ""
        return f"none{known} {control}"
    mark = " underfit" if estimate.underfit else ""
    return f"{estimate.value:.3f} {estimate.low:.2f}…{estimate.high:.2f} {control}{mark}"


def _share(estimate: Estimate) -> str:
    return f"{100 * estimate.share:.1f}%" if math.isfinite(estimate.share) else "–"
