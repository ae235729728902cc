"""Tensors in pieces: every rank writes the slices that it owns, and reads the slices that it needs.

A *fragment* is a contiguous range of a flattened tensor. Ranks of a ZeRO job own fragments of
parameters and of optimizer states; snapshots, checkpoints and exports are folders of such fragments
(safetensors, one file a rank) plus a manifest. No rank ever gathers a whole model to write one, and
a reader of any world size takes from any number of files just the ranges that it owns.

A folder is written under a temporary name, fsynced and renamed: it is there whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dsasr import ranks
from dsasr.files import atomic_write, fsync_dir, fsync_file

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
    staging = target.parent / f".{target.name}.tmp"
    name = f"rank-{ranks.rank():05d}.safetensors"
    if ranks.main_rank():
        shutil.rmtree(staging, ignore_errors=True)
    ranks.barrier()
    failure, digest = None, None
    try:
        staging.mkdir(parents=True, exist_ok=True)
        digest = _write_file(staging / name, fragments)
    except (OSError, SafetensorError) as error:
        failure = f"rank {ranks.rank()}: {error}"
    results = ranks.gather((name, digest, failure))
    manifest = {"format": FORMAT, **info, "files": {n: d for n, d, _ in results}}
    failures = [f for _, _, f in results if f]
    if not failures and ranks.main_rank():
        try:
            atomic_write(staging / MANIFEST, json.dumps(manifest, indent=1))
            _replace_folder(staging, target)
        except OSError as error:
            failures = [str(error)]
    failures = ranks.broadcast(failures)
    if failures:
        if ranks.main_rank():
            shutil.rmtree(staging, ignore_errors=True)
        raise OSError(f"could not write {target}: {failures[0]}")
    return manifest


def _replace_folder(staging: Path, target: Path) -> None:
    """Rename ``staging`` to ``target``; an older folder of that name goes only afterwards."""
    old = target.parent / f".{target.name}.old.tmp"
    shutil.rmtree(old, ignore_errors=True)
    fsync_dir(staging)
    if target.exists():
        os.rename(target, old)
    os.rename(staging, target)
    fsync_dir(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _write_file(path: Path, fragments: Mapping[str, Fragment]) -> str:
    tensors, layout = {}, {}
    for key, fragment in fragments.items():
        if fragment.tensor.numel():
            tensors[key] = fragment.tensor.detach().contiguous().cpu()
        layout[key] = [list(fragment.shape), fragment.start]
    # Views of one flat buffer share storage, which safetensors refuses: part them.
    tensors = {k: v.clone() if v._base is not None else v for k, v in tensors.items()}
    save_file(tensors, path, metadata={"layout": json.dumps(layout)})
    fsync_file(path)
    return file_digest(path)


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
        if file_digest(path) != digest:
            raise FragmentError(f"{path} was altered: its sha256 is not the manifest's")
    return manifest


class FragmentReader:
    """Random access to the tensors of a published folder by key and range."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._ranges: dict[str, list[tuple[int, int, str]]] = {}
        for name in sorted(self.manifest["files"]):
            with self._open(name) as file:
                held = set(file.keys())
                for key, (shape, start) in json.loads(file.metadata()["layout"]).items():
                    self.shapes[key] = tuple(shape)
                    if key in held:
                        size = file.get_slice(key).get_shape()[0]
                        self._ranges.setdefault(key, []).append((start, start + size, name))

    def _open(self, name: str):
        try:
            return safe_open(self.folder / Path(name).name, framework="pt")
        except (OSError, SafetensorError) as error:
            raise FragmentError(f"{self.folder / name} cannot be read: {error}") from None

    def __contains__(self, key: str) -> bool:
        return key in self.shapes

    def keys(self) -> Iterable[str]:
        return self.shapes.keys()

    def read(self, key: str, start: int, stop: int) -> torch.Tensor:
        """Elements ``start`` to ``stop`` of the flattened tensor, as a new 1-D tensor on the CPU."""
        if key not in self.shapes:
            raise FragmentError(f"{self.folder} holds no '{key}'")
        pieces, at = [], start
        if stop <= start:
            return torch.empty(0)
        for low, high, name in sorted(self._ranges.get(key, [])):
            if at < stop and low <= at < high:
                end = min(stop, high)
                with self._open(name) as file:
                    pieces.append(file.get_slice(key)[at - low : end - low])
                at = end
        if at < stop:
            raise FragmentError(f"{self.folder} lacks elements {at} to {stop} of '{key}'")
        return torch.cat(pieces) if len(pieces) != 1 else pieces[0]

    def whole(self, key: str) -> torch.Tensor:
        """The tensor in its own shape."""
        shape = self.shapes.get(key, ())
        return self.read(key, 0, _numel(shape)).reshape(shape)


def _numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())
