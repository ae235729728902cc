"""A checkpoint of one ZeRO stage, resumed as another and back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from dsasr.checkpoint import tensor_fragments
from dsasr.checkpoint.snapshot_store import OWNER
from dsasr.checkpoint.tensor_fragments import FragmentReader

TRAIN = Path(__file__).parents[2] / "dsasr" / "train.py"
# Four steps of pretraining, eight that train the adaptor alone, one, four that train all parts.
STAGES = {"pretrain": 4, "align": 8, "ia_sft": 1, "joint": 4}
SHORT = [*[f"stages.{name}.steps={steps}" for name, steps in STAGES.items()],
         "stages.pretrain.warmup_steps=0", "stages.ia_sft.steps_after_final_swap=0",
         "stages.joint.warmup_steps=3",
         "drift.mode=final", "monitor.every=1", "checkpoint.every_steps=3"]  # fmt: skip
LEARNED = ("ctc", "nll", "entropy", "accuracy", "grad_norm")
RATES = ("lr_encoder", "lr_ctc", "lr_adaptor", "lr_llm")


def lines(folder: Path) -> dict[int, dict]:
    held = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    return {x["steps"]: x for x in held if "grad_norm" in x}


def at(folder: Path, steps: int) -> FragmentReader:
    path = folder / "checkpoints" / f"step-{steps:010d}"
    tensor_fragments.verify(path)
    return FragmentReader(path)


@pytest.fixture(scope="module")
def trained(launch, tiny, tmp_path_factory):
    """``trained(zero, source, steps)``: a run under ZeRO stage ``zero``, from the start or from
    what ``source`` was after so many steps."""
    here = tmp_path_factory.mktemp("zero")

    def run(name: str, zero: int, source: Path | None = None, steps: int = 0) -> Path:
        folder = here / name
        if source is not None:
            shutil.copytree(source, folder)
            (folder / "snapshots" / OWNER).unlink()  # the copy is another run
            for path in (folder / "checkpoints").glob("step-*"):
                if int(path.name[5:]) > steps:
                    shutil.rmtree(path)
        done = launch(TRAIN, "--recipe", tiny, f"run={folder}", f"engine.deepspeed=zero{zero}",
                      "allow_changed=true", *SHORT)  # fmt: skip
        assert done.returncode == 0, done.stdout[-3000:]
        if source is not None:
            assert f"resumed: steps={steps}" in done.stdout, done.stdout[-3000:]
        return folder

    return run


@pytest.mark.launcher
def test_zero_3_goes_on_as_zero_1_and_back(trained):
    whole = trained("three", 3)
    one = trained("one", 1, whole, 6)
    back = trained("back", 3, one, 15)  # in the joint stage
    # Frozen is frozen: between 6 and 12 only the adaptor is trained.
    before, after = at(whole, 6), at(one, 12)
    frozen = [k for k in before.shapes if k.startswith(("sft/encoder.", "sft/llm."))]
    moves = [k for k in before.shapes if k.startswith("sft/adaptor.")]
    assert len(frozen) > 10
    assert all(torch.equal(before.whole(k), after.whole(k)) for k in frozen)
    assert not any(torch.equal(before.whole(k), after.whole(k)) for k in moves)
    told = lines(whole)
    assert set(told) == set(range(1, 18))
    for run, since in ((one, 7), (back, 16)):
        found = lines(run)
        assert set(found) == set(told)
        for steps in range(since, 18):
            for name in RATES:  # each group's own
                assert found[steps].get(name) == told[steps].get(name), (run.name, steps, name)
            # ZeRO stages add up the gradient's norm in other orders.
            mine, theirs = (
                {k: x[steps][k] for k in LEARNED if k in x[steps]} for x in (found, told)
            )
            assert mine == pytest.approx(theirs, rel=1e-6), (run.name, steps)
    assert told[16]["lr_encoder"] < told[16]["lr_adaptor"]
    for run in (one, back):
        assert run_apart(at(run, 17), at(whole, 17)) < 1e-6


def run_apart(one: FragmentReader, other: FragmentReader) -> float:
    """The largest difference between weights, masters and moments of two checkpoints."""
    assert set(one.shapes) == set(other.shapes)
    return max(
        float((one.whole(k).double() - other.whole(k).double()).abs().max()) for k in one.shapes
    )
