"""The manifest of a folder of fragments: what the folder holds, and the checksums of its files.

It is JSON, and its own checksum is in it. What it says is checked before it is used: a folder may
come from another program, or from a disk that has lost a part of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsasr.utils.io import atomic_write

MANIFEST = "manifest.json"
FORMAT = 1
DIGEST = "sha256"  # of the manifest itself, without this key

_NUMBER = (int, float)
# Values that are used from manifests, and their types; None is allowed where a key may be absent.
_TYPES: dict[str, tuple[type, ...]] = {
    "kind": (str,), "id": (str,), "pretrain": (int,), "cause": (str,), "cka": _NUMBER,
    "reference": (str,), "parent": (str,), "checksum": (str,), "architecture": (str,),
    "config": (str,), "encoder": (dict,), "encoder_lora": (dict,), "vocabularies": (dict,),
    "recipe": (dict,), "steps": (int,), "saved": _NUMBER, "score": _NUMBER, "progress": (dict,),
    "branches": (dict,), "files": (dict,), DIGEST: (str,),
}  # fmt: skip


class FragmentError(Exception):
    """A folder of fragments is torn or altered, or lacks a tensor that is read from it."""


def manifest_of(info: Mapping[str, Any], files: Mapping[str, str | None]) -> dict[str, Any]:
    """A folder's manifest; ``files``: file name → sha256."""
    manifest = {"format": FORMAT, **info, "files": dict(files)}
    return {**manifest, DIGEST: _digest(manifest)}


def _digest(manifest: Mapping[str, Any]) -> str:
    # Once through JSON: tuples become lists, and all keys strings.
    plain = json.loads(json.dumps({k: v for k, v in manifest.items() if k != DIGEST}))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    atomic_write(folder / MANIFEST, json.dumps(manifest, indent=1))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a published folder; `FragmentError` when none can be read, or when it was
    altered or has a value of another type."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FragmentError(f"{folder} has no readable manifest: there is no {MANIFEST}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise FragmentError(f"{folder} has no readable manifest: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else None
        raise FragmentError(f"{folder} is of format {found!r}, not {FORMAT}")
    problem = _problem(manifest)
    if problem:
        raise FragmentError(f"{folder}: its manifest {problem}")
    return manifest


def _problem(manifest: Mapping[str, Any]) -> str | None:
    """Why a manifest cannot be used, or None."""
    # Older ones have no checksum of their own.
    if manifest.get(DIGEST) is not None and manifest[DIGEST] != _digest(manifest):
        return f"was altered: its {DIGEST} is another"
    for key, types in _TYPES.items():
        value = manifest.get(key)
        if value is None:
            if key == "files":
                return f"lacks '{key}'"
        elif not isinstance(value, types) or isinstance(value, bool):
            names = " or ".join(t.__name__ for t in types)
            return f"has {json.dumps(value)[:40]} as '{key}', which is no {names}"
    for name, expected in manifest["files"].items():
        if not isinstance(expected, str) or Path(name).name != name:
            return f"names {name!r} in 'files', which is no file of this folder with a checksum"
    return None


def require(folder: Path, manifest: Mapping[str, Any], *keys: str) -> None:
    """Raise `FragmentError` where the manifest of ``folder`` lacks one of ``keys``."""
    for key in keys:
        if manifest.get(key) is None:
            raise FragmentError(f"{folder}: its manifest lacks '{key}'")
