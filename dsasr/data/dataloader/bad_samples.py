"""The log of dropped samples: counts by cause, a file that names each, and limits."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dsasr.data.shards.sample import DroppedSample
from dsasr.utils.errors import UserError
from dsasr.utils.io import atomic_write, read_lines
from dsasr.utils.troubleshooting import see

# What to do about causes that a recipe's limits make.
_HINTS = {
    "missing_audio": "a sample is an audio and a json member of the same name",
    "missing_json": "a sample is an audio and a json member of the same name; of shards that other "
    "tools made (txt and wav) see `dsasr data index --help`",
    "too_few_frames": "CTC needs a frame for each unit: check the transcripts, or the units",
    "no_phonemes": "check data.phonemizer",
    "missing_phonemes": "check data.phonemizer",
    "unknown_phoneme": "check data.phonemes and data.phonemizer",
}


def dropped_summary(counts: Mapping[str, int], last: DroppedSample | None) -> str:
    """The end of a message about samples that were all dropped: causes, the last one, a hint."""
    if not counts:
        return ": there is no audio with a json member of the same name beside it"
    causes = ", ".join(f"{c} {n:,}" for c, n in sorted(counts.items(), key=lambda item: -item[1]))
    text = f": all {sum(counts.values()):,} were dropped ({causes})"
    if last is not None:
        _, shard, key, detail = last
        text += f"; the last: {key} in {shard}: {detail}"
    hint = _HINTS.get(max(counts, key=lambda cause: counts[cause]))
    return text + (f"; {hint}" if hint else "") + see("dropped-samples")


class BadSampleLog:
    """Counts dropped samples by cause, names each in a file, and reports exceeded limits.

    ``limits``: cause → the number of samples that a run may drop for it; ``"*"`` is the limit of
    every cause not named, ``"total"`` that of all causes together. Each rank writes its own file:
    ``bad_samples.jsonl`` of rank 0, ``bad_samples.rank3.jsonl`` of rank 3.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        limits: Mapping[str, int] | None = None,
        *,
        rank: int = 0,
    ) -> None:
        path = Path(path)
        self.rank_0_name = path.name
        self.path = path if rank == 0 else path.with_suffix(f".rank{rank}{path.suffix}")
        self.limits = dict(limits or {})
        self.counts: Counter[str] = Counter()
        self.last: dict[str, DroppedSample] = {}

    def resume(self, counts: Mapping[str, int], steps: int) -> None:
        """Continue after ``steps`` steps: rank 0 takes over the ``counts`` of all ranks so far.

        It also removes the lines of steps that will be repeated, from the files of all ranks.
        """
        if self.path.name != self.rank_0_name:
            return
        self.counts = Counter(counts)
        stem, suffix = self.path.stem, self.path.suffix
        for path in sorted(self.path.parent.glob(f"{stem}*{suffix}")):
            lines = []
            for line in read_lines(path):
                try:
                    values = json.loads(line)
                except ValueError:
                    continue  # the torn last line of a killed run
                if values.get("steps", 0) < steps:
                    lines.append(line + "\n")
            atomic_write(path, "".join(lines))

    def add(self, bad: Iterable[DroppedSample], **context: Any) -> None:
        """Record a batch's ``bad``; ``context`` (step, stage, epoch) is written with each line.

        Does not raise: call `check`, or gather ``excess()`` over ranks so that all stop together.
        """
        lines = []
        for cause, shard, key, detail in bad:
            self.counts[cause] += 1
            self.last[cause] = (cause, shard, key, detail)
            entry = {"cause": cause, "shard": shard, "key": key, "detail": detail, **context}
            lines.append(json.dumps(entry, ensure_ascii=False) + "\n")
        if lines:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write("".join(lines))

    def excess(self, counts: Mapping[str, int] | None = None) -> str | None:
        """The exceeded limit, in one line, or None. ``counts``: summed over ranks, if given."""
        counts = self.counts if counts is None else counts
        total = sum(counts.values())
        if total > self.limits.get("total", total):
            return f"{total} samples were dropped, more than the limit of {self.limits['total']}"
        for cause, count in sorted(counts.items()):
            limit = self.limits.get(cause, self.limits.get("*"))
            if limit is not None and count > limit:
                _, shard, key, detail = self.last.get(cause, ("", "another rank's", "?", ""))
                return (
                    f"{count} samples were dropped for '{cause}', more than the limit of {limit} "
                    f"(the last: {key} in {shard}: {detail}); all are listed in {self.path.name}"
                )
        return None

    def check(self, counts: Mapping[str, int] | None = None) -> None:
        """Raise `UserError` if a limit is exceeded. ``counts``, if given: equal on all ranks."""
        excess = self.excess(counts)
        if excess:
            raise UserError(
                f"{excess}; repair the data or raise the limit in the recipe"
                f"{see('dropped-samples')}"
            )
