"""Optimizer states on a disk: what the recipe has to say, and what is said where it can't be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from deepspeed.ops.op_builder import AsyncIOBuilder

from dsasr import recipe
from dsasr.engine import config
from dsasr.engine.config import EngineConfig
from dsasr.utils.errors import UserError


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"zero_optimization": {"stage": 0}}', "stage must be 1, 2 or 3, not 0"),
        ("{}", "no mapping 'zero_optimization' with a 'stage'"),
        ('{"zero_optimization": {"stage": "3"}}', "must be 1, 2 or 3"),
        ('{"zero_optimization": 3}', "must hold a mapping"),
        ("[]", "must hold a mapping"),
        ("[" * 100_000, "is not valid JSON"),
        ("{", "is not valid JSON"),
    ],
)
def test_settings_without_a_partition_are_refused(tmp_path, text, says):
    (tmp_path / "ds.json").write_text(text)
    with pytest.raises(UserError, match=says):
        EngineConfig(deepspeed=str(tmp_path / "ds.json"))


def test_a_disk_is_named_by_the_recipe(tmp_path, tiny):
    with pytest.raises(UserError, match=r"engine\.nvme=FOLDER"):
        EngineConfig(deepspeed="zero3-nvme")
    with pytest.raises(UserError, match="zero3-nvme, not for zero3-offload"):
        EngineConfig(deepspeed="zero3-offload", nvme="/scratch")
    overrides = ["engine.deepspeed=zero3-nvme", f"engine.nvme={tmp_path}"]
    engine_config = recipe.load(str(tiny), overrides).engine
    folders = [
        config.nvme_folder(engine_config, run, branch)
        for run in (tmp_path / "a", tmp_path / "b")
        for branch in ("pretrain", "sft")
    ]
    assert len(set(folders)) == 4 and all(tmp_path in folder.parents for folder in folders)
    settings = config.deepspeed_settings(engine_config, folders[0])
    offload = settings["zero_optimization"]["offload_optimizer"]
    assert offload["device"] == "nvme" and offload["nvme_path"] == str(folders[0])
    assert settings["zero_optimization"]["stage"] == 3
    assert settings["aio"]["block_size"] % 4096 == 0
    # Master, two moments, gradient: a buffer each, or DeepSpeed has nowhere to read them to.
    assert offload["buffer_count"] >= 4
    packaged = config.read_ds_config("zero3-nvme")
    assert "nvme_path" not in packaged["zero_optimization"]["offload_optimizer"]


def test_without_async_io_the_error_names_the_ways_out(monkeypatch, tmp_path):
    def broken(self, verbose=True):
        raise RuntimeError("Unable to JIT load the async_io op\nin many lines")

    engine_config = EngineConfig(deepspeed="zero3-nvme", nvme=str(tmp_path / "disk"))
    monkeypatch.setattr(AsyncIOBuilder, "load", broken)
    with pytest.raises(UserError) as caught:
        config.check_nvme(engine_config)
    message = str(caught.value)
    assert "\n" not in message and "Unable to JIT load the async_io op" in message
    assert "libaio-dev" in message and "zero3-offload" in message
    config.check_nvme(EngineConfig())  # needs no disk

    monkeypatch.setattr(AsyncIOBuilder, "load", lambda self, verbose=True: None)
    config.check_nvme(engine_config)
    assert (tmp_path / "disk").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        config.check_nvme(EngineConfig(deepspeed="zero3-nvme", nvme=str(tmp_path / "file" / "x")))


@pytest.mark.slow
def test_a_machine_without_libaio_is_told_so(tmp_path):
    if AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("async_io can be built here")
    with pytest.raises(UserError, match="libaio-dev"):
        config.check_nvme(EngineConfig(deepspeed="zero3-nvme", nvme=str(tmp_path)))


@pytest.mark.launcher
def test_states_on_a_disk_are_those_in_memory(launch, tmp_path):
    if not AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("async_io cannot be built here: no libaio")
    program = Path(__file__).parents[1] / "programs" / "nvme_offload.py"
    done = launch(program, tmp_path, timeout=600)  # async_io may have to be compiled
    assert done.returncode == 0, done.stdout[-3000:]
    results = json.loads((tmp_path / "found.json").read_text())
    assert all(results["equal"]) and results["swapped"] == [True, False] and results["files"] > 0
    assert (
        results["resumed"] and results["continued"] and results["loaded"] and results["left"] == 0
    )
