"""Write safetensors files tensor by tensor; the sha256 is known when the last byte is written.

The library's own writer needs all tensors in memory at once and keeps the interpreter's lock while
it writes. This one needs one tensor at a time and lets other threads run. Files are read with the
library.
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
    """A tensor's dtype and shape, and the function that loads it when it is written."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    load: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor | LazyTensor],
    metadata: Mapping[str, str] | None = None,
) -> str:
    """Write ``tensors`` to ``path``, fsynced; returns the file's sha256.

    Raises `OSError`, and leaves an unfinished file then.
    """
    lazy = {
        name: t if isinstance(t, LazyTensor) else LazyTensor(t.dtype, tuple(t.shape), lambda t=t: t)
        for name, t in tensors.items()
    }
    # The widest dtype first, so that each tensor is aligned to its element size.
    names = sorted(lazy, key=lambda name: (-lazy[name].dtype.itemsize, name))
    header, at = {}, 0
    if metadata:
        header["__metadata__"] = dict(metadata)
    for name in names:
        tensor = lazy[name]
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.bytes],
        }
        at += tensor.bytes
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    digest = hashlib.sha256()
    with open(path, "wb") as file:

        def write(data) -> None:
            digest.update(data)
            file.write(data)

        write(len(head).to_bytes(8, "little"))
        write(head)
        for name in names:
            tensor = lazy[name].load()
            expected = (lazy[name].dtype, lazy[name].shape)
            assert (tensor.dtype, tuple(tensor.shape)) == expected, name
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            if not flat.numel():
                continue
            data = memoryview(flat.view(torch.uint8).numpy())
            for low in range(0, len(data), _BLOCK):
                write(data[low : low + _BLOCK])
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()
