"""A branch's fp32 masters and Adam moments, across engines, encoders and processes.

An engine lasts for a stage, an encoder until the next swap, a process until it is stopped; masters
outlive them. A parameter's master is *live* where the stage trains it: it is the optimizer's own,
in place or offloaded. It is *dormant* where only an earlier stage trained it: it is stored here, so
that a later stage starts from it and not from rounded weights. (fp32 weights are their own masters;
none is dormant beside them.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dsasr.checkpoint import zero_partition
from dsasr.checkpoint.repartition import repartition
from dsasr.checkpoint.tensor_fragments import Fragment, Reader
from dsasr.checkpoint.zero_partition import OptimizerStates
from dsasr.engine.offload import StateOffloader


class MasterWeights:
    """The masters and moments of ``module``, whose weights are of ``dtype``."""

    def __init__(self, module: nn.Module, dtype: torch.dtype, offloader: StateOffloader):
        self._module, self._offloader = module, offloader
        self._low_precision = dtype is not torch.float32
        self.live: OptimizerStates | None = None
        self._dormant: dict[str, Fragment] = {}

    # -- offload ------------------------------------------------------------------------------

    def offload(self) -> int:
        """Offload the live masters and moments; returns the bytes moved."""
        if self.live is None:
            return 0
        tensors = {}
        for index, flat in enumerate(self.live.flat_masters()):
            tensors[f"{zero_partition.MASTER}.{index}"] = flat
            for kind, moment in self.live.moments(flat).items():
                tensors[f"{kind}.{index}"] = moment
        return self._offloader.offload(tensors)

    def reload(self) -> int:
        """Reload what is offloaded; returns the bytes moved."""
        return self._offloader.reload()

    @property
    def offloaded_bytes(self) -> int:
        """The bytes offloaded at present."""
        return self._offloader.bytes

    # -- another engine ----------------------------------------------------------------------

    def detach(self) -> tuple[dict[str, Fragment], float]:
        """Copies of the live masters and moments of an engine that is about to be destroyed, and
        Adam's step count."""
        if self.live is None:
            return {}, 0.0
        self.reload()
        fragments, steps = self.live.fragments(), self.live.steps()
        self.live = None
        return {key: _copy(fragment) for key, fragment in fragments.items()}, steps

    def attach(self, zero, carried: Mapping[str, Fragment], steps: float | None) -> None:
        """Load the ``carried`` states into the new engine where it trains their parameters, and
        make the other masters dormant; collective.

        ``zero``: the engine's ZeRO optimizer. ``steps``: Adam's step count, from which the moments
        continue; None: the moments start from zero.
        """
        self.live = OptimizerStates(self._module, zero)
        self._dormant |= {k: f for k, f in carried.items() if _is_master(k)}
        if steps is not None:
            self.live.init_moments(steps)
        earlier = self._dormant if steps is None else {**carried, **self._dormant}
        found = repartition(earlier, self.live.ranges())
        for key, view in self.live.edit():
            if key in found:
                view.tensor.copy_(found[key].tensor)
                self._dormant.pop(key, None)
        if not self._low_precision:
            self._dormant.clear()

    # -- other weights -----------------------------------------------------------------------

    def replace(self, tensors: Mapping[str, Tensor], source: MasterWeights | Reader) -> None:
        """Take ``source``'s masters for ``tensors`` (name → parameter or buffer), into which its
        weights have been copied; collective.

        The moments of those that the stage trains start again from zero.
        """
        reader = None if isinstance(source, MasterWeights) else source
        masters = source.masters() if reader is None and self._low_precision else {}
        if self.live is not None and any(p.requires_grad for p in tensors.values()):
            self.reload()
            self._replace_live(tensors, masters, reader)
        self._replace_dormant(tensors, masters, reader if self._low_precision else None)

    def _replace_live(
        self,
        tensors: Mapping[str, Tensor],
        masters: Mapping[str, Fragment],
        reader: Reader | None,
    ) -> None:
        """Overwrite the live masters of ``tensors``, and zero their moments; those that neither
        ``masters`` nor ``reader`` has are copied from the weights."""
        own = {key: r for key, r in self.live.ranges().items() if key.partition("/")[2] in tensors}
        masters = repartition(masters, own)
        for key, view in self.live.edit():
            name = key.partition("/")[2]
            if name not in tensors:
                continue
            if not _is_master(key):
                view.tensor.zero_()
            elif key in masters:
                view.tensor.copy_(masters[key].tensor)
            elif reader is not None and key in reader:
                view.tensor.copy_(reader.read(key, view.start, view.stop))
            else:
                weights = zero_partition.weight_range(tensors[name], view.start, view.stop)
                view.tensor.copy_(weights)

    def _replace_dormant(
        self,
        tensors: Mapping[str, Tensor],
        masters: Mapping[str, Fragment],
        reader: Reader | None,
    ) -> None:
        """Replace the dormant masters of ``tensors``; where the source has none, there is none."""
        live = self.live.ranges() if self.live is not None else {}
        for name, parameter in tensors.items():
            key = f"{zero_partition.MASTER}/{name}"
            self._dormant.pop(key, None)
            if key in live:
                continue
            if key in masters:
                self._dormant[key] = _copy(masters[key])
            elif reader is not None and key in reader:
                self._dormant[key] = _read(reader, key, parameter)

    # -- saving and loading ------------------------------------------------------------------

    def fragments(self) -> dict[str, Fragment]:
        """This rank's fragments of all masters and moments."""
        self.reload()
        return self._dormant | (self.live.fragments() if self.live is not None else {})

    def masters(self, prefix: str = "") -> dict[str, Fragment]:
        """This rank's fragments of the masters, dormant ones too, of parameters whose names have
        ``prefix``."""
        start = f"{zero_partition.MASTER}/{prefix}"
        return {key: f for key, f in self.fragments().items() if key.startswith(start)}

    def steps(self) -> float:
        """Adam's step count."""
        return self.live.steps() if self.live is not None else 0.0

    def load(self, reader: Reader, steps: float) -> None:
        """Load what any number of ranks saved from `fragments` and `steps`; without an engine only
        the dormant masters."""
        if steps and self.live is not None:
            self.live.init_moments(steps)
        live = set()
        for key, view in self.live.edit() if self.live is not None else ():
            view.tensor.copy_(reader.read(key, view.start, view.stop))
            live.add(key)
        for name, parameter in zero_partition.named_parameters(self._module):
            key = f"{zero_partition.MASTER}/{name}"
            if key in reader and key not in live:
                self._dormant[key] = _read(reader, key, parameter)

    def close(self) -> None:
        """Free all masters and moments, and remove the offload file."""
        self.live = None
        self._offloader.close()
        self._dormant.clear()


def _is_master(key: str) -> bool:
    return key.startswith(f"{zero_partition.MASTER}/")


def _copy(fragment: Fragment) -> Fragment:
    return dataclasses.replace(fragment, tensor=fragment.tensor.clone())


def _read(reader: Reader, key: str, parameter: Tensor) -> Fragment:
    """The master of this rank's partition of ``parameter``, from a saved folder."""
    fragment = zero_partition.weight_fragment(parameter)
    return dataclasses.replace(fragment, tensor=reader.read(key, fragment.start, fragment.stop))
