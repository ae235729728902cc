"""Folders of fragments: written by any number of ranks, read by range, verified."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsasr.checkpoint import tensor_fragments
from dsasr.checkpoint.manifest import FORMAT, MANIFEST
from dsasr.checkpoint.tensor_fragments import Fragment, FragmentError, FragmentReader


def published(folder, tensors, starts=()):
    """Write ``tensors`` as several ranks do, whose ranges meet at the elements ``starts``."""
    target = folder / "snap"
    target.mkdir(parents=True)
    files = {}
    for rank in range(len(starts) + 1):
        fragments = {}
        for key, tensor in tensors.items():
            flat = tensor.reshape(-1)
            edges = [0, *(min(c, flat.numel()) for c in starts), flat.numel()]
            low, high = edges[rank], edges[rank + 1]
            fragments[key] = Fragment(tuple(tensor.shape), low, flat[low:high])
        name = f"rank-{rank:05d}.safetensors"
        files[name] = tensor_fragments.write_file(target / name, fragments)
    manifest = {"format": FORMAT, "files": files}
    (target / MANIFEST).write_text(json.dumps(manifest))
    return target


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_range_reads_back_from_any_partition(tmp_path_factory, data):
    shape = tuple(data.draw(st.lists(st.integers(1, 5), max_size=3)))
    tensor = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
    starts = sorted(data.draw(st.lists(st.integers(0, tensor.numel()), max_size=3)))
    folder = published(tmp_path_factory.mktemp("f"), {"w": tensor}, starts)
    reader = FragmentReader(folder)
    low = data.draw(st.integers(0, tensor.numel()))
    high = data.draw(st.integers(low, tensor.numel()))
    assert torch.equal(reader.read("w", low, high), tensor.reshape(-1)[low:high])
    assert torch.equal(reader.whole("w"), tensor)


def test_written_folder_verifies_and_keeps_dtypes(tmp_path):
    flat = torch.arange(6, dtype=torch.bfloat16)
    fragments = {"a": Fragment((2, 3), 0, flat), "b": Fragment((0,), 0, flat[:0])}
    tensor_fragments.write_folder(tmp_path / "x", fragments, {"id": "x"})
    assert tensor_fragments.verify(tmp_path / "x")["id"] == "x"
    reader = FragmentReader(tmp_path / "x")
    assert reader.whole("a").dtype is torch.bfloat16 and reader.whole("b").numel() == 0
    assert not list(tmp_path.glob(".*"))


def test_a_flipped_bit_and_a_missing_file_are_found(tmp_path):
    folder = published(tmp_path, {"w": torch.randn(100)}, (50,))
    path = folder / "rank-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(FragmentError, match="altered"):
        tensor_fragments.verify(folder)
    path.unlink()
    with pytest.raises(FragmentError, match="lacks"):
        tensor_fragments.verify(folder)
    with pytest.raises(FragmentError, match="no readable manifest"):
        FragmentReader(tmp_path)


def test_missing_keys_and_ranges_are_named(tmp_path):
    folder = published(tmp_path, {"w": torch.randn(10)})
    reader = FragmentReader(folder)
    with pytest.raises(FragmentError, match="no 'v'"):
        reader.read("v", 0, 1)
    with pytest.raises(FragmentError, match="lacks elements 10 to 12"):
        reader.read("w", 5, 12)


def test_a_failed_write_leaves_the_old_folder(tmp_path, monkeypatch):
    fragments = {"a": Fragment((3,), 0, torch.ones(3))}
    tensor_fragments.write_folder(tmp_path / "x", fragments, {"turn": 1})

    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensor_fragments, "write_file", full)
    with pytest.raises(OSError, match="No space left"):
        tensor_fragments.write_folder(tmp_path / "x", fragments, {"turn": 2})
    assert tensor_fragments.verify(tmp_path / "x")["turn"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_newer_folder_replaces_the_old_one(tmp_path):
    for turn in (1, 2):
        fragments = {"a": Fragment((3,), 0, torch.full((3,), float(turn)))}
        tensor_fragments.write_folder(tmp_path / "x", fragments, {"turn": turn})
    assert torch.equal(FragmentReader(tmp_path / "x").whole("a"), torch.full((3,), 2.0))
