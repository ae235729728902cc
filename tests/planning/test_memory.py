"""The memory planner against arithmetic that can be done by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dsasr import recipe
from dsasr.planning.memory import (
    Machine,
    between_steps,
    resident_parts,
    stages_beside,
    step_memory,
)
from dsasr.planning.model_parts import count_parts


@pytest.fixture(scope="module")
def nim() -> recipe.Recipe:
    return recipe.load("nim-2.3b", ["engine.offload.device=none"])


@pytest.fixture(scope="module")
def parts(nim):
    return count_parts(nim)


def test_shares_of_zero_3(nim, parts):
    size = {name: part.parameters for name, part in parts.items()}
    sft, pretrain = size["encoder"] + size["adaptor"] + size["llm"], size["encoder"] + size["ctc"]
    machine = Machine(nodes=2, gpus=8)
    # Beside pretraining a rank has both branches, the inactive one's optimizer states included.
    ia_sft = step_memory(nim, nim.stage("ia_sft"), machine, parts)
    trained = size["adaptor"] + size["llm"]
    assert ia_sft["weights"] == pytest.approx(2 * (sft + pretrain) / 16 / 1e9)
    assert ia_sft["gradients"] == pytest.approx(2 * trained / 16 / 1e9)
    assert ia_sft["optimizer"] == pytest.approx(12 * trained / 16 / 1e9)
    assert ia_sft["offloaded"] == pytest.approx(12 * pretrain / 16 / 1e9)
    during_pretraining = step_memory(nim, nim.stage("pretrain"), machine, parts)
    assert during_pretraining["offloaded"] == pytest.approx(12 * trained / 16 / 1e9)
    # In the joint stage pretraining is over, and its branch closed.
    joint = step_memory(nim, nim.stage("joint"), machine, parts)
    assert joint["weights"] == pytest.approx(2 * sft / 16 / 1e9)
    assert joint["optimizer"] == pytest.approx(12 * sft / 16 / 1e9) and "offloaded" not in joint
    assert 0 < between_steps(joint) < sum(joint.values())


def test_where_optimizer_states_are_offloaded_to(nim, parts):
    stage, gpus = nim.stage("ia_sft"), Machine(nodes=1, gpus=4)
    cpus = replace(gpus, cpu=True)

    def offloaded(device: str, machine: Machine) -> bool:
        engine = replace(nim.engine, offload=replace(nim.engine.offload, device=device))
        return "offloaded" in step_memory(replace(nim, engine=engine), stage, machine, parts)

    assert offloaded("none", gpus) and offloaded("none", cpus)
    # A CPU rank's memory is the host's.
    assert not offloaded("cpu", gpus) and offloaded("cpu", cpus)
    assert not offloaded("disk", gpus) and not offloaded("disk", cpus)
    engine = replace(nim.engine, deepspeed="zero3-offload")
    memory = step_memory(replace(nim, engine=engine), stage, gpus, parts)
    assert "optimizer" not in memory and "gradients" not in memory


def test_the_head_has_a_chunk_of_logits_and_float32_sums(nim, parts):
    machine = Machine(nodes=1, gpus=4)
    frozen, trained = (
        step_memory(nim, nim.stage(name), machine, parts)["head"] for name in ("align", "ia_sft")
    )
    shape = parts["llm"].shape
    assert trained - frozen == pytest.approx(4 * shape.vocab * shape.width / 1e9)
    assert 0 < frozen < 4 * (1 << 28) / 1e9 + 0.1
    assert "head" not in step_memory(nim, nim.stage("pretrain"), machine, parts)
    on_cpu = replace(machine, cpu=True)
    assert "head" not in step_memory(nim, nim.stage("ia_sft"), on_cpu, parts)


def test_precision_doubles_the_weights(nim, parts):
    stage, machine = nim.stage("joint"), Machine(nodes=1, gpus=4)
    full = replace(nim, engine=replace(nim.engine, precision="fp32"))
    bf16, fp32 = (step_memory(r, stage, machine, parts) for r in (nim, full))
    assert fp32["weights"] == 2 * bf16["weights"] and fp32["optimizer"] == bf16["optimizer"]
    auto = step_memory(nim, stage, replace(machine, cpu=True), parts)  # fp32 on a CPU
    assert auto["weights"] == fp32["weights"] and auto["heap"] > 0


def test_activations_of_frozen_and_of_checkpointed_layers(nim, parts):
    machine = Machine(nodes=1, gpus=4)

    def activations(stage: str, **encoder) -> float:
        model = replace(nim.model, encoder=replace(nim.model.encoder, **encoder))
        return step_memory(replace(nim, model=model), nim.stage(stage), machine, parts)[
            "activations"
        ]

    whole = activations("joint", activation_checkpointing=False)
    cheap = activations("joint", activation_checkpointing=True, recompute="cheap")
    full = activations("joint", activation_checkpointing=True, recompute="all")
    assert whole > cheap > full
    # A frozen encoder saves nothing, whatever its settings.
    assert activations("align", activation_checkpointing=False) == activations("align")


def test_the_other_branch_is_beside_where_both_run(tiny) -> None:
    cfg = recipe.load(str(tiny))
    assert [s.name for s in stages_beside(cfg, cfg.stage("pretrain"))] == ["align", "ia_sft"]
    assert [s.name for s in stages_beside(cfg, cfg.stage("align"))] == ["pretrain"]
    assert stages_beside(cfg, cfg.stage("joint")) == []
    assert resident_parts(cfg, cfg.stage("joint")) == ["encoder", "adaptor", "llm"]
    assert sorted(resident_parts(cfg, cfg.stage("align"))) == sorted(
        ["encoder", "adaptor", "llm", "encoder", "ctc"]
    )
    alone = recipe.load(str(tiny), ["branch=pretrain"])
    assert stages_beside(alone, alone.stage("pretrain")) == []
