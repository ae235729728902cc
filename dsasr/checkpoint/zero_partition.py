"""Where a parameter's weights and optimizer states lie on this rank, under any ZeRO stage.

Everything that reads or writes them (offloader, hot-swap, snapshots, checkpoints) goes through the
views given here, one `Fragment` a parameter and kind of state, so that none of it depends on
DeepSpeed's layout:

- ZeRO-3: each rank holds the same range of a parameter (``ds_tensor``) and of its fp32 master.
- ZeRO-1 and 2: weights are whole on every rank, masters are cut at arbitrary places.
- before DeepSpeed has seen the module, weights are whole and there are no masters.

Whole weights are shared out evenly when written, so a folder never holds them twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from dsasr.checkpoint.tensor_fragments import Fragment, FragmentError, FragmentReader, all_finite
from dsasr.model.lora import plain_name
from dsasr.utils import distributed

T = TypeVar("T")
MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")


def parameters(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Parameter]]:
    """Named parameters of all of ``module``, or of a child by ``"NAME."``; tied ones once.

    Names are those of files: without what LoRA's layers add to them.
    """
    path = prefix.rstrip(".")
    for name, parameter in module.get_submodule(path).named_parameters(prefix=path):
        yield plain_name(name), parameter


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The parameter's shape, also while ZeRO-3 has partitioned it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def weight(parameter: nn.Parameter) -> Fragment:
    """A view of the weights that this rank answers for."""
    shape = full_shape(parameter)
    numel = torch.Size(shape).numel()
    if hasattr(parameter, "ds_tensor"):
        held = parameter.ds_tensor.data
        start = min(distributed.rank() * held.numel(), numel)
        return Fragment(shape, start, held[: min(held.numel(), numel - start)])
    share = -(-numel // distributed.world_size())
    start = min(distributed.rank() * share, numel)
    return Fragment(shape, start, parameter.data.reshape(-1)[start : min(start + share, numel)])


def piece(parameter: nn.Parameter, start: int, stop: int) -> Tensor:
    """Elements ``start`` to ``stop`` of the flattened weights, which must lie on this rank."""
    if hasattr(parameter, "ds_tensor"):
        held = weight(parameter)
        return held.tensor[start - held.start : stop - held.start]
    return parameter.data.reshape(-1)[start:stop]


def weights(module: nn.Module, prefix: str = "") -> dict[str, Fragment]:
    """Name → weights that this rank answers for; buffers are rank 0's."""
    held = {name: weight(p) for name, p in parameters(module, prefix)}
    for name, buffer in persistent_buffers(module, prefix):
        flat = buffer.reshape(-1)
        held[name] = Fragment(
            tuple(buffer.shape), 0, flat if distributed.is_main_rank() else flat[:0]
        )
    return held


def persistent_buffers(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Named buffers that belong to the state dict."""
    top = prefix.rstrip(".")
    for path, child in module.get_submodule(top).named_modules(prefix=top):
        for name, buffer in child._buffers.items():
            if buffer is not None and name not in child._non_persistent_buffers_set:
                yield plain_name(f"{path}.{name}") if path else name, buffer


def load_weights(module: nn.Module, reader: FragmentReader, prefix: str = "") -> None:
    """Fill ``module``'s weights and buffers from ``reader``; each rank reads what it holds.

    Checks names and shapes of everything before the first byte is changed: `FragmentError` when the
    folder is of another architecture, and the module is then as it was. The caller refreshes
    gathered copies afterwards (`refresh_gathered`). Collective.
    """
    agree(lambda: _check_layout(module, reader, prefix))
    for name, target in tensors(module, prefix).items():
        _fill(target, _piece(reader, name, target))


def replace_weights(module: nn.Module, reader: FragmentReader, prefix: str = "") -> None:
    """`load_weights` into a module that must survive a bad folder; collective.

    Everything is read, and looked at, on every rank before the first weight is changed on any:
    `FragmentError` on all ranks, with one rank's reason, when a weight is missing, unreadable or
    not finite. Holds a second copy of this rank's slices meanwhile.
    """

    def read() -> list[Tensor]:
        _check_layout(module, reader, prefix)
        pieces = []
        for name, target in targets.items():
            piece = _piece(reader, name, target)
            if not all_finite([piece]):
                raise FragmentError(f"{reader.folder} holds '{name}' with values not finite")
            pieces.append(piece)
        return pieces

    targets = tensors(module, prefix)
    for target, piece in zip(targets.values(), agree(read), strict=True):
        _fill(target, piece)


def agree(attempt: Callable[[], T]) -> T:
    """``attempt()``; where it cannot read on one rank, `FragmentError` is raised on all."""
    problem, result = None, None
    try:
        result = attempt()
    except (FragmentError, OSError) as error:
        problem = str(error)
    problems = [p for p in distributed.all_gather_object(problem) if p]
    if problems:
        raise FragmentError(problems[0])
    return result


def _check_layout(module: nn.Module, reader: FragmentReader, prefix: str) -> None:
    wanted = {n: full_shape(p) for n, p in parameters(module, prefix)}
    wanted |= {n: tuple(b.shape) for n, b in persistent_buffers(module, prefix)}
    for name, shape in wanted.items():
        if name not in reader:
            raise FragmentError(f"{reader.folder} holds no '{name}': another architecture")
        if reader.shapes[name] != shape:
            raise FragmentError(
                f"{reader.folder} holds '{name}' of shape {list(reader.shapes[name])}, "
                f"this model has {list(shape)}: another architecture"
            )


def tensors(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """Name → parameter or persistent buffer."""
    return dict(parameters(module, prefix)) | dict(persistent_buffers(module, prefix))


def _piece(reader: FragmentReader, name: str, target: Tensor) -> Tensor:
    """What this rank holds of ``name``: its slice under ZeRO-3, else all of it."""
    if hasattr(target, "ds_tensor"):
        held = weight(target)
        return reader.read(name, held.start, held.stop)
    return reader.whole(name)


def _fill(target: Tensor, piece: Tensor) -> None:
    if hasattr(target, "ds_tensor"):
        weight(target).tensor.copy_(piece)
    else:
        target.data.copy_(piece)


def copy_weights(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    """Copy between two modules' `tensors`, of equal partition layout: no communication."""
    pairs = []
    for name, tensor in target.items():
        other = source[name]
        if hasattr(tensor, "ds_tensor") != hasattr(other, "ds_tensor"):
            raise FragmentError(f"'{name}' is partitioned in one branch and whole in the other")
        whole = not hasattr(tensor, "ds_tensor")
        pairs.append(
            (tensor.data, other.data) if whole else (tensor.ds_tensor.data, other.ds_tensor.data)
        )
    # One call for an encoder's hundreds of tensors, most of them small.
    torch._foreach_copy_([t for t, _ in pairs], [s for _, s in pairs])


def refresh_gathered(held: Iterable[Tensor]) -> None:
    """Bring ZeRO-3's resident copies of small parameters up to date; collective."""
    resident = [p for p in held if hasattr(p, "ds_tensor") and p.ds_status.name == "AVAILABLE"]
    if resident:
        resident[0].partition(resident)
        resident[0].all_gather(resident)


class OptimizerStates:
    """fp32 masters and Adam moments of one DeepSpeed optimizer, by parameter name, as views.

    ``zero`` is DeepSpeed's ZeRO optimizer; its ``optimizer`` the torch one inside. Where it keeps
    them on a disk, a group at a time is read, and written again if it was to be `edited`.
    """

    def __init__(self, module: nn.Module, zero):
        self._zero = zero
        self._names = {id(p): n for n, p in parameters(module)}

    def flats(self) -> list[Tensor]:
        """The flat fp32 masters, in DeepSpeed's order."""
        if hasattr(self._zero, "fp32_partitioned_groups_flat"):
            return list(self._zero.fp32_partitioned_groups_flat)
        return list(self._zero.single_partition_of_fp32_groups)

    def _places(self) -> Iterator[tuple[str, tuple[int, ...], int, int, int, Tensor]]:
        """(name, shape, start in the parameter, numel, offset in the flat, flat) of each piece."""
        flats = self.flats()
        if hasattr(self._zero, "fp16_groups"):
            for flat, group in zip(flats, self._zero.fp16_groups, strict=True):
                at = 0
                for p in group:
                    fragment = weight(p)
                    size = fragment.tensor.numel()
                    yield self._names[id(p)], fragment.shape, fragment.start, size, at, flat
                    at += p.ds_tensor.ds_numel
            return
        for index, group in enumerate(self._zero.bit16_groups):
            for p in group:
                piece = getattr(p, "_hp_mapping", None)
                if piece is None:
                    yield self._names[id(p)], full_shape(p), 0, 0, 0, flats[index]
                else:
                    low, high = piece.lp_fragment_address, piece.hp_fragment_address
                    yield (
                        *(self._names[id(p)], full_shape(p), low.start, low.numel),
                        *(high.start, flats[index]),
                    )

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

    def views(self) -> dict[str, Fragment]:
        """``master/NAME``, ``exp_avg/NAME``, ``exp_avg_sq/NAME`` → this rank's piece.

        Of a group that is on a disk these are copies: change them through `edited`.
        """
        held = {}
        for flat, pieces in self._by_flat():
            with self._at_hand(flat) as borrowed:
                for key, fragment in self._pieces(flat, pieces):
                    kept = fragment.tensor.clone() if borrowed else fragment.tensor
                    held[key] = replace(fragment, tensor=kept)
        return held

    def edited(self) -> Iterator[tuple[str, Fragment]]:
        """The same as views in every case, to be written to before the next one is asked for."""
        for flat, pieces in self._by_flat():
            with self._at_hand(flat, write=True):
                yield from self._pieces(flat, pieces)

    def _by_flat(self) -> Iterator[tuple[Tensor, list[tuple]]]:
        groups: dict[int, tuple[Tensor, list[tuple]]] = {}
        for *place, flat in self._places():
            groups.setdefault(id(flat), (flat, []))[1].append(place)
        yield from groups.values()

    def _pieces(self, flat: Tensor, pieces: list[tuple]) -> Iterator[tuple[str, Fragment]]:
        kinds = {MASTER: flat.data, **self.moments(flat)}
        for name, shape, start, size, at in pieces:
            for kind, tensor in kinds.items():
                yield f"{kind}/{name}", Fragment(shape, start, tensor[at : at + size])

    @contextmanager
    def _at_hand(self, flat: Tensor, write: bool = False) -> Iterator[bool]:
        """With the group of ``flat`` in memory; whether it had to be read from a disk for that."""
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

    def make_moments(self, steps: float) -> None:
        """Zero moments with ``steps`` on the counter, where Adam has none yet."""
        for flat in self.flats():
            state = self._zero.optimizer.state[flat]
            with self._at_hand(flat, write=True):
                for kind in MOMENTS:
                    if kind not in state:
                        state[kind] = torch.zeros_like(flat.data)
            fused = any(g.get("fused") for g in self._zero.optimizer.param_groups)
            state["step"] = torch.tensor(
                float(steps), dtype=torch.float32, device=flat.device if fused else "cpu"
            )
