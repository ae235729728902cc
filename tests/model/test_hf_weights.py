"""Tensors of Hugging Face folders: whole, and by ranges of the flattened tensor."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from dsasr.model.hf_weights import TensorFiles


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_range_of_a_tensor_of_any_shape(tmp_path_factory, data):
    shape = tuple(data.draw(st.lists(st.integers(1, 5), max_size=4)))
    tensor = torch.arange(torch.Size(shape).numel(), dtype=torch.bfloat16).reshape(shape)
    folder = tmp_path_factory.mktemp("f")
    save_file({"w": tensor}, folder / "model.safetensors")
    files = TensorFiles(folder)
    low = data.draw(st.integers(0, tensor.numel()))
    high = data.draw(st.integers(low, tensor.numel()))
    found = files.read_range("w", low, high)
    assert torch.equal(found, tensor.reshape(-1)[low:high].to(found.dtype))
    assert (files.shapes["w"], files.dtypes["w"]) == (shape, "BF16")
