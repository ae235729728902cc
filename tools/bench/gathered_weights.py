"""What ZeRO-3 gathers in a step: how often each part's weights, how much at once, what it keeps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from dsasr.engine.branch_engine import BranchEngine

MB = 2**20
PHASES = ("forward", "backward")


class GatheredWeights:
    """Counts a branch's gathers while `watch` is on; its stage must have been entered.

    Weights below DeepSpeed's persistence threshold are whole on every rank at all times and do not
    count.
    """

    def __init__(self, branch: BranchEngine):
        self._branch, self._phase = branch, PHASES[0]
        self._parts = {
            name: [p for p in part.parameters() if hasattr(p, "ds_id") and not p.ds_persist]
            for name, part in branch.module.named_children()
        }
        self._bytes: Counter[tuple[str, str]] = Counter()
        self._most = self._whole_bytes()

    @property
    def partitioned(self) -> bool:
        """Whether there are weights to gather."""
        return any(self._parts.values())

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Count what is gathered within."""
        engine = self._branch._engine
        backward, originals = engine.backward, []
        part_of = {p.ds_id: name for name, part in self._parts.items() for p in part}

        def run_backward(*args, **kwargs):
            self._phase = PHASES[1]
            out = backward(*args, **kwargs)
            self._phase = PHASES[0]
            return out

        def counted(gather):
            def run(params: Iterable[nn.Parameter], *args, **kwargs):
                params = list(params)
                for p in params:
                    if p.ds_id in part_of:
                        self._bytes[part_of[p.ds_id], self._phase] += _bytes(p)
                out = gather(params, *args, **kwargs)
                self._most = max(self._most, self._whole_bytes())
                return out

            return run

        def alone(p: nn.Parameter, gather):
            # A linear layer's backward pass gathers the weight that it needs so.
            def run(param_list: Sequence[nn.Parameter] | None = None, *args, **kwargs):
                return counted(lambda params, *a, **k: gather(param_list, *a, **k))(
                    [p] if param_list is None else param_list, *args, **kwargs
                )

            return run

        for part in self._parts.values():
            for p in part:
                originals.append((p, p.all_gather_coalesced, p.all_gather))
                p.all_gather_coalesced = counted(p.all_gather_coalesced)
                p.all_gather = alone(p, p.all_gather)
        engine.backward = run_backward
        try:
            yield
        finally:
            engine.backward = backward
            for p, *gathers in originals:
                p.all_gather_coalesced, p.all_gather = gathers

    def fields(self) -> dict[str, Any]:
        """Of each part its weights in MB and how many times they were gathered in each phase; the
        most that was whole at once, and what is whole now, in MB."""
        parts = {}
        for name, params in self._parts.items():
            weights = sum(map(_bytes, params))
            if weights:
                times = {p: round(self._bytes[name, p] / weights, 2) for p in PHASES}
                parts[name] = {"mb": round(weights / MB, 2), **times}
        return {
            "parts": parts,
            "most_mb": round(self._most / MB, 2),
            "kept_mb": round(self._whole_bytes() / MB, 2),
        }

    def _whole_bytes(self) -> int:
        whole = (p for part in self._parts.values() for p in part)
        return sum(_bytes(p) for p in whole if p.ds_status.name != "NOT_AVAILABLE")


def _bytes(param: nn.Parameter) -> int:
    return param.ds_numel * param.element_size()
