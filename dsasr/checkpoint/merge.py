"""Checkpoints against each other: the mean of several, and what differs between two.

Tensor by tensor, so that memory does not grow with the model; of any world sizes.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dsasr.checkpoint import tensor_fragments
from dsasr.checkpoint.safetensors_writer import LazyTensor, write_tensors
from dsasr.checkpoint.tensor_fragments import FragmentError, FragmentReader
from dsasr.checkpoint.zero_partition import MASTER, MOMENTS
from dsasr.utils.errors import UserError
from dsasr.utils.io import atomic_write, fsync_dir


def opened(path: Path) -> FragmentReader:
    """A checkpoint or a published encoder, its checksums verified; else `UserError`."""
    try:
        tensor_fragments.verify(path)
        return FragmentReader(path)
    except FragmentError as error:
        raise UserError(str(error)) from None


def weights(reader: FragmentReader) -> list[str]:
    """The keys of the model's weights: neither masters nor moments."""
    states = {MASTER, *MOMENTS}
    return sorted(k for k in reader.keys() if not states & set(k.split("/")[:-1]))  # noqa: SIM118


def average(
    readers: Sequence[FragmentReader],
    target: Path,
    progress: Callable[[str], Any] = lambda key: None,
) -> Path:
    """The mean of the weights, summed in float64, as a checkpoint of its own at ``target``.

    It holds weights alone: to evaluate or export, not to resume. Raises `UserError` when the
    checkpoints are of different models or ``target`` exists.
    """
    if len(readers) < 2:
        raise UserError("an average takes at least two checkpoints")
    if target.exists():
        raise UserError(f"{target} exists: give a new folder")
    keys, first = weights(readers[0]), readers[0]
    for reader in readers[1:]:
        if weights(reader) != keys or any(reader.shapes[k] != first.shapes[k] for k in keys):
            raise UserError(f"{reader.folder} is of another model than {first.folder}")

    def mean(key: str) -> torch.Tensor:
        progress(key)
        total = sum(reader.whole(key).double() for reader in readers)
        return (total / len(readers)).to(dtype(key)).reshape(-1)

    def dtype(key: str) -> torch.dtype:
        return first.read(key, 0, 1).dtype

    tensors = {
        k: LazyTensor(dtype(k), (math.prod(first.shapes[k]),), lambda k=k: mean(k)) for k in keys
    }
    layout = {key: [list(first.shapes[key]), 0] for key in keys}
    staging = tensor_fragments.staging_of(target)
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        name = "rank-00000.safetensors"
        digest = write_tensors(staging / name, tensors, {"layout": json.dumps(layout)})
        manifest = {
            "format": tensor_fragments.FORMAT,
            "kind": "average",
            "steps": max(int(r.manifest.get("steps", 0)) for r in readers),
            "of": [r.folder.name for r in readers],
            "files": {name: digest},
        }
        atomic_write(staging / tensor_fragments.MANIFEST, json.dumps(manifest, indent=1))
        staging.rename(target)
        fsync_dir(target.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


@dataclass(frozen=True)
class Difference:
    """Of one tensor: ``relative`` is ‖a − b‖ / ‖a‖, ``largest`` the largest |a − b|; None where
    the tensor is in one of the two only, or of another shape there (``why``)."""

    key: str
    elements: int
    differing: int
    relative: float | None
    largest: float | None
    why: str = ""


def compare(one: FragmentReader, other: FragmentReader) -> Iterator[Difference]:
    """Tensor by tensor, in the order of their names; equal ones too."""
    keys, others = weights(one), weights(other)
    for key in sorted({*keys, *others}):
        if key not in one or key not in other:
            where = one if key in one else other
            size = math.prod(where.shapes[key])
            yield Difference(key, size, size, None, None, f"only in {where.folder}")
        elif one.shapes[key] != other.shapes[key]:
            why = f"{list(one.shapes[key])} against {list(other.shapes[key])}"
            size = math.prod(one.shapes[key])
            yield Difference(key, size, size, None, None, why)
        else:
            a, b = one.whole(key).double(), other.whole(key).double()
            gap = (a - b).abs()
            norm = float(a.norm())
            relative = float(gap.norm()) / norm if norm else float(gap.norm() > 0)
            largest = float(gap.max()) if gap.numel() else 0.0
            yield Difference(key, a.numel(), int((a != b).sum()), relative, largest)
