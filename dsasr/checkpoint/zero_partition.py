"""The partition of a module's weights and optimizer states on this rank, under any ZeRO stage.

Everything that reads or writes them (offloader, hot-swap, snapshots, checkpoints) goes through the
fragments given here, one for each parameter and kind of state, so that none of it depends on
DeepSpeed's layout:

- ZeRO-3: each rank has the same range of a parameter (``ds_tensor``) and of its fp32 master.
- ZeRO-1 and 2: weights are whole on every rank, masters are partitioned at arbitrary elements.
- Before DeepSpeed has initialized the module, weights are whole and there are no masters.

When whole weights are written, each rank writes an equal share, so that a folder has them once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from dsasr.checkpoint.tensor_fragments import (
    Fragment,
    FragmentError,
    Reader,
    all_finite,
    on_all_ranks,
)
from dsasr.model.layerwise_init import full_shape
from dsasr.model.lora import is_adapter, plain_name
from dsasr.utils import distributed

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")


# -- weights -------------------------------------------------------------------------------------


def named_parameters(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Parameter]]:
    """Named parameters of all of ``module``, or of a child by ``"NAME."``; tied ones once.

    Names are those in files: without what LoRA's layers add to them.
    """
    path = prefix.rstrip(".")
    for name, parameter in module.get_submodule(path).named_parameters(prefix=path):
        yield plain_name(name), parameter


def persistent_buffers(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Named buffers that belong to the state dict."""
    top = prefix.rstrip(".")
    for path, child in module.get_submodule(top).named_modules(prefix=top):
        for name, buffer in child._buffers.items():
            if buffer is not None and name not in child._non_persistent_buffers_set:
                yield plain_name(f"{path}.{name}") if path else name, buffer


def named_tensors(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """Name → parameter or persistent buffer."""
    return dict(named_parameters(module, prefix)) | dict(persistent_buffers(module, prefix))


def weight_fragment(parameter: nn.Parameter) -> Fragment:
    """A view of this rank's partition of the weights; of whole weights, of this rank's share."""
    shape = full_shape(parameter)
    numel = torch.Size(shape).numel()
    if hasattr(parameter, "ds_tensor"):
        partition = parameter.ds_tensor.data
        start = min(distributed.rank() * partition.numel(), numel)
        return Fragment(shape, start, partition[: min(partition.numel(), numel - start)])
    share = -(-numel // distributed.world_size())
    start = min(distributed.rank() * share, numel)
    return Fragment(shape, start, parameter.data.reshape(-1)[start : min(start + share, numel)])


def weight_range(parameter: nn.Parameter, start: int, stop: int) -> Tensor:
    """Elements ``start`` to ``stop`` of the flattened weights, which must lie on this rank."""
    if hasattr(parameter, "ds_tensor"):
        fragment = weight_fragment(parameter)
        return fragment.tensor[start - fragment.start : stop - fragment.start]
    return parameter.data.reshape(-1)[start:stop]


def weight_fragments(module: nn.Module, prefix: str = "") -> dict[str, Fragment]:
    """Name → this rank's fragment of the weights; buffers are on rank 0 alone."""
    fragments = {name: weight_fragment(p) for name, p in named_parameters(module, prefix)}
    for name, buffer in persistent_buffers(module, prefix):
        flat = buffer.reshape(-1)
        flat = flat if distributed.is_main_rank() else flat[:0]
        fragments[name] = Fragment(tuple(buffer.shape), 0, flat)
    return fragments


# -- loading and copying -------------------------------------------------------------------------


def load_weights(module: nn.Module, reader: Reader) -> None:
    """`load_tensors` into all weights and persistent buffers of ``module``; collective."""
    load_tensors(named_tensors(module), reader)


def load_tensors(targets: Mapping[str, Tensor], reader: Reader, finite: bool = False) -> None:
    """Load ``targets`` (name → parameter or buffer) one after the other; each rank reads its
    partition.

    Names and shapes are all checked before the first weight changes: `FragmentError` when the
    folder is of another architecture, and the targets are then as they were. A weight that cannot
    be read or, with ``finite``, is not finite raises it on all ranks too, in the midst. The caller
    refreshes gathered copies afterwards (`refresh_gathered`). Collective.
    """
    on_all_ranks(lambda: _check_layout(targets, reader))

    def load() -> None:
        for name, target in targets.items():
            _write_partition(target, _read_checked(reader, name, target, finite))

    on_all_ranks(load)


def replace_weights(module: nn.Module, reader: Reader, prefixes: Sequence[str] = ("",)) -> None:
    """`load_weights` of several children into a module that must survive a bad folder; collective.

    Every rank reads and checks all of its partition before the first weight changes on any:
    `FragmentError` on all ranks, with one rank's reason, when a weight is missing, unreadable or
    not finite. Takes the memory of a second copy of this rank's partition meanwhile.
    """

    def read() -> list[Tensor]:
        _check_layout(targets, reader)
        return [_read_checked(reader, name, target, True) for name, target in targets.items()]

    targets = {n: t for prefix in prefixes for n, t in named_tensors(module, prefix).items()}
    for target, partition in zip(targets.values(), on_all_ranks(read), strict=True):
        _write_partition(target, partition)


def _check_layout(targets: Mapping[str, Tensor], reader: Reader) -> None:
    for name, target in targets.items():
        shape = full_shape(target)
        if name not in reader:
            raise FragmentError(f"{reader.folder} holds no '{name}': another architecture")
        if reader.shapes[name] != shape:
            raise FragmentError(
                f"{reader.folder} holds '{name}' of shape {list(reader.shapes[name])}, "
                f"this model has {list(shape)}: another architecture"
            )
        if reader.shapes.get(f"{MASTER}/{name}", shape) != shape:
            raise FragmentError(f"{reader.folder}: the master of '{name}' has another shape")
    # Names with a slash are optimizer states'.
    parts = {name.partition(".")[0] for name in targets}
    inside = (n for n in reader.shapes if n.partition(".")[0] in parts and "/" not in n)
    if extra := next((n for n in inside if is_adapter(n) and n not in targets), None):
        raise FragmentError(
            f"{reader.folder} holds '{extra}', which this model lacks: give the model.lora or "
            "model.encoder_lora that it was trained with"
        )


def _read_checked(reader: Reader, name: str, target: Tensor, finite: bool) -> Tensor:
    partition = _read_partition(reader, name, target)
    if finite and not all_finite([partition]):
        raise FragmentError(f"{reader.folder} holds '{name}' with values not finite")
    return partition


def _read_partition(reader: Reader, name: str, target: Tensor) -> Tensor:
    """This rank's partition of ``name`` under ZeRO-3, else all of it."""
    if hasattr(target, "ds_tensor"):
        fragment = weight_fragment(target)
        return reader.read(name, fragment.start, fragment.stop)
    return reader.whole(name)


def _write_partition(target: Tensor, partition: Tensor) -> None:
    if hasattr(target, "ds_tensor"):
        weight_fragment(target).tensor.copy_(partition)
    else:
        target.data.copy_(partition)


def copy_weights(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    """Copy between two modules' `named_tensors`, of equal partitions: no communication."""
    copies = []
    for name, tensor in target.items():
        original = source[name]
        if hasattr(tensor, "ds_tensor") != hasattr(original, "ds_tensor"):
            raise FragmentError(f"'{name}' is partitioned in one branch and whole in the other")
        if hasattr(tensor, "ds_tensor"):
            copies.append((tensor.ds_tensor.data, original.ds_tensor.data))
        else:
            copies.append((tensor.data, original.data))
    # One call for an encoder's hundreds of tensors, most of them small.
    torch._foreach_copy_([t for t, _ in copies], [o for _, o in copies])


def refresh_gathered(tensors: Iterable[Tensor]) -> None:
    """Update the gathered copies of small parameters that ZeRO-3 keeps on each rank; collective."""
    gathered = [p for p in tensors if hasattr(p, "ds_tensor") and p.ds_status.name == "AVAILABLE"]
    if gathered:
        gathered[0].partition(gathered)
        gathered[0].all_gather(gathered)


# -- optimizer states ----------------------------------------------------------------------------


class OptimizerStates:
    """fp32 masters and Adam moments of one DeepSpeed optimizer, by parameter name, as views.

    ``zero`` is DeepSpeed's ZeRO optimizer; its ``optimizer`` the torch one inside. Where it keeps
    them on a disk, one group at a time is read, and written back after an `edit`.
    """

    def __init__(self, module: nn.Module, zero):
        self._zero = zero
        self._names = {id(p): n for n, p in named_parameters(module)}

    def flat_masters(self) -> list[Tensor]:
        """The flat fp32 masters, a tensor for each parameter group, in DeepSpeed's order."""
        if hasattr(self._zero, "fp32_partitioned_groups_flat"):
            return list(self._zero.fp32_partitioned_groups_flat)
        return list(self._zero.single_partition_of_fp32_groups)

    def _layout(self) -> Iterator[tuple[str, tuple[int, ...], int, int, int, Tensor]]:
        """For each parameter: name, shape, start of this rank's partition in it, numel of that
        partition, its offset in the flat master, and the flat master."""
        flats = self.flat_masters()
        if hasattr(self._zero, "fp16_groups"):
            for flat, group in zip(flats, self._zero.fp16_groups, strict=True):
                offset = 0
                for p in group:
                    fragment = weight_fragment(p)
                    size = fragment.tensor.numel()
                    yield self._names[id(p)], fragment.shape, fragment.start, size, offset, flat
                    offset += p.ds_tensor.ds_numel
            return
        for flat, group in zip(flats, self._zero.bit16_groups, strict=True):
            for p in group:
                mapping = getattr(p, "_hp_mapping", None)
                if mapping is None:
                    yield self._names[id(p)], full_shape(p), 0, 0, 0, flat
                else:
                    low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
                    name, shape = self._names[id(p)], full_shape(p)
                    yield name, shape, low.start, low.numel, high.start, flat

    def moments(self, flat: Tensor) -> dict[str, Tensor]:
        """The Adam moments of a flat master; empty before the first step."""
        state = self._zero.optimizer.state.get(flat, {})
        return {k: state[k] for k in MOMENTS if k in state}

    def steps(self) -> float:
        """Adam's step count (the same for all groups)."""
        for state in self._zero.optimizer.state.values():
            if "step" in state:
                return float(state["step"])
        return 0.0

    def fragments(self) -> dict[str, Fragment]:
        """``master/NAME``, ``exp_avg/NAME``, ``exp_avg_sq/NAME`` → this rank's fragment, a view.

        Of a group on a disk it is a copy: change that through `edit`.
        """
        fragments = {}
        for flat, layout in self._groups():
            with self._in_memory(flat) as read_from_disk:
                for key, fragment in self._group_fragments(flat, layout):
                    tensor = fragment.tensor.clone() if read_from_disk else fragment.tensor
                    fragments[key] = replace(fragment, tensor=tensor)
        return fragments

    def ranges(self) -> dict[str, tuple[int, int]]:
        """The first element and the one after the last of each of `fragments`, without a look at
        their values."""
        ranges = {}
        for flat, layout in self._groups():
            for kind in (MASTER, *self.moments(flat)):
                for name, _, start, size, _ in layout:
                    ranges[f"{kind}/{name}"] = (start, start + size)
        return ranges

    def edit(self) -> Iterator[tuple[str, Fragment]]:
        """The items of `fragments`, always as views: write to each before asking for the next."""
        for flat, layout in self._groups():
            with self._in_memory(flat, write=True):
                yield from self._group_fragments(flat, layout)

    def _groups(self) -> Iterator[tuple[Tensor, list[tuple]]]:
        """Each flat master with the rows of `_layout` that lie in it."""
        groups: dict[int, tuple[Tensor, list[tuple]]] = {}
        for *row, flat in self._layout():
            groups.setdefault(id(flat), (flat, []))[1].append(row)
        yield from groups.values()

    def _group_fragments(self, flat: Tensor, layout: list[tuple]) -> Iterator[tuple[str, Fragment]]:
        kinds = {MASTER: flat.data, **self.moments(flat)}
        for name, shape, start, size, offset in layout:
            for kind, tensor in kinds.items():
                yield f"{kind}/{name}", Fragment(shape, start, tensor[offset : offset + size])

    @contextmanager
    def _in_memory(self, flat: Tensor, write: bool = False) -> Iterator[bool]:
        """With the group of ``flat`` in memory; yields whether it was read from a disk.

        ``write``: back to the disk at the end.
        """
        swapper = getattr(self._zero, "optimizer_swapper", None)
        if swapper is None or flat.numel():
            yield False
            return
        swapper.swap_in_optimizer_state(parameter=flat)
        try:
            yield True
        finally:
            (swapper.swap_out_optimizer_state if write else swapper.release_swap_buffers)(
                parameter=flat
            )

    def init_moments(self, steps: float) -> None:
        """Zero moments where Adam has none yet, and ``steps`` as its step count."""
        for flat in self.flat_masters():
            state = self._zero.optimizer.state[flat]
            with self._in_memory(flat, write=True):
                for kind in MOMENTS:
                    if kind not in state:
                        state[kind] = torch.zeros_like(flat.data)
            fused = any(g.get("fused") for g in self._zero.optimizer.param_groups)
            state["step"] = torch.tensor(
                float(steps), dtype=torch.float32, device=flat.device if fused else "cpu"
            )
