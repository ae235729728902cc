from __future__ import annotations

import pytest
import torch

from dsasr.engine.offload import ParkConfig, Parking
from dsasr.utils.errors import UserError


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_parked_tensors_come_back_bit_equal(tmp_path, place):
    flat = torch.randn(1000)
    flat[3] = float("nan")
    tensors = {"a": flat[:700], "b": torch.randn(3, 5), "c": torch.tensor(2.0)}
    before = {k: v.clone() for k, v in tensors.items()}
    parking = Parking(ParkConfig(place), "sft", tmp_path)
    for _ in range(3):
        assert parking.park(tensors) == 4 * (700 + 15 + 1) == parking.bytes
        assert all(t.numel() == 0 for t in tensors.values()) and parking.parked
        assert parking.park(tensors) == 0, "what is parked is not parked again"
        assert parking.unpark() == 4 * 716 and parking.bytes == 0
        for key, value in tensors.items():
            assert value.shape == before[key].shape
            assert torch.equal(value.view(torch.int32), before[key].view(torch.int32))
        assert parking.unpark() == 0
    assert not list(tmp_path.iterdir())


def test_keep_moves_nothing(tmp_path):
    tensor = torch.randn(5)
    place = tensor.data_ptr()
    parking = Parking(ParkConfig(), "sft", tmp_path)
    assert parking.park({"a": tensor}) == 0 and not parking.parked
    assert tensor.data_ptr() == place and parking.unpark() == 0


def test_closing_removes_the_file(tmp_path):
    parking = Parking(ParkConfig("disk", str(tmp_path / "nvme")), "sft", tmp_path)
    parking.park({"a": torch.randn(5)})
    assert len(list((tmp_path / "nvme").iterdir())) == 1
    parking.close()
    assert not list((tmp_path / "nvme").iterdir())


def test_a_path_is_for_a_disk():
    with pytest.raises(UserError, match="place=disk"):
        ParkConfig("cpu", "/fast")
