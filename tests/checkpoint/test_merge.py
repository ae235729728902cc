"""Averages of checkpoints, and what differs between two."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dsasr.checkpoint import tensor_fragments
from dsasr.checkpoint.locate import open_checkpoint
from dsasr.checkpoint.merge import average, compare, weight_keys
from dsasr.checkpoint.tensor_fragments import Fragment, FragmentReader
from dsasr.utils.errors import UserError

ROOT = Path(__file__).parents[2]


def write_checkpoint(folder: Path, value: float, **more: torch.Tensor) -> FragmentReader:
    tensors = {"sft/llm.w": torch.full((2, 3), value), "sft/llm.b": torch.arange(3.0), **more}
    tensors["sft/master/llm.w"] = torch.full((2, 3), 100 * value)
    tensors["sft/exp_avg/llm.w"] = torch.ones(2, 3)
    fragments = {k: Fragment(tuple(t.shape), 0, t.reshape(-1)) for k, t in tensors.items()}
    tensor_fragments.write_folder(folder, fragments, {"steps": int(value)})
    return FragmentReader(folder)


def test_the_mean_of_weights_alone(tmp_path):
    readers = [write_checkpoint(tmp_path / str(i), v) for i, v in enumerate((1.0, 2.0, 6.0))]
    mean = open_checkpoint(average(readers, tmp_path / "mean"))
    assert weight_keys(mean) == ["sft/llm.b", "sft/llm.w"] == sorted(mean.keys())
    assert torch.equal(mean.whole("sft/llm.w"), torch.full((2, 3), 3.0))
    assert torch.equal(mean.whole("sft/llm.b"), torch.arange(3.0))
    assert mean.manifest["steps"] == 6 and mean.manifest["of"] == ["0", "1", "2"]


def test_half_precision_is_summed_in_double(tmp_path):
    low = [torch.full((4,), v, dtype=torch.bfloat16) for v in (256.0, 1.0, 1.0)]
    readers = [write_checkpoint(tmp_path / str(i), 1.0, **{"sft/h": t}) for i, t in enumerate(low)]
    mean = open_checkpoint(average(readers, tmp_path / "mean")).whole("sft/h")
    assert mean.dtype is torch.bfloat16 and torch.equal(mean, torch.full((4,), 86.0).bfloat16())


def test_other_models_and_torn_ones_are_refused(tmp_path):
    first = write_checkpoint(tmp_path / "a", 1.0)
    second = write_checkpoint(tmp_path / "b", 1.0, **{"sft/more": torch.ones(2)})
    with pytest.raises(UserError, match="another model"):
        average([first, second], tmp_path / "mean")
    with pytest.raises(UserError, match="at least two"):
        average([first], tmp_path / "mean")
    with pytest.raises(UserError, match="exists"):
        average([first, first], tmp_path / "b")
    path = tmp_path / "a" / "rank-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="altered"):
        open_checkpoint(tmp_path / "a")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_what_differs_and_how_much(tmp_path):
    first = write_checkpoint(
        tmp_path / "a", 2.0, **{"sft/x": torch.ones(2), "sft/y": torch.ones(2)}
    )
    second = write_checkpoint(
        tmp_path / "b", 2.5, **{"sft/x": torch.ones(3), "sft/z": torch.ones(2)}
    )
    differences = {d.key: d for d in compare(first, second)}
    assert differences["sft/llm.b"].differing == 0 and differences["sft/llm.b"].relative == 0.0
    assert differences["sft/llm.w"].relative == pytest.approx(0.25)
    assert differences["sft/llm.w"].largest == 0.5 and differences["sft/llm.w"].differing == 6
    assert differences["sft/x"].why == "[2] against [3]"
    assert "only in" in differences["sft/y"].why and differences["sft/z"].relative is None
