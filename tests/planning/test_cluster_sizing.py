"""Cluster sizing against arithmetic that can be done by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dsasr import recipe
from dsasr.planning import cluster_sizing, flops
from dsasr.planning.memory import Machine, MicroBatch, Traffic, step_memory
from dsasr.planning.model_parts import count_parts

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def nim() -> recipe.Recipe:
    return recipe.load("nim-2.3b")


@pytest.fixture(scope="module")
def parts(nim):
    return count_parts(nim)


def test_flops_are_those_of_average_utterances(nim, parts):
    """test_flops.py compares the formulas with torch's counter."""
    shape, traffic = parts["llm"].shape, Traffic(seconds=8.0, tokens=4.0)
    at = MicroBatch.of(nim, nim.stage("ia_sft"), traffic, parts)
    assert (at.rows, at.frames, at.adaptor_inputs, at.positions, at.targets) == (
        800,
        200,
        200,
        122,
        33,
    )
    work = {
        n: cluster_sizing.micro_batch_flops(nim, nim.stage(n), at, parts)
        for n in ("align", "ia_sft")
    }
    count = at.utterances
    assert work["align"]["llm"].forward == pytest.approx(flops.llm(shape, [122]).forward * count)
    assert work["align"]["head"].forward == pytest.approx(flops.head(shape, 33).forward * count)
    encoder = parts["encoder"].cost.flops(800).forward * count
    assert work["ia_sft"]["encoder"] == flops.StepFlops(pytest.approx(encoder), 0, 0)
    # Both recompute; align sends gradients through a frozen model, ia_sft also trains it.
    frozen, trained = work["align"]["llm"], work["ia_sft"]["llm"]
    assert frozen.recomputed == trained.recomputed == frozen.forward == trained.forward
    linear = 2 * shape.linear * 122 * count
    assert trained.backward - frozen.backward == pytest.approx(linear)
    assert trained.backward == pytest.approx(2 * trained.forward)
    # Both views of a pretraining utterance count.
    pretrain = nim.stage("pretrain")
    both = MicroBatch.of(nim, pretrain, traffic, parts)
    views = cluster_sizing.micro_batch_flops(nim, pretrain, both, parts)["encoder"]
    assert views.forward == pytest.approx(2 * both.utterances * encoder / count)
    assert both.audio_seconds == pytest.approx(480.0)


def test_every_adaptor_and_lora_in_the_encoder_are_planned(nim):
    """By hand, for 25 encoder frames a second and utterances of 8 s."""
    width, llm = 1280, 2048
    over = ["stages.joint.trains={encoder_lora: 1.0e-5, adaptor: 1.0e-5}"]
    pretrain = ["stages.pretrain.trains={encoder_lora: 1.0e-4, ctc: 1.0e-4}"]
    for kind, inputs, products in (
        ("{kind: conv}", 200, 2 * 50 * (6 * width * llm + 4 * llm**2)),
        ("{kind: qformer, stack: 8, queries: 2, layers: 1, hidden: 512}", 200,
         25 * (2 * 8 * width * 1024 + 2 * 2 * (10 * 512**2 + 512 * llm) + 4 * 2 * 8 * 512)),
        ("{kind: ctc, frames: true}", 96, 2 * 96 * (256 + width) * (llm + 200)),
    ):  # fmt: skip
        settings = [f"model.adaptor={kind}", "model.encoder_lora.rank=4", *over, *pretrain]
        cfg = recipe.load("nim-2.3b", settings)
        parts, stage = count_parts(cfg), cfg.stage("joint")
        traffic, machine = Traffic(8.0, 4.0), Machine(nodes=2, gpus=8)
        at = MicroBatch.of(cfg, stage, traffic, parts)
        work = cluster_sizing.micro_batch_flops(cfg, stage, at, parts)
        assert at.adaptor_inputs == inputs
        assert work["adaptor"].forward == pytest.approx(products * at.utterances)
        added = parts["encoder_lora"].parameters
        assert work["encoder_lora"].forward == pytest.approx(2 * added * 200 * at.utterances)
        assert ("ctc" in work) == ("ctc" in kind)
        cost = cluster_sizing.estimate_step(cfg, stage, machine, traffic, parts)
        trained = added + parts["adaptor"].parameters
        assert cost.memory["optimizer"] == pytest.approx(12 * trained / 16 / 1e9)
        # Three passes gather or reduce what trains, two what a gradient passes.
        used = sum(parts[n].parameters for n in cfg.parts("sft"))
        assert cost.traffic == pytest.approx(2 * (2 * used + trained) * 15 / 16)
        assert cost.memory["activations"] > 0


def test_traffic_of_zero_3(nim, parts):
    machine = Machine(nodes=2, gpus=8)
    joint = cluster_sizing.estimate_step(nim, nim.stage("joint"), machine, parts=parts)
    sft = sum(parts[n].parameters for n in ("encoder", "adaptor", "llm"))
    assert joint.traffic == pytest.approx(6 * sft * 15 / 16)  # gather twice, reduce once
    single = Machine(nodes=1, gpus=1)
    alone = cluster_sizing.estimate_step(nim, nim.stage("joint"), single, parts=parts)
    assert alone.traffic == alone.network == alone.latency == 0 and alone.bottleneck == "products"
    assert alone.peak > joint.peak > joint.resident
    # In align nothing before the adaptor needs a backward pass.
    align = cluster_sizing.estimate_step(nim, nim.stage("align"), machine, parts=parts)
    backward = parts["adaptor"].parameters + parts["llm"].parameters
    reduced = parts["adaptor"].parameters
    assert align.traffic == pytest.approx(2 * (sft + backward + reduced) * 15 / 16)


def test_the_memory_is_the_planners(nim, parts):
    machine, traffic = Machine(nodes=2, gpus=4), Traffic(5.0, 3.0)
    for stage in nim.stages:
        cost = cluster_sizing.estimate_step(nim, stage, machine, traffic, parts)
        assert cost.memory == step_memory(nim, stage, machine, parts, traffic)


def test_what_limits_a_step_and_what_to_change(nim, parts):
    stage = nim.stage("ia_sft")
    slow = cluster_sizing.estimate_step(nim, stage, Machine(network=2.0), parts=parts)
    assert slow.bottleneck == "network"
    assert "zero_hpz_partition_size 8" in cluster_sizing.advice(slow, Machine(), nim)
    small = Machine(nodes=1, gpus=1, memory=24)
    too_large = cluster_sizing.estimate_step(nim, stage, small, parts=parts)
    assert "does not fit" in cluster_sizing.advice(too_large, small, nim)
    many = Machine(nodes=128, storage=1.0)
    waiting = cluster_sizing.estimate_step(nim, stage, many, parts=parts)
    assert "cache_gb" in cluster_sizing.advice(waiting, many, nim)
    sizes = cluster_sizing.machine_sizes(Machine())
    assert [m.world for m in sizes] == [2**n for n in range(11)]
    assert sizes[4].nodes == 2


def test_advice_for_a_run_with_offloaded_optimizer_states(nim, parts):
    offload = replace(nim, engine=replace(nim.engine, deepspeed="zero3-offload"))
    small = Machine(nodes=1, gpus=1, memory=8)
    cost = cluster_sizing.estimate_step(offload, nim.stage("joint"), small, parts=parts)
    assert "optimizer" not in cost.memory
    assert "does not fit" in cluster_sizing.advice(cost, small, offload)


def test_checkpoints_hold_all_branches_and_the_largest_states(nim, parts):
    sft = sum(parts[n].parameters for n in ("encoder", "adaptor", "llm"))
    pretrain = parts["encoder"].parameters + parts["ctc"].parameters
    assert cluster_sizing.checkpoint_bytes(nim, parts) == 14 * (sft + pretrain)
