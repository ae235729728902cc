"""A branch's fp32 masters and Adam moments, through all that replaces what holds them.

An engine lasts a stage, an encoder until the next swap, a process until it is stopped; masters go
on. A parameter's is *live* where the stage trains it: the optimizer's own, in place or offloaded.
It is *dormant* where only an earlier stage did: kept here, so that a later one starts from it and
not from rounded weights. (fp32 weights are the masters; none is dormant beside them.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dsasr.checkpoint import zero_partition
from dsasr.checkpoint.tensor_fragments import Fragment, FragmentReader, PrefixReader
from dsasr.engine.offload import StateOffloader


class MasterWeights:
    """Of ``module``, whose weights are of ``dtype``."""

    def __init__(self, module: nn.Module, dtype: torch.dtype, offloader: StateOffloader):
        self._module, self._offloader = module, offloader
        self._low = dtype is not torch.float32
        self.live: zero_partition.OptimizerStates | None = None
        self._dormant: dict[str, Fragment] = {}

    # -- offload ------------------------------------------------------------------------------

    def offload(self) -> int:
        """Move the live ones to where they are offloaded to; returns the bytes moved."""
        if self.live is None:
            return 0
        tensors = {}
        for index, flat in enumerate(self.live.flats()):
            tensors[f"{zero_partition.MASTER}.{index}"] = flat
            for kind, moment in self.live.moments(flat).items():
                tensors[f"{kind}.{index}"] = moment
        return self._offloader.offload(tensors)

    def reload(self) -> int:
        return self._offloader.reload()

    @property
    def offloaded_bytes(self) -> int:
        """What lies in the offload place at present."""
        return self._offloader.bytes

    # -- another engine ----------------------------------------------------------------------

    def leave(self) -> tuple[dict[str, Fragment], float]:
        """Copies of an engine's masters and moments, which is to go, and Adam's step count."""
        if self.live is None:
            return {}, 0.0
        self.reload()
        views, steps = self.live.views(), self.live.steps()
        self.live = None
        return {k: _copy(f) for k, f in views.items()}, steps

    def enter(self, zero, carried: Mapping[str, Fragment], steps: float | None) -> None:
        """Put ``carried`` values back where the new engine trains them; keep the rest dormant.

        ``zero``: its ZeRO optimizer. ``steps``: Adam's count, for the moments to go on from; None:
        they begin again.
        """
        self.live = zero_partition.OptimizerStates(self._module, zero)
        self._dormant |= {k: f for k, f in carried.items() if _is_master(k)}
        if steps is not None:
            self.live.make_moments(steps)
        for key, view in self.live.edited():
            if _is_master(key) and key in self._dormant:
                dormant = self._dormant.pop(key)
                # Another cut than this engine's (ZeRO-1 and 2 only): the weights have to do.
                if _same_cut(dormant, view):
                    view.tensor.copy_(dormant.tensor)
            elif not _is_master(key) and steps is not None and key in carried:
                view.tensor.copy_(carried[key].tensor)
        if not self._low:
            self._dormant.clear()

    # -- other weights -----------------------------------------------------------------------

    def replace(self, own: Mapping[str, Tensor], source: MasterWeights | FragmentReader) -> None:
        """Take ``source``'s masters of the weights ``own``, which have been replaced by its own.

        The moments of live ones begin again from zero.
        """
        reader = None if isinstance(source, MasterWeights) else source
        given = source.trained() if reader is None and self._low else {}
        if self.live is not None and any(p.requires_grad for p in own.values()):
            self.reload()
            self._refill(own, given, reader)
        if self._low:
            self._lay_by(own, given, reader)

    def _refill(
        self,
        own: Mapping[str, Tensor],
        given: Mapping[str, Fragment],
        reader: FragmentReader | None,
    ) -> None:
        """The live ones of ``own``.

        Two ZeRO-1/2 engines may cut their masters at different places; a piece that this rank's
        source does not hold is taken from the (whole) weights then.
        """
        for key, view in self.live.edited():
            name = key.partition("/")[2]
            if name not in own:
                continue
            held = given.get(key)
            if not _is_master(key):
                view.tensor.zero_()
            elif held is not None and _same_cut(held, view):
                view.tensor.copy_(held.tensor)
            elif reader is not None and key in reader:
                view.tensor.copy_(reader.read(key, view.start, view.stop))
            else:
                view.tensor.copy_(zero_partition.piece(own[name], view.start, view.stop))

    def _lay_by(
        self,
        own: Mapping[str, Tensor],
        given: Mapping[str, Fragment],
        reader: FragmentReader | None,
    ) -> None:
        """The dormant ones of ``own``: none where the source has none."""
        live = self.live.views() if self.live is not None else {}
        for name, parameter in own.items():
            key = f"{zero_partition.MASTER}/{name}"
            self._dormant.pop(key, None)
            if key in live:
                continue
            if key in given:
                self._dormant[key] = _copy(given[key])
            elif reader is not None and key in reader:
                self._dormant[key] = _read(reader, key, parameter)

    # -- saving and loading ------------------------------------------------------------------

    def fragments(self) -> dict[str, Fragment]:
        """This rank's pieces of all masters and moments."""
        self.reload()
        return self._dormant | (self.live.views() if self.live is not None else {})

    def trained(self, prefix: str = "") -> dict[str, Fragment]:
        """This rank's pieces of the live masters."""
        if self.live is None:
            return {}
        self.reload()
        start = f"{zero_partition.MASTER}/{prefix}"
        return {k: f for k, f in self.live.views().items() if k.startswith(start)}

    def steps(self) -> float:
        """Adam's step count."""
        return self.live.steps() if self.live is not None else 0.0

    def load(self, reader: PrefixReader, steps: float) -> None:
        """What `fragments` and `steps` gave, of any number of ranks, into the stage's engine."""
        if steps:
            self.live.make_moments(steps)
        live = set()
        for key, view in self.live.edited():
            view.tensor.copy_(reader.read(key, view.start, view.stop))
            live.add(key)
        for name, parameter in zero_partition.parameters(self._module):
            key = f"{zero_partition.MASTER}/{name}"
            if key in reader and key not in live:
                self._dormant[key] = _read(reader, key, parameter)

    def close(self) -> None:
        """Forget them all, the offloaded ones too."""
        self.live = None
        self._offloader.close()
        self._dormant.clear()


def _is_master(key: str) -> bool:
    return key.startswith(f"{zero_partition.MASTER}/")


def _same_cut(one: Fragment, other: Fragment) -> bool:
    return (one.start, one.stop) == (other.start, other.stop)


def _copy(fragment: Fragment) -> Fragment:
    return dataclasses.replace(fragment, tensor=fragment.tensor.clone())


def _read(reader: PrefixReader | FragmentReader, key: str, parameter: Tensor) -> Fragment:
    """The master of what this rank answers for of ``parameter``'s weights."""
    own = zero_partition.weight(parameter)
    return dataclasses.replace(own, tensor=reader.read(key, own.start, own.stop))
