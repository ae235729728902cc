"""Tensors by name that are read in slices from wherever they lie."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError
from torch import Size, Tensor

from dsasr.checkpoint.manifest import FragmentError
from dsasr.model.hf_weights import TensorFiles

# Shape, and a function that reads elements ``start`` to ``stop`` of the flattened tensor.
Located = tuple[tuple[int, ...], Callable[[int, int], Tensor]]


class NamedTensors:
    """A `tensor_fragments.Reader` of tensors that lie anywhere, by name."""

    def __init__(self, folder: Path, tensors: Mapping[str, Located]):
        self.folder, self._tensors = folder, tensors
        self.shapes = {name: shape for name, (shape, _) in tensors.items()}

    def __contains__(self, key: str) -> bool:
        return key in self._tensors

    def read(self, key: str, start: int, stop: int) -> Tensor:
        if key not in self._tensors:
            raise FragmentError(f"{self.folder} holds no '{key}'")
        try:
            return self._tensors[key][1](start, stop)
        except SafetensorError as error:
            raise FragmentError(f"{self.folder}: '{key}' cannot be read: {error}") from None

    def whole(self, key: str) -> Tensor:
        shape = self.shapes.get(key, ())
        return self.read(key, 0, Size(shape).numel()).reshape(shape)

    def with_all_of(self, other: NamedTensors) -> NamedTensors:
        """The tensors of both."""
        return NamedTensors(self.folder, {**self._tensors, **other._tensors})

    @classmethod
    def of_files(cls, files: TensorFiles) -> NamedTensors:
        """All tensors of a Hugging Face folder."""
        return cls(files.folder, {name: in_files(files, name) for name in files.shapes})


def in_files(files: TensorFiles, name: str) -> Located:
    """Where one tensor of a Hugging Face folder lies."""
    return files.shapes[name], lambda start, stop: files.read_range(name, start, stop)
