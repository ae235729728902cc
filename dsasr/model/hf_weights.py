"""Weights of Hugging Face folders: their tensors by name, and the buffers of an empty model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from dsasr.utils.errors import UserError


class TensorFiles:
    """The tensors of a Hugging Face folder by name, in one safetensors file or in several."""

    def __init__(self, folder: Path):
        """Raises `UserError` for an index or a file that cannot be read."""
        self.folder = folder
        self._files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}  # safetensors' names: F32, BF16 …
        for path in self._paths():
            try:
                with safe_open(path, framework="pt") as file:
                    for name in list(file.keys()):
                        self._files[name] = path
                        self.shapes[name] = tuple(file.get_slice(name).get_shape())
                        self.dtypes[name] = file.get_slice(name).get_dtype()
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path} cannot be read: {error}") from None

    def _paths(self) -> list[Path]:
        index = self.folder / "model.safetensors.index.json"
        if not index.is_file():
            whole = self.folder / "model.safetensors"
            return [whole] if whole.is_file() else []
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = sorted({Path(name).name for name in weight_map.values()})
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{index} cannot be read: {error}") from None
        for name in names:
            if not (self.folder / name).is_file():
                raise UserError(f"{self.folder} lacks {name}: copy or download it again")
        return [self.folder / name for name in names]

    def read(self, name: str, into: Tensor) -> None:
        """Copy the tensor into ``into``; the file is mapped only meanwhile."""
        with safe_open(self._files[name], framework="pt") as file:
            into.copy_(file.get_tensor(name))

    def read_range(self, name: str, start: int, stop: int) -> Tensor:
        """Elements ``start`` to ``stop`` of the flattened tensor; reads the rows that hold them."""
        shape = self.shapes[name]
        if stop <= start:
            return torch.empty(0)
        with safe_open(self._files[name], framework="pt") as file:
            if not shape:
                return file.get_tensor(name).reshape(1)[start:stop]
            row = max(torch.Size(shape[1:]).numel(), 1)
            first = start // row
            rows = file.get_slice(name)[first : -(-stop // row)]
            return rows.reshape(-1)[start - first * row : stop - first * row].clone()


def check_present(files: TensorFiles) -> None:
    """Raise `UserError` for a folder without weights."""
    if files.shapes:
        return
    pickled = any(files.folder.glob("pytorch_model*.bin"))
    raise UserError(
        f"{files.folder} has no safetensors weights"
        + (
            ", only a pickle, which could run code: convert it where you trust it, with "
            "transformers' AutoModel.from_pretrained(DIR).save_pretrained(DIR)"
            if pickled
            else ": copy or download them (pickles are not read)"
        )
    )


def fill_buffers(
    model: PreTrainedModel,
    files: TensorFiles | None = None,
    file_names: Mapping[str, str] | None = None,
) -> None:
    """Fill the buffers of a model on the meta device: computed ones by their layers, others from
    files.

    As in transformers: with every weight marked as initialized, only buffers get values.
    """
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    for layer in model.modules():
        layer._is_hf_initialized = False
        for name, buffer in layer._buffers.items():
            if buffer is not None and buffer.is_meta:
                layer._buffers[name] = torch.empty_like(buffer, device="cpu")
    model.initialize_weights()
    for path, layer in model.named_modules():
        for name, buffer in layer._buffers.items():
            full = f"{path}.{name}" if path else name
            if buffer is not None and file_names and full in file_names:
                files.read(file_names[full], buffer)
