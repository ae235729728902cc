"""Masters and moments moved between ranks, where an engine partitions them otherwise.

Under ZeRO-1 and 2 the range of a parameter's master that a rank has depends on the other parameters
that train with it. Another stage, another branch or a checkpoint has other ranges.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from dsasr.checkpoint.tensor_fragments import Fragment
from dsasr.utils import distributed

Range = tuple[int, int]  # first element, and the one after the last, of a flattened tensor
BLOCK = 1 << 26  # elements of a tensor that are exchanged at a time


def repartition(
    fragments: Mapping[str, Fragment], ranges: Mapping[str, Range]
) -> dict[str, Fragment]:
    """The fp32 tensors of ``fragments`` that ``ranges`` names, each as the range given there.

    Each element must be on exactly one rank, and it is on each rank whose range has it afterwards,
    bit for bit. Where all ranks have their ranges already, nothing is copied. Collective. Raises
    RuntimeError where the ranks together lack elements.
    """
    wanted = {key: fragments[key] for key in ranges if key in fragments}
    moved = {
        key: (fragment.shape, fragment.start, fragment.stop)
        for key, fragment in wanted.items()
        if not _is_range(fragment, ranges[key])
    }
    if not distributed.any_rank(bool(moved)):
        return wanted
    shapes: dict[str, tuple[int, ...]] = {}
    for row in distributed.all_gather_object({key: shape for key, (shape, _, _) in moved.items()}):
        shapes |= row
    _check_complete(fragments, shapes)
    for key in sorted(shapes):
        own = fragments.get(key)
        low, high = ranges.get(key, (0, 0))
        tensor = _exchanged(own, torch.Size(shapes[key]).numel(), low, high)
        if key in wanted:
            wanted[key] = replace(own, start=low, tensor=tensor.to(own.tensor.device))
    return wanted


def _is_range(fragment: Fragment, wanted: Range) -> bool:
    empty = fragment.tensor.numel() == 0 and wanted[0] == wanted[1]
    return empty or (fragment.start, fragment.stop) == wanted


def _check_complete(fragments: Mapping[str, Fragment], shapes: Mapping[str, tuple]) -> None:
    """Zeros must not stand for elements that no rank has."""
    counts = torch.tensor(
        [fragments[k].tensor.numel() if k in fragments else 0 for k in sorted(shapes)],
        device=distributed.device(),
    )
    for key, count in zip(sorted(shapes), distributed.all_reduce_sum(counts).tolist(), strict=True):
        numel = torch.Size(shapes[key]).numel()
        if count != numel:
            raise RuntimeError(f"the ranks hold {count:,} of the {numel:,} elements of '{key}'")


def _exchanged(own: Fragment | None, numel: int, low: int, high: int) -> torch.Tensor:
    """Elements ``low`` to ``high`` of a tensor of ``numel``, of which ``own`` is this rank's
    fragment.

    Ranks add up the bits as integers, each with zeros where the others' elements are: as floats,
    -0.0 would become 0.0.
    """
    result = torch.empty(high - low, dtype=torch.int32, device=distributed.device())
    for first in range(0, numel, BLOCK):
        last = min(first + BLOCK, numel)
        block = torch.zeros(last - first, dtype=torch.int32, device=distributed.device())
        if own is not None:
            a, b = max(first, own.start), min(last, own.stop)
            if a < b:
                bits = own.tensor.contiguous().view(torch.int32)
                block[a - first : b - first] = bits[a - own.start : b - own.start]
        distributed.all_reduce_sum(block)
        a, b = max(first, low), min(last, high)
        if a < b:
            result[a - low : b - low] = block[a - first : b - first]
    return result.view(torch.float32)
