"""A run, its export and a run with LoRA, as sources of another run's initial weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dsasr import recipe
from dsasr.build import Builder
from dsasr.checkpoint.locate import open_run_checkpoint
from dsasr.inference import export
from dsasr.training.trainer import Trainer

# There is no process group here to cut parameters for: ZeRO-2 leaves them whole.
WHOLE = "engine.deepspeed=zero2"
LORA = ["model.lora={rank: 2}", "stages.ia_sft.trains={adaptor: 1.0e-3, lora: 1.0e-3}",
        "stages.joint.trains={encoder: 1.0e-4, adaptor: 1.0e-3, lora: 1.0e-3}"]  # fmt: skip


def perturbed(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """``module`` with other weights than a fresh one."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        noise = 0.05 * torch.randn(parameter.shape, generator=generator)
        parameter.data.add_(noise.to(parameter.dtype))
    return module


def write_run(tiny: Path, folder: Path, *overrides: str) -> Path:
    """A run with a checkpoint of both branches and a published snapshot, without a step."""
    trainer = Trainer(recipe.load(str(tiny), [f"run={folder}", WHOLE, *overrides]))
    for seed, branch in enumerate(trainer.recipe.branches):
        perturbed(trainer.branches.get(branch).module, seed)
    if "pretrain" in trainer.recipe.branches:
        trainer.publish_encoder("drift", None)
    assert trainer.save()
    trainer.close()
    return folder


@pytest.fixture(scope="session")
def source(tiny, tmp_path_factory) -> Path:
    """A folder with a run, its export, and a run whose language model has LoRA."""
    folder = tmp_path_factory.mktemp("source")
    run = write_run(tiny, folder / "run")
    export.export_run(Builder(recipe.load(str(tiny))), open_run_checkpoint(run), folder / "model")
    write_run(tiny, folder / "lora", *LORA)
    return folder


@pytest.fixture
def trainer_of(tiny):
    """``trainer_of(folder, *overrides)``: a `Trainer` of the tiny recipe, closed at the end."""
    trainers = []

    def start(folder: Path, *overrides: str) -> Trainer:
        trainers.append(Trainer(recipe.load(str(tiny), [f"run={folder}", WHOLE, *overrides])))
        return trainers[-1]

    yield start
    for trainer in trainers:
        trainer.close()


@pytest.fixture(scope="session")
def lora_overrides() -> list[str]:
    """What gives the tiny recipe LoRA, as the run ``lora`` of `source` has it."""
    return LORA
