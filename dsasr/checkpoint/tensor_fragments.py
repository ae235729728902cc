"""Tensor fragments: every rank writes the slices that it owns and reads the slices that it needs.

A *fragment* (DeepSpeed's ``tensor_fragment``) is a contiguous range of a flattened tensor. Ranks of
a ZeRO job own fragments of parameters and of optimizer states. Snapshots and checkpoints are
folders of such fragments (safetensors, one file per rank) and a manifest. No rank ever gathers a
whole model to write one, and a reader in a job of any world size reads only the ranges that it
owns, from any number of files.

A folder is written under a temporary name, fsynced and renamed ("Whole or not at all").
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from safetensors import SafetensorError, safe_open

from dsasr.checkpoint.manifest import FragmentError, manifest_of, read_manifest, write_manifest
from dsasr.checkpoint.safetensors_writer import write_tensors
from dsasr.utils import distributed
from dsasr.utils.io import replace_folder, staging_folder

T = TypeVar("T")


@dataclass(frozen=True)
class Fragment:
    """A range of a flattened tensor: ``tensor`` (1-D) begins at element ``start`` of the tensor of
    ``shape``."""

    shape: tuple[int, ...]
    start: int
    tensor: torch.Tensor

    @property
    def stop(self) -> int:
        return self.start + self.tensor.numel()


def on_all_ranks(read: Callable[[], T]) -> T:
    """Call ``read`` on every rank; where it raises on one, raise `FragmentError` on all.

    Collective ("No rank alone").
    """
    problem, result = None, None
    try:
        result = read()
    except (FragmentError, OSError) as error:
        problem = str(error)
    problems = [p for p in distributed.all_gather_object(problem) if p]
    if problems:
        raise FragmentError(problems[0])
    return result


# -- writing -------------------------------------------------------------------------------------


def write_folder(
    target: Path, fragments: Mapping[str, Fragment], info: Mapping[str, Any]
) -> dict[str, Any]:
    """Publish the fragments of all ranks as the folder ``target``; collective.

    ``info`` goes into the manifest, which is returned. When any rank cannot write (a full disk,
    say), `OSError` with the first such rank's reason is raised on all ranks, and ``target`` is as
    it was.
    """
    staging, name = staging_folder(target), rank_file(distributed.rank())
    if distributed.is_main_rank():
        shutil.rmtree(staging, ignore_errors=True)
    distributed.barrier()
    failure, digest = None, None
    try:
        staging.mkdir(parents=True, exist_ok=True)
        digest = write_file(staging / name, fragments)
    except OSError as error:
        failure = f"rank {distributed.rank()}: {error}"
    results = distributed.all_gather_object((name, digest, failure))
    manifest = manifest_of(info, {n: d for n, d, _ in results})
    failures = [f for _, _, f in results if f]
    if not failures and distributed.is_main_rank():
        try:
            publish(staging, target, manifest)
        except OSError as error:
            failures = [str(error)]
    failures = distributed.broadcast(failures)
    if failures:
        if distributed.is_main_rank():
            shutil.rmtree(staging, ignore_errors=True)
        raise OSError(f"could not write {target}: {failures[0]}")
    return manifest


def rank_file(rank: int) -> str:
    """The name of a rank's file in a folder of fragments."""
    return f"rank-{rank:05d}.safetensors"


def write_file(path: Path, fragments: Mapping[str, Fragment]) -> str:
    """Write one rank's file, fsynced; returns its sha256. Raises `OSError`."""
    tensors = {k: f.tensor for k, f in fragments.items() if f.tensor.numel()}
    layout = {k: [list(f.shape), f.start] for k, f in fragments.items()}
    return write_tensors(path, tensors, {"layout": json.dumps(layout)})


def publish(staging: Path, target: Path, manifest: Mapping[str, Any]) -> None:
    """Add the manifest to ``staging``, which has the files of all ranks, and rename it."""
    write_manifest(staging, manifest)
    replace_folder(staging, target)


# -- checksums -----------------------------------------------------------------------------------


def checksum(fragments: Mapping[str, Fragment]) -> str:
    """64 bits over the elements of all ranks' fragments, independent of the partition; collective.

    Σ (bits + 1)·(2·(position + key) + 1) mod 2⁶⁴ (**ours**): a sum, so that ranks add up, in which
    the weight of an element depends on its position. Each element must lie on exactly one rank.
    """
    total = torch.zeros((), dtype=torch.int64, device=distributed.device())
    for key, fragment in fragments.items():
        flat = fragment.tensor.detach().contiguous()
        bits = flat.view(_BITS[flat.element_size()])
        salt = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=6).digest(), "big")
        for low in range(0, bits.numel(), _BLOCK):
            block = bits[low : low + _BLOCK].to(torch.int64) + 1
            first = 2 * (fragment.start + low + salt) + 1
            steps = _even_numbers(block.numel(), block.device)
            # Σ (b + 1)(2i + first) in two products, without a tensor for the weights.
            total += (block * steps).sum() + block.sum() * first
    return f"{int(distributed.all_reduce_sum(total)) % 2**64:016x}"


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_BLOCK = 1 << 17  # elements at a time: what a core's cache can keep


@functools.lru_cache(maxsize=8)
def _even_numbers(count: int, device: torch.device) -> torch.Tensor:
    """0, 2, 4 … below 2·``count``."""
    return torch.arange(0, 2 * count, 2, device=device)


def all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether no element is infinite or NaN; by a sum in float64, which shows both."""
    return all(
        math.isfinite(float(t.sum(dtype=torch.float64))) for t in tensors if t.is_floating_point()
    )


def file_digest(path: Path) -> str:
    """The sha256 of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# -- reading -------------------------------------------------------------------------------------


def verify(folder: Path) -> dict[str, Any]:
    """The manifest, after each file's sha256 was compared with it.

    Raises `FragmentError` for a missing, unreadable or altered file.
    """
    manifest = read_manifest(folder)
    for name, expected in manifest["files"].items():
        path = folder / Path(name).name
        if not path.is_file():
            raise FragmentError(f"{folder} lacks {name}")
        try:
            digest = file_digest(path)
        except OSError as error:
            raise FragmentError(f"{path} cannot be read: {error}") from None
        if digest != expected:
            raise FragmentError(f"{path} was altered: its sha256 is not the manifest's")
    return manifest


class Reader(Protocol):
    """Tensors by key: whole, or a range of the flattened tensor, so that a rank reads its own."""

    folder: Path
    shapes: Mapping[str, tuple[int, ...]]

    def __contains__(self, key: str) -> bool: ...

    def read(self, key: str, start: int, stop: int) -> torch.Tensor: ...

    def whole(self, key: str) -> torch.Tensor: ...


class FragmentReader:
    """Random access to the tensors of a published folder, by key and range.

    Raises `FragmentError` where the manifest or a file cannot be read. Checksums are not compared
    (`verify` does that).
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self._files: dict[str, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._ranges: dict[str, list[tuple[int, int, str]]] = {}
        for name in sorted(self.manifest["files"]):
            file = self._open(name)
            stored = set(file.keys())
            for key, (shape, start) in self._layout(name).items():
                if self.shapes.setdefault(key, shape) != shape:
                    raise FragmentError(f"{self.folder}: its files disagree on the shape of {key}")
                if key in stored:
                    size = _flat_size(file.get_slice(key).get_shape())
                    if start + size > _numel(shape):
                        raise FragmentError(f"{self.folder / name}: '{key}' is not of its shape")
                    self._ranges.setdefault(key, []).append((start, start + size, name))
        for key, shape in self.shapes.items():
            self._check_whole(key, _numel(shape))

    def _check_whole(self, key: str, numel: int) -> None:
        at = 0
        for low, high, _ in sorted(self._ranges.get(key, [])):
            at = max(at, high) if low <= at else at
        if at < numel:
            raise FragmentError(f"{self.folder} lacks elements of '{key}', from {at} on")

    def _layout(self, name: str) -> dict[str, tuple[tuple[int, ...], int]]:
        """Key → shape and first element of what a file has of it."""
        try:
            layout = json.loads((self._open(name).metadata() or {})["layout"])
            rows = {key: (tuple(shape), start) for key, (shape, start) in layout.items()}
        except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
            raise FragmentError(f"{self.folder / name} has no layout of its tensors") from None
        for key, (shape, start) in rows.items():
            if not all(type(n) is int and n >= 0 for n in (*shape, start)):
                raise FragmentError(f"{self.folder / name}: the layout of '{key}' is no layout")
        return rows

    def _open(self, name: str):
        """The file of that name, mapped once: its header is long, and reads are many."""
        if name not in self._files:
            try:
                self._files[name] = safe_open(self.folder / Path(name).name, framework="pt")
            except (OSError, SafetensorError) as error:
                raise FragmentError(f"{self.folder / name} cannot be read: {error}") from None
        return self._files[name]

    def __contains__(self, key: str) -> bool:
        return key in self.shapes

    def keys(self) -> Iterable[str]:
        return self.shapes.keys()

    def is_float32(self, key: str) -> bool:
        """Whether the tensor is stored in float32; False for one without elements."""
        parts = self._ranges.get(key)
        return bool(parts) and self._open(parts[0][2]).get_slice(key).get_dtype() == "F32"

    def read(self, key: str, start: int, stop: int) -> torch.Tensor:
        """Elements ``start`` to ``stop`` of the flattened tensor: a new 1-D tensor on the CPU."""
        if key not in self.shapes:
            raise FragmentError(f"{self.folder} holds no '{key}'")
        parts, at = [], start
        if stop <= start:
            return torch.empty(0)
        for low, high, name in sorted(self._ranges.get(key, [])):
            if at < stop and low <= at < high:
                end = min(stop, high)
                parts.append(self._open(name).get_slice(key)[at - low : end - low])
                at = end
        if at < stop:
            raise FragmentError(f"{self.folder} lacks elements {at} to {stop} of '{key}'")
        return torch.cat(parts) if len(parts) != 1 else parts[0]

    def whole(self, key: str) -> torch.Tensor:
        """The whole tensor of ``key``, in its own shape."""
        shape = self.shapes.get(key, ())
        return self.read(key, 0, _numel(shape)).reshape(shape)


class PrefixReader:
    """A `FragmentReader` of the keys that begin with ``prefix``, which is left out of them."""

    def __init__(self, reader: FragmentReader, prefix: str):
        self._reader, self._prefix = reader, prefix
        self.folder = reader.folder
        self.shapes = {
            key.removeprefix(prefix): shape
            for key, shape in reader.shapes.items()
            if key.startswith(prefix)
        }

    def __contains__(self, key: str) -> bool:
        return key in self.shapes

    def read(self, key: str, start: int, stop: int) -> torch.Tensor:
        return self._reader.read(self._prefix + key, start, stop)

    def whole(self, key: str) -> torch.Tensor:
        return self._reader.whole(self._prefix + key)


def _numel(shape: tuple[int, ...]) -> int:
    return math.prod(shape)


def _flat_size(shape: list[int]) -> int:
    """Elements of a stored tensor, which must be flat; for another shape, so many that the layout
    is refused."""
    return shape[0] if len(shape) == 1 else sys.maxsize
