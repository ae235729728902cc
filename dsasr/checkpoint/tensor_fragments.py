"""Tensors in pieces: every rank writes the slices that it owns, and reads the slices that it needs.

A *fragment* is a contiguous range of a flattened tensor. Ranks of a ZeRO job own fragments of
parameters and of optimizer states; snapshots, checkpoints and exports are folders of such fragments
(safetensors, one file a rank) plus a manifest. No rank ever gathers a whole model to write one, and
a reader of any world size takes from any number of files just the ranges that it owns.

A folder is written under a temporary name, fsynced and renamed: it is there whole or not at all.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dsasr.checkpoint.safetensors_writer import write_tensors
from dsasr.utils import distributed
from dsasr.utils.io import atomic_write, fsync_dir

MANIFEST = "manifest.json"
FORMAT = 1


class FragmentError(Exception):
    """A folder of fragments is torn, altered, or does not hold what is asked of it."""


@dataclass(frozen=True)
class Fragment:
    """``tensor`` (1-D) is the range from ``start`` on of the flattened tensor of ``shape``."""

    shape: tuple[int, ...]
    start: int
    tensor: torch.Tensor

    @property
    def stop(self) -> int:
        return self.start + self.tensor.numel()


def write_folder(
    target: Path, fragments: Mapping[str, Fragment], info: Mapping[str, Any]
) -> dict[str, Any]:
    """Publish ``fragments`` of all ranks as the folder ``target``; collective.

    Returns the manifest. Raises `OSError` on every rank, with the first rank's reason, when any
    rank could not write (a full disk, say); nothing appears at ``target`` then.
    """
    staging = staging_of(target)
    name = f"rank-{distributed.rank():05d}.safetensors"
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
    manifest = {"format": FORMAT, **info, "files": {n: d for n, d, _ in results}}
    failures = [f for _, _, f in results if f]
    if not failures and distributed.is_main_rank():
        try:
            atomic_write(staging / MANIFEST, json.dumps(manifest, indent=1))
            replace_folder(staging, target)
        except OSError as error:
            failures = [str(error)]
    failures = distributed.broadcast(failures)
    if failures:
        if distributed.is_main_rank():
            shutil.rmtree(staging, ignore_errors=True)
        raise OSError(f"could not write {target}: {failures[0]}")
    return manifest


def staging_of(target: Path) -> Path:
    """Where ``target`` is written before it is renamed: readers pass such names over."""
    return target.parent / f".{target.name}.tmp"


def replace_folder(staging: Path, target: Path) -> None:
    """Rename ``staging`` to ``target``; an older folder of that name goes only afterwards."""
    old = target.parent / f".{target.name}.old.tmp"
    shutil.rmtree(old, ignore_errors=True)
    fsync_dir(staging)
    if target.exists():
        os.rename(target, old)
    try:
        os.rename(staging, target)
    except OSError:
        if old.exists():
            os.rename(old, target)
        raise
    fsync_dir(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def write_file(path: Path, fragments: Mapping[str, Fragment]) -> str:
    """One rank's file; returns its sha256. Raises `OSError`."""
    tensors = {k: f.tensor for k, f in fragments.items() if f.tensor.numel()}
    layout = {k: [list(f.shape), f.start] for k, f in fragments.items()}
    return write_tensors(path, tensors, {"layout": json.dumps(layout)})


def checksum(fragments: Mapping[str, Fragment]) -> str:
    """64 bits over the elements of all ranks' fragments, however they are cut; collective.

    Σ (bits + 1)·(2·(position + key) + 1) mod 2⁶⁴ (ours): a sum, so that ranks add up, in which
    each element's weight tells its place. Each element must lie on exactly one rank.
    """
    total = torch.zeros((), dtype=torch.int64, device=distributed.device())
    for key, fragment in fragments.items():
        flat = fragment.tensor.detach().contiguous()
        bits = flat.view(_BITS[flat.element_size()])
        salt = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=6).digest(), "big")
        for low in range(0, bits.numel(), _BLOCK):
            block = bits[low : low + _BLOCK].to(torch.int64) + 1
            first = 2 * (fragment.start + low + salt) + 1
            places = _odd_numbers(block.numel(), block.device)
            # Σ (b + 1)(2i + first) in two products, without a tensor for the weights.
            total += (block * places).sum() + block.sum() * first
    return f"{int(distributed.all_reduce_sum(total)) % 2**64:016x}"


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_BLOCK = 1 << 17  # elements at a time: what a core's cache holds


@functools.lru_cache(maxsize=8)
def _odd_numbers(count: int, device: torch.device) -> torch.Tensor:
    """0, 2, 4 … below 2·``count``."""
    return torch.arange(0, 2 * count, 2, device=device)


def all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether no element is infinite or not a number; by a sum in float64, which shows both."""
    return all(
        math.isfinite(float(t.sum(dtype=torch.float64))) for t in tensors if t.is_floating_point()
    )


def file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a published folder; `FragmentError` when there is none that can be read."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FragmentError(f"{folder} has no readable manifest: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise FragmentError(f"{folder} is of format {manifest.get('format')!r}, not {FORMAT}")
    return manifest


def verify(folder: Path) -> dict[str, Any]:
    """The manifest, after every file's sha256 was found equal to it; else `FragmentError`."""
    manifest = read_manifest(folder)
    for name, digest in manifest["files"].items():
        path = folder / Path(name).name
        if not path.is_file():
            raise FragmentError(f"{folder} lacks {name}")
        try:
            found = file_digest(path)
        except OSError as error:
            raise FragmentError(f"{path} cannot be read: {error}") from None
        if found != digest:
            raise FragmentError(f"{path} was altered: its sha256 is not the manifest's")
    return manifest


class FragmentReader:
    """Random access to the tensors of a published folder by key and range."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self._files: dict[str, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._ranges: dict[str, list[tuple[int, int, str]]] = {}
        for name in sorted(self.manifest["files"]):
            file = self._open(name)
            held = set(file.keys())
            for key, (shape, start) in json.loads(file.metadata()["layout"]).items():
                self.shapes[key] = tuple(shape)
                if key in held:
                    size = file.get_slice(key).get_shape()[0]
                    self._ranges.setdefault(key, []).append((start, start + size, name))

    def _open(self, name: str):
        """The file of that name, mapped once: its header is long, and its ranges are many."""
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

    def read(self, key: str, start: int, stop: int) -> torch.Tensor:
        """Elements ``start`` to ``stop`` of the flattened tensor: a new 1-D tensor on the CPU."""
        if key not in self.shapes:
            raise FragmentError(f"{self.folder} holds no '{key}'")
        pieces, at = [], start
        if stop <= start:
            return torch.empty(0)
        for low, high, name in sorted(self._ranges.get(key, [])):
            if at < stop and low <= at < high:
                end = min(stop, high)
                pieces.append(self._open(name).get_slice(key)[at - low : end - low])
                at = end
        if at < stop:
            raise FragmentError(f"{self.folder} lacks elements {at} to {stop} of '{key}'")
        return torch.cat(pieces) if len(pieces) != 1 else pieces[0]

    def whole(self, key: str) -> torch.Tensor:
        """The tensor in its own shape."""
        shape = self.shapes.get(key, ())
        return self.read(key, 0, _numel(shape)).reshape(shape)


class PrefixReader:
    """A `FragmentReader` seen from below a key prefix."""

    def __init__(self, reader: FragmentReader, prefix: str):
        self._reader, self._prefix = reader, prefix
        cut = len(prefix)
        self.folder = reader.folder
        self.shapes = {k[cut:]: s for k, s in reader.shapes.items() if k.startswith(prefix)}

    def __contains__(self, key: str) -> bool:
        return key in self.shapes

    def read(self, key: str, start: int, stop: int) -> torch.Tensor:
        return self._reader.read(self._prefix + key, start, stop)

    def whole(self, key: str) -> torch.Tensor:
        return self._reader.whole(self._prefix + key)


def _numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())
