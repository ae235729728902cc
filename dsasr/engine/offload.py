"""Offload the inactive branch's fp32 masters and Adam moments, and reload them bit for bit.

``none`` leaves them where they are (fastest; right on a CPU and where memory allows), ``cpu`` moves
them to pinned host memory, ``disk`` to a safetensors file (on an NVMe, by path). Only the storage
of the tensors moves: DeepSpeed's objects, hooks and groups stay as they are, so that an offloaded
branch continues without any setup.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dsasr.utils import distributed
from dsasr.utils.errors import UserError
from dsasr.utils.io import atomic_path


@dataclass(frozen=True)
class OffloadConfig:
    # none: they stay on the device; cpu: the host's (pinned) memory; disk: a file
    device: Literal["none", "cpu", "disk"] = "none"
    path: str | None = None  # disk: folder on a fast local disk; null: the run folder

    def __post_init__(self) -> None:
        if self.path and self.device != "disk":
            raise UserError(f"engine.offload.path is for device=disk, not device={self.device}")


class StateOffloader:
    """Offloads the tensors of one branch on this rank, by ``config``.

    ``name``: the branch's, for the file's name; ``folder``: the run folder.
    """

    def __init__(self, config: OffloadConfig, name: str, folder: Path):
        self.config = config
        root = Path(config.path) if config.path else folder
        self._file = root / f"offloaded-{name}-{distributed.rank():05d}.safetensors"
        # By key: the emptied tensor, its shape and its device.
        self._emptied: dict[str, tuple[Tensor, torch.Size, torch.device]] = {}
        self._host: dict[str, Tensor] = {}

    @property
    def offloaded(self) -> bool:
        return bool(self._emptied)

    @property
    def bytes(self) -> int:
        """The bytes offloaded at present."""
        return sum(shape.numel() * t.element_size() for t, shape, _ in self._emptied.values())

    def offload(self, tensors: Mapping[str, Tensor]) -> int:
        """Move the storage of ``tensors`` away; returns the bytes moved. No-op with ``none``.

        With ``disk`` it is collective, and raises `UserError` on all ranks, with the tensors where
        they were, when one cannot write its file.
        """
        if self.config.device == "none" or self.offloaded or not tensors:
            return 0
        moved = sum(t.numel() * t.element_size() for t in tensors.values())
        if self.config.device == "disk":
            self._write(tensors)
        else:
            self._copy_to_host(tensors)
        for key, tensor in tensors.items():
            self._emptied[key] = (tensor, tensor.shape, tensor.device)
            tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return moved

    def _write(self, tensors: Mapping[str, Tensor]) -> None:
        problem = None
        try:
            with atomic_path(self._file) as temporary:
                save_file({k: t.data.contiguous().cpu() for k, t in tensors.items()}, temporary)
        except (OSError, SafetensorError) as error:
            problem = f"{self._file} cannot be written: {error}"
        problems = [p for p in distributed.all_gather_object(problem) if p]
        if problems:
            raise UserError(f"{problems[0]}; make room, or give engine.offload.device=cpu")

    def _copy_to_host(self, tensors: Mapping[str, Tensor]) -> None:
        for key, tensor in tensors.items():
            buffer = self._host.get(key)
            if buffer is None or buffer.shape != tensor.shape:
                pin = tensor.is_cuda
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pin)
                self._host[key] = buffer
            buffer.copy_(tensor.data, non_blocking=True)
        if any(t.is_cuda for t in tensors.values()):
            torch.cuda.synchronize()

    def reload(self) -> int:
        """Move everything back to its own device; returns the bytes moved."""
        moved = 0
        if not self.offloaded:
            return moved
        on_disk = self.config.device == "disk"
        file = self._open() if on_disk else None
        for key, (tensor, shape, device) in self._emptied.items():
            saved = file.get_tensor(key) if file is not None else self._host[key]
            if device.type == "cpu":
                # The host buffer becomes the tensor's storage: no copy.
                tensor.data = saved if on_disk else self._host.pop(key)
            else:
                tensor.data = saved.reshape(shape).to(device, non_blocking=True)
            moved += tensor.numel() * tensor.element_size()
        self._emptied.clear()
        if on_disk:
            self._file.unlink(missing_ok=True)
        return moved

    def _open(self) -> safe_open:
        try:
            return safe_open(self._file, framework="pt")
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{self._file} cannot be read: {error}; start again, from the last checkpoint"
            ) from None

    def close(self) -> None:
        """Drop what is offloaded, and remove its file."""
        self._emptied.clear()
        self._host.clear()
        self._file.unlink(missing_ok=True)
