"""Offloading tensors to host memory or a disk, and back."""

from __future__ import annotations

import resource

import pytest
import torch

from dsasr.engine.offload import OffloadConfig, StateOffloader
from dsasr.utils.errors import UserError


@pytest.mark.parametrize("device", ["cpu", "disk"])
def test_offloaded_tensors_come_back_bit_equal(tmp_path, device):
    flat = torch.randn(1000)
    flat[3] = float("nan")
    tensors = {"a": flat[:700], "b": torch.randn(3, 5), "c": torch.tensor(2.0)}
    before = {k: v.clone() for k, v in tensors.items()}
    offloader = StateOffloader(OffloadConfig(device), "sft", tmp_path)
    for _ in range(3):
        assert offloader.offload(tensors) == 4 * (700 + 15 + 1) == offloader.bytes
        assert all(t.numel() == 0 for t in tensors.values()) and offloader.offloaded
        assert offloader.offload(tensors) == 0, "offloaded a second time"
        assert offloader.reload() == 4 * 716 and offloader.bytes == 0
        for key, value in tensors.items():
            assert value.shape == before[key].shape
            assert torch.equal(value.view(torch.int32), before[key].view(torch.int32))
        assert offloader.reload() == 0
    assert not list(tmp_path.iterdir())


def test_none_moves_nothing(tmp_path):
    tensor = torch.randn(5)
    address = tensor.data_ptr()
    offloader = StateOffloader(OffloadConfig(), "sft", tmp_path)
    assert offloader.offload({"a": tensor}) == 0 and not offloader.offloaded
    assert tensor.data_ptr() == address and offloader.reload() == 0


def test_closing_removes_the_file(tmp_path):
    offloader = StateOffloader(OffloadConfig("disk", str(tmp_path / "nvme")), "sft", tmp_path)
    offloader.offload({"a": torch.randn(5)})
    assert len(list((tmp_path / "nvme").iterdir())) == 1
    offloader.close()
    assert not list((tmp_path / "nvme").iterdir())


def test_a_full_disk_is_one_line_and_leaves_the_tensors(tmp_path):
    tensors = {"a": torch.randn(100_000), "b": torch.zeros(0)}
    before = tensors["a"].clone()
    offloader = StateOffloader(OffloadConfig("disk"), "sft", tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot be written.*offload\.device=cpu") as caught:
            offloader.offload(tensors)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())
    assert torch.equal(tensors["a"], before) and not offloader.offloaded
    assert offloader.offload(tensors) == 400_000
    next(tmp_path.iterdir()).write_bytes(b"torn")
    with pytest.raises(UserError, match="cannot be read"):
        offloader.reload()


def test_a_path_is_for_a_disk():
    with pytest.raises(UserError, match="device=disk"):
        OffloadConfig("cpu", "/fast")
