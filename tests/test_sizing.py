"""The plan of a cluster against modules that exist and arithmetic that can be done by hand."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dsasr import recipe, sizing
from dsasr.build import Builder
from dsasr.errors import UserError
from dsasr.model.encoder import Encoder, EncoderConfig
from dsasr.sizing import Machine, Traffic

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def nim() -> recipe.Recipe:
    return recipe.load("nim-2.3b")


@pytest.fixture(scope="module")
def counted(nim):
    return sizing.parts(nim)


def stage(chosen: recipe.Recipe, name: str):
    return next(s for s in chosen.stages if s.name == name)


def test_parameters_are_those_of_the_modules(tiny):
    chosen = recipe.load(str(tiny))
    counted = sizing.parts(chosen)
    model = Builder(chosen).speech_llm()
    for name in ("encoder", "adaptor", "llm"):
        real = sum(p.numel() for p in getattr(model, name).parameters())
        assert counted[name].parameters == real


def test_the_papers_size_is_the_papers(counted):
    total = sum(p.parameters for n, p in counted.items() if n != "ctc")
    assert 2.25e9 < total < 2.4e9
    assert 1.70e9 < counted["llm"].parameters < 1.73e9  # Qwen3-1.7B, embeddings tied


def test_products_are_those_that_torch_counts(nim):
    config = EncoderConfig(width=256, layers=4, heads=4, ffn=1024, kernel=15)
    encoder = Encoder(config).eval()
    frames = 1600
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder(torch.randn(1, frames, 80), torch.tensor([frames]))
    chosen = replace(nim, model=replace(nim.model, encoder=config))
    part = sizing.Part(sum(p.numel() for p in encoder.parameters()), 0, 4, 0)
    part = replace(part, products=part.parameters)
    frozen = stage(nim, "ia_sft")
    ours = sizing._flops(chosen, frozen, "encoder", part, frames / 4, Traffic(seconds=16.0))
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.15)


def test_backward_and_recomputing_count(nim, counted):
    one = {n: sizing._flops(nim, stage(nim, n), "llm", counted["llm"], 1000, Traffic())
           for n in ("align", "ia_sft")}  # fmt: skip
    forward = 2 * counted["llm"].products * 1000
    # Both recompute; align sends gradients through a frozen model, ia_sft also trains it.
    assert one["align"] == pytest.approx(3 * forward)
    assert one["ia_sft"] == pytest.approx(4 * forward)
    frozen = sizing._flops(nim, stage(nim, "ia_sft"), "encoder", counted["encoder"], 1, Traffic(0))
    assert frozen == 2 * counted["encoder"].products


def test_memory_and_traffic_of_zero_3(nim, counted):
    made = sizing.step(nim, stage(nim, "joint"), Machine(nodes=2, gpus=8), counted=counted)
    sft = sum(counted[n].parameters for n in ("encoder", "adaptor", "llm"))
    everything = sft + counted["encoder"].parameters + counted["ctc"].parameters
    assert made.memory["weights"] == pytest.approx(everything * 2 / 16 / 1e9)
    assert made.memory["optimizer"] == pytest.approx(sft * 12 / 16 / 1e9)
    assert made.traffic == pytest.approx(6 * sft * 15 / 16)  # gather twice, reduce once
    alone = sizing.step(nim, stage(nim, "joint"), Machine(nodes=1, gpus=1), counted=counted)
    assert alone.traffic == alone.network == alone.latency == 0 and alone.bottleneck == "products"
    assert alone.peak > made.peak
    # In align nothing before the adaptor needs a backward pass.
    align = sizing.step(nim, stage(nim, "align"), Machine(nodes=2, gpus=8), counted=counted)
    reached = counted["adaptor"].parameters + counted["llm"].parameters
    own = counted["adaptor"].parameters
    assert align.traffic == pytest.approx(2 * (sft + reached + own) * 15 / 16)


def test_what_limits_a_step_and_what_to_change(nim, counted):
    chosen = stage(nim, "ia_sft")
    slow = sizing.step(nim, chosen, Machine(network=2.0), counted=counted)
    assert slow.bottleneck == "network"
    assert "zero_hpz_partition_size 8" in sizing.advice(slow, Machine(), nim)
    small = Machine(nodes=1, gpus=1, memory=24)
    fits_not = sizing.step(nim, chosen, small, counted=counted)
    assert "does not fit" in sizing.advice(fits_not, small, nim)
    many = Machine(nodes=128, storage=1.0)
    assert "cache_gb" in sizing.advice(sizing.step(nim, chosen, many, counted=counted), many, nim)
    worlds = [m.world for m in sizing.layouts(Machine())]
    assert worlds == [2**n for n in range(11)]
    assert sizing.layouts(Machine())[4].nodes == 2


def test_checkpoints_and_unknown_models(nim, counted, tiny):
    sft = sum(counted[n].parameters for n in ("encoder", "adaptor", "llm"))
    pre = counted["encoder"].parameters + counted["ctc"].parameters
    assert sizing.checkpoint_bytes(nim, counted) == 14 * (sft + pre)
    other = replace(nim.model, llm=replace(nim.model.llm, path="models/other"))
    with pytest.raises(UserError, match=r"config\.json"):
        sizing.parts(replace(nim, model=other))
    assert sizing.measured_rate(0.01, 64) > 0


def test_the_tool():
    command = [sys.executable, ROOT / "tools" / "plan.py", "--recipe", "nim-2.3b",
               "--nodes", "4", "--start", "2026-01-01"]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert "from 2026-01-01 to 20" in done.stdout and "GPU-hours" in done.stdout
    assert " 1024 " in done.stdout
