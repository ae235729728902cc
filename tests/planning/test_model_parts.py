"""Counted sizes against modules that exist."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dsasr import recipe
from dsasr.build import Builder
from dsasr.planning.model_parts import ASSUMED_PHONEMES, count_parts, count_speech_parts
from dsasr.utils.errors import UserError


def test_parameters_are_those_of_the_modules(tiny):
    cfg = recipe.load(str(tiny))
    parts, build = count_parts(cfg), Builder(cfg)
    model = build.speech_llm()
    modules = {name: getattr(model, name) for name in ("encoder", "adaptor", "llm")}
    modules["ctc"] = build.module("pretrain").ctc
    for name, module in modules.items():
        assert parts[name].parameters == sum(p.numel() for p in module.parameters())


def test_the_papers_size():
    parts = count_parts(recipe.load("nim-2.3b"))
    total = sum(p.parameters for n, p in parts.items() if n != "ctc")
    assert 2.25e9 < total < 2.4e9
    assert 1.70e9 < parts["llm"].parameters < 1.73e9  # Qwen3-1.7B, embeddings tied


def test_files_that_are_not_there_yet():
    nim = recipe.load("nim-2.3b")
    width = nim.model.encoder.width
    assert count_speech_parts(nim)["ctc"].parameters == (width + 1) * ASSUMED_PHONEMES
    unknown = replace(nim.model, llm=replace(nim.model.llm, path="models/other"))
    with pytest.raises(UserError, match=r"config\.json"):
        count_parts(replace(nim, model=unknown))
