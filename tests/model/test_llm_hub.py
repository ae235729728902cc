"""A language model by hub name: from the library's cache, without a network."""

from __future__ import annotations

import shutil

import huggingface_hub
import pytest
import torch

from dsasr import recipe
from dsasr.build import Builder
from dsasr.model.llm_hub import find_model, is_hub_name
from dsasr.planning.model_parts import count_parts
from dsasr.training import preflight
from dsasr.utils.errors import UserError


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """The hub's cache, and no way to the hub."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_model_in_the_cache_is_found_by_its_name(offline, tiny):
    cached = offline / "models--someone--tiny-lm"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    shutil.copytree(tiny.parent / "lm", cached / "snapshots" / ("0" * 40))
    cfg = recipe.load(str(tiny), ["model.llm.path=someone/tiny-lm"])
    build = Builder(cfg)
    preflight.check(build)
    assert count_parts(cfg) == count_parts(recipe.load(str(tiny)))
    assert build.llm_folder == cached / "snapshots" / ("0" * 40)
    expected = Builder(recipe.load(str(tiny))).speech_llm().state_dict()
    actual = build.speech_llm().state_dict()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
    assert build.tokenizer.encode("ba do") == Builder(recipe.load(str(tiny))).tokenizer.encode(
        "ba do"
    )


def test_offline_the_error_names_the_ways_out(offline, tiny):
    with pytest.raises(UserError) as caught:
        preflight.check(Builder(recipe.load(str(tiny), ["model.llm.path=someone/other-lm"])))
    message = str(caught.value)
    assert "\n" not in message and message.startswith("model.llm.path")
    for remedy in ("local folder", "hf download someone/other-lm", "huggingface-cli download",
                "HF_HUB_OFFLINE=1"):  # fmt: skip
        assert remedy in message


def test_names_and_folders(tmp_path, tiny):
    assert find_model(str(tiny.parent / "lm")) == tiny.parent / "lm"
    assert is_hub_name("Qwen/Qwen3-1.7B") and is_hub_name("gpt2")
    for path in ("/nowhere/lm", "../lm", "a/b/c", "", "https://huggingface.co/gpt2", str(tmp_path)):
        assert not is_hub_name(path)
        with pytest.raises(UserError, match="Hugging Face folder or a hub name"):
            find_model(path)
