"""Safetensors files written tensor by tensor, with their sha256 known when the last byte is out.

The library's own writer wants all tensors in memory at once and holds the interpreter's lock while
it writes; this one needs one tensor at a time and lets other threads run. Reading is the library's.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_BLOCK = 1 << 22


@dataclass(frozen=True)
class LazyTensor:
    """A tensor to be: its form, and how to get it when its turn has come."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    get: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor | LazyTensor],
    metadata: Mapping[str, str] | None = None,
    wait: Callable[[], None] = lambda: None,
) -> str:
    """Write ``tensors`` to ``path``, fsynced; returns the file's sha256.

    ``wait`` is called between blocks of 4 MB. Raises `OSError`, and leaves what it wrote.
    """
    lazy = {
        name: t if isinstance(t, LazyTensor) else LazyTensor(t.dtype, tuple(t.shape), lambda t=t: t)
        for name, t in tensors.items()
    }
    # The widest first: so that each tensor is aligned to its own element size.
    names = sorted(lazy, key=lambda name: (-lazy[name].dtype.itemsize, name))
    header, at = {}, 0
    if metadata:
        header["__metadata__"] = dict(metadata)
    for name in names:
        one = lazy[name]
        header[name] = {
            "dtype": DTYPES[one.dtype],
            "shape": list(one.shape),
            "data_offsets": [at, at + one.bytes],
        }
        at += one.bytes
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    digest = hashlib.sha256()
    with open(path, "wb") as file:

        def put(data) -> None:
            digest.update(data)
            file.write(data)

        put(len(head).to_bytes(8, "little"))
        put(head)
        for name in names:
            one, tensor = lazy[name], lazy[name].get()
            assert tensor.dtype is one.dtype and tuple(tensor.shape) == one.shape, name
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            if not flat.numel():
                continue
            data = memoryview(flat.view(torch.uint8).numpy())
            for low in range(0, len(data), _BLOCK):
                put(data[low : low + _BLOCK])
                wait()
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()
