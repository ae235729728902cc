"""The plan of a cluster against modules that exist and arithmetic that can be done by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dsasr import recipe
from dsasr.build import Builder
from dsasr.planning import cluster_sizing, flops
from dsasr.planning.cluster_sizing import Machine, Traffic
from dsasr.utils.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def nim() -> recipe.Recipe:
    return recipe.load("nim-2.3b")


@pytest.fixture(scope="module")
def counted(nim):
    return cluster_sizing.parts(nim)


def stage(chosen: recipe.Recipe, name: str):
    return next(s for s in chosen.stages if s.name == name)


def test_parameters_are_those_of_the_modules(tiny):
    chosen = recipe.load(str(tiny))
    counted = cluster_sizing.parts(chosen)
    model = Builder(chosen).speech_llm()
    for name in ("encoder", "adaptor", "llm"):
        real = sum(p.numel() for p in getattr(model, name).parameters())
        assert counted[name].parameters == real


def test_the_papers_size_is_the_papers(counted):
    total = sum(p.parameters for n, p in counted.items() if n != "ctc")
    assert 2.25e9 < total < 2.4e9
    assert 1.70e9 < counted["llm"].parameters < 1.73e9  # Qwen3-1.7B, embeddings tied


def test_the_work_is_that_of_average_utterances(nim, counted):
    """The formulas are held to torch's counter in test_flops.py."""
    shape, traffic = counted["llm"].shape, Traffic(seconds=8.0, tokens=4.0)
    done = {n: cluster_sizing.work(nim, stage(nim, n), traffic, shape) for n in ("align", "ia_sft")}
    at = cluster_sizing.positions(nim, stage(nim, "ia_sft"), traffic)
    count = at["seconds"] / 8.0
    assert done["align"]["llm"].forward == pytest.approx(flops.llm(shape, [122]).forward * count)
    assert done["align"]["head"].forward == pytest.approx(flops.head(shape, 33).forward * count)
    encoder = flops.encoder(nim.model.encoder, [800]).forward * count
    assert done["ia_sft"]["encoder"] == flops.Work(pytest.approx(encoder), 0, 0)
    # Both recompute; align sends gradients through a frozen model, ia_sft also trains it.
    frozen, trained = done["align"]["llm"], done["ia_sft"]["llm"]
    assert frozen.recomputed == trained.recomputed == frozen.forward == trained.forward
    linear = 2 * shape.linear * 122 * count
    assert trained.backward - frozen.backward == pytest.approx(linear)
    assert trained.backward == pytest.approx(2 * trained.forward)
    # Both views of a pretraining utterance count.
    views = cluster_sizing.work(nim, stage(nim, "pretrain"), traffic, None)["encoder"]
    audio = cluster_sizing.positions(nim, stage(nim, "pretrain"), traffic)["seconds"]
    assert views.forward == pytest.approx(2 * audio / 8 * encoder / count)


def test_memory_and_traffic_of_zero_3(nim, counted):
    made = cluster_sizing.step(nim, stage(nim, "joint"), Machine(nodes=2, gpus=8), counted=counted)
    sft = sum(counted[n].parameters for n in ("encoder", "adaptor", "llm"))
    everything = sft + counted["encoder"].parameters + counted["ctc"].parameters
    assert made.memory["weights"] == pytest.approx(everything * 2 / 16 / 1e9)
    assert made.memory["optimizer"] == pytest.approx(sft * 12 / 16 / 1e9)
    assert made.traffic == pytest.approx(6 * sft * 15 / 16)  # gather twice, reduce once
    alone = cluster_sizing.step(nim, stage(nim, "joint"), Machine(nodes=1, gpus=1), counted=counted)
    assert alone.traffic == alone.network == alone.latency == 0 and alone.bottleneck == "products"
    assert alone.peak > made.peak
    # In align nothing before the adaptor needs a backward pass.
    align = cluster_sizing.step(nim, stage(nim, "align"), Machine(nodes=2, gpus=8), counted=counted)
    reached = counted["adaptor"].parameters + counted["llm"].parameters
    own = counted["adaptor"].parameters
    assert align.traffic == pytest.approx(2 * (sft + reached + own) * 15 / 16)


def test_what_limits_a_step_and_what_to_change(nim, counted):
    chosen = stage(nim, "ia_sft")
    slow = cluster_sizing.step(nim, chosen, Machine(network=2.0), counted=counted)
    assert slow.bottleneck == "network"
    assert "zero_hpz_partition_size 8" in cluster_sizing.advice(slow, Machine(), nim)
    small = Machine(nodes=1, gpus=1, memory=24)
    fits_not = cluster_sizing.step(nim, chosen, small, counted=counted)
    assert "does not fit" in cluster_sizing.advice(fits_not, small, nim)
    many = Machine(nodes=128, storage=1.0)
    assert "cache_gb" in cluster_sizing.advice(
        cluster_sizing.step(nim, chosen, many, counted=counted), many, nim
    )
    worlds = [m.world for m in cluster_sizing.layouts(Machine())]
    assert worlds == [2**n for n in range(11)]
    assert cluster_sizing.layouts(Machine())[4].nodes == 2


def test_checkpoints_and_unknown_models(nim, counted, tiny):
    sft = sum(counted[n].parameters for n in ("encoder", "adaptor", "llm"))
    pre = counted["encoder"].parameters + counted["ctc"].parameters
    assert cluster_sizing.checkpoint_bytes(nim, counted) == 14 * (sft + pre)
    other = replace(nim.model, llm=replace(nim.model.llm, path="models/other"))
    with pytest.raises(UserError, match=r"config\.json"):
        cluster_sizing.parts(replace(nim, model=other))
    assert cluster_sizing.measured_rate(0.01, 64) > 0
