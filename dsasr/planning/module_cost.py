"""What a module computes and saves, counted by running it on the meta device.

Shapes alone pass through: no weight has memory and nothing is computed. So an encoder's FLOPs and
activations need no formula of its family. Of a stack of equal blocks two are run; the second counts
for all that follow (the first may also make what all share).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from dsasr.planning.flops import PartFlops

aten = torch.ops.aten
# Products with weights; all others that torch counts are of activations with each other.
LINEAR = (aten.mm, aten.addmm, aten.convolution)


class ModuleCost:
    """FLOPs and saved activations of ``module`` on one utterance of n rows.

    ``inputs(n)``: the module's arguments, of tensors on the meta device. ``stack``: equal blocks
    inside, of which the whole has ``blocks``.
    """

    def __init__(
        self,
        module: nn.Module,
        inputs: Callable[[int], tuple[Any, ...]],
        stack: Sequence[nn.Module] = (),
        blocks: int = 0,
    ):
        self.module, self.inputs = module, inputs
        self.stack, self.blocks = stack, blocks
        self._known: dict[tuple, Any] = {}

    def flops(self, n: int) -> PartFlops:
        """FLOPs of the forward pass, as `torch.utils.flop_counter` counts them."""
        if ("flops", n) not in self._known:
            self._known["flops", n] = self._count_flops(n)
        return self._known["flops", n]

    def saved(self, n: int, float32: bool, cpu: bool) -> tuple[int, int]:
        """Bytes kept for the backward pass: (outside the blocks, of each block).

        ``cpu``: dropout keeps values instead of bytes there, and attention with dropout its
        weights.
        """
        key = "saved", n, float32, cpu
        if key not in self._known:
            self._known[key] = self._count_saved(n, float32, cpu)
        return self._known[key]

    def _count_flops(self, n: int) -> PartFlops:
        products = _Products()
        with products, self._marked(lambda: len(products.found)) as marks:
            self.module.eval()(*self.inputs(n))
        front, first, last = marks
        part = PartFlops(0)
        for place, (kind, count, reads_input) in enumerate(products.found):
            found = PartFlops(0, count)
            if kind in LINEAR:
                in_front = count if place < front else 0
                found = PartFlops(count, entry=count if reads_input else 0, front=in_front)
            more = self.blocks - len(self.stack) if first <= place < last else 0
            part += found.times(1 + more)
        return part

    def _count_saved(self, n: int, float32: bool, cpu: bool) -> tuple[int, int]:
        self.module.to(torch.float32 if float32 else torch.bfloat16).train()
        own = [*self.module.parameters(), *self.module.buffers()]
        known = {StorageWeakRef(x.untyped_storage()) for x in own}
        kept: list[torch.UntypedStorage] = []

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if (reference := StorageWeakRef(storage)) not in known:
                known.add(reference)
                kept.append(storage)
            return tensor

        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            _Products(),
            _Saving(cpu),
            self._marked(lambda: len(kept)) as marks,
        ):
            self.module(*self.inputs(n))
        _, first, last = marks
        inside = sum(storage.nbytes() for storage in kept[first:last])
        whole = sum(storage.nbytes() for storage in kept)
        return whole - len(self.stack) * inside, inside

    @contextmanager
    def _marked(self, place: Callable[[], int]) -> Iterator[list[int]]:
        """``place`` at the first block's begin, and at the last one's begin and end."""
        marks = [0, 0, 0]

        def mark(number: int) -> Callable[..., None]:
            return lambda *_: marks.__setitem__(number, place())

        handles = []
        if self.stack:
            handles = [
                self.stack[0].register_forward_pre_hook(mark(0)),
                self.stack[-1].register_forward_pre_hook(mark(1)),
                self.stack[-1].register_forward_hook(mark(2)),
            ]
        try:
            yield marks
        finally:
            for handle in handles:
                handle.remove()


class _Products(TorchDispatchMode):
    """Lists each product in order: its kind, its FLOPs, whether it is of the module's input.

    No gradient leads from there to a parameter; all else depends on one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Any, int, bool]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is aten._local_scalar_dense.default and args[0].is_meta:
            return 0  # transformers checks whether nothing is padded: something is
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in flop_registry:
            count = flop_registry[packet](*args, **(kwargs or {}), out_val=out)
            read = args[1 if packet is aten.addmm else 0]
            self.found.append((packet, count, not read.requires_grad))
        return out


class _Saving(TorchFunctionMode):
    """Attention and dropout as a machine runs them, not as the meta device takes them apart."""

    def __init__(self, cpu: bool) -> None:
        super().__init__()
        self.cpu = cpu

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention and not (self.cpu and kwargs.get("dropout_p")):
            return _fused_attention(*args, **kwargs)
        if func is F.dropout and not self.cpu:
            return _dropout(*args, **kwargs)
        return func(*args, **kwargs)


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
    fused = aten._scaled_dot_product_efficient_attention
    return fused(query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale)[0]


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(input, p, True)[0] if training and p else input
