"""What becomes of bad samples: counted by cause, named in a file, and too many end the run."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dsasr.data.dataloader.bucketing import Bad
from dsasr.utils.errors import UserError
from dsasr.utils.io import atomic_write, read_lines


class BadSampleLog:
    """Counts dropped samples by cause, names each in a file, and says when there were too many.

    ``limits``: cause → how many samples of a run may be dropped for it on this rank's watch;
    ``"*"`` is the limit of every cause not named, and ``"total"`` bounds all together. Each rank
    writes its own file: ``bad_samples.jsonl`` of rank 0, ``bad_samples.rank3.jsonl`` of rank 3.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        limits: Mapping[str, int] | None = None,
        *,
        rank: int = 0,
    ) -> None:
        path = Path(path)
        self.first = path.name
        self.path = path if rank == 0 else path.with_suffix(f".rank{rank}{path.suffix}")
        self.limits = dict(limits or {})
        self.counts: Counter[str] = Counter()
        self.last: dict[str, Bad] = {}

    def resume(self, counts: Mapping[str, int], steps: int) -> None:
        """Go on behind ``steps`` steps: rank 0 takes the ``counts`` of all ranks until then.

        It also drops the lines of steps that will be made again, from the files of all ranks.
        """
        if self.path.name != self.first:
            return
        self.counts = Counter(counts)
        stem, suffix = self.path.stem, self.path.suffix
        for path in sorted(self.path.parent.glob(f"{stem}*{suffix}")):
            kept = []
            for line in read_lines(path):
                try:
                    values = json.loads(line)
                except ValueError:
                    continue  # the torn last line of a killed run
                if values.get("steps", 0) < steps:
                    kept.append(line + "\n")
            atomic_write(path, "".join(kept))

    def add(self, bad: Iterable[Bad], **context: Any) -> None:
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
        """What is over its limit, in one line, or None. ``counts``: summed over ranks, if given."""
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
        """Raise `UserError` if a limit is passed. ``counts``, if given: equal on all ranks."""
        excess = self.excess(counts)
        if excess:
            raise UserError(f"{excess}; repair the data or raise the limit in the recipe")
