"""Average the weights of several checkpoints, and compare those of two.

Tensor by tensor, so that memory does not grow with the model. The checkpoints may be of different
world sizes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dsasr.checkpoint import tensor_fragments
from dsasr.checkpoint.architecture import hidden_differences
from dsasr.checkpoint.manifest import manifest_of, write_manifest
from dsasr.checkpoint.safetensors_writer import LazyTensor, write_tensors
from dsasr.checkpoint.tensor_fragments import FragmentReader
from dsasr.checkpoint.zero_partition import MASTER, MOMENTS
from dsasr.utils.errors import UserError
from dsasr.utils.io import atomic_folder


def weight_keys(reader: FragmentReader) -> list[str]:
    """The sorted keys of the model's weights: neither masters nor moments."""
    states = {MASTER, *MOMENTS}
    return sorted(k for k in reader.keys() if not states & set(k.split("/")[:-1]))  # noqa: SIM118


def average(
    readers: Sequence[FragmentReader],
    target: Path,
    progress: Callable[[str], Any] = lambda key: None,
) -> Path:
    """Write the mean of the weights, summed in float64, as a checkpoint at ``target``.

    It has weights alone: to evaluate or export, not to resume. ``progress`` is called with each
    tensor's key. Raises `UserError` when the checkpoints are of different models or ``target``
    exists.
    """
    if len(readers) < 2:
        raise UserError("an average takes at least two checkpoints")
    if target.exists():
        raise UserError(f"{target} exists: give a new folder")
    keys, first = weight_keys(readers[0]), readers[0]
    for reader in readers[1:]:
        if weight_keys(reader) != keys or any(reader.shapes[k] != first.shapes[k] for k in keys):
            raise UserError(f"{reader.folder} is of another model than {first.folder}")
        models = [(r.manifest.get("recipe") or {}).get("model") or {} for r in (reader, first)]
        if differ := hidden_differences(*models):
            raise UserError(
                f"{reader.folder} is of another model than {first.folder}: {' '.join(differ)}"
            )

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
    manifest = {
        "kind": "average",
        "steps": max(int(r.manifest.get("steps", 0)) for r in readers),
        "of": [r.folder.name for r in readers],
    }
    # What the weights are of, wherever the folder goes.
    manifest |= {k: first.manifest[k] for k in ("recipe", "vocabularies") if k in first.manifest}
    with atomic_folder(target) as folder:
        name = tensor_fragments.rank_file(0)
        digest = write_tensors(folder / name, tensors, {"layout": json.dumps(layout)})
        write_manifest(folder, manifest_of(manifest, {name: digest}))
    return target


@dataclass(frozen=True)
class TensorDifference:
    """How a tensor of two checkpoints differs: ``relative`` is ‖a − b‖ / ‖a‖, ``largest`` the
    largest |a − b|; both None where it is in one of them only, or of another shape (``why``)."""

    key: str
    elements: int
    differing: int
    relative: float | None
    largest: float | None
    why: str = ""


def compare(first: FragmentReader, second: FragmentReader) -> Iterator[TensorDifference]:
    """Compare tensor by tensor, in the order of their keys; equal ones are yielded too."""
    first_keys, second_keys = weight_keys(first), weight_keys(second)
    for key in sorted({*first_keys, *second_keys}):
        if key not in first or key not in second:
            reader = first if key in first else second
            size = math.prod(reader.shapes[key])
            yield TensorDifference(key, size, size, None, None, f"only in {reader.folder}")
        elif first.shapes[key] != second.shapes[key]:
            why = f"{list(first.shapes[key])} against {list(second.shapes[key])}"
            size = math.prod(first.shapes[key])
            yield TensorDifference(key, size, size, None, None, why)
        else:
            a, b = first.whole(key).double(), second.whole(key).double()
            gap = (a - b).abs()
            norm = float(a.norm())
            relative = float(gap.norm()) / norm if norm else float(gap.norm() > 0)
            largest = float(gap.max()) if gap.numel() else 0.0
            yield TensorDifference(key, a.numel(), int((a != b).sum()), relative, largest)
