"""A checkpoint of one ZeRO stage, resumed as another and back."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from dsasr.checkpoint import tensor_fragments
from dsasr.checkpoint.snapshot_store import OWNER
from dsasr.checkpoint.tensor_fragments import FragmentReader
from dsasr.tracking.run_log import read_metrics

TRAIN = Path(__file__).parents[2] / "dsasr" / "train.py"
# Four steps of pretraining, eight that train the adaptor alone, one, four that train all parts.
STAGES = {"pretrain": 4, "align": 8, "ia_sft": 1, "joint": 4}
SHORT = [*[f"stages.{name}.steps={steps}" for name, steps in STAGES.items()],
         "stages.pretrain.warmup_steps=0", "stages.ia_sft.steps_after_final_swap=0",
         "stages.joint.warmup_steps=3",
         "drift.mode=final", "monitor.every=1", "checkpoint.every_steps=3"]  # fmt: skip
LOSSES = ("ctc", "nll", "entropy", "accuracy", "grad_norm")
RATES = ("lr_encoder", "lr_ctc", "lr_adaptor", "lr_llm")


def metrics_by_step(folder: Path) -> dict[int, dict]:
    return {x["steps"]: x for x in read_metrics(folder) if "grad_norm" in x}


def checkpoint_at(folder: Path, steps: int) -> FragmentReader:
    path = folder / "checkpoints" / f"step-{steps:010d}"
    tensor_fragments.verify(path)
    return FragmentReader(path)


@pytest.fixture(scope="module")
def trained(launch, tiny, tmp_path_factory):
    """``trained(name, zero, source, steps, *overrides)``: a run under ZeRO stage ``zero``, from the
    start or resumed from the checkpoint of ``source`` after ``steps`` steps."""
    root = tmp_path_factory.mktemp("zero")

    def run(
        name: str, zero: int, source: Path | None = None, steps: int = 0, *overrides: str
    ) -> Path:
        folder = root / name
        if source is not None:
            shutil.copytree(source, folder)
            (folder / "snapshots" / OWNER).unlink()  # the copy is another run
            for path in (folder / "checkpoints").glob("step-*"):
                if int(path.name[5:]) > steps:
                    shutil.rmtree(path)
        done = launch(TRAIN, "--recipe", tiny, f"run={folder}", f"engine.deepspeed=zero{zero}",
                      "allow_changed=true", *SHORT, *overrides)  # fmt: skip
        assert done.returncode == 0, done.stdout[-3000:]
        if source is not None:
            assert f"resumed from checkpoint step-{steps:010d}" in done.stdout, done.stdout[-3000:]
        return folder

    return run


@pytest.mark.slow
@pytest.mark.launcher
def test_zero_3_resumes_as_zero_1_and_back(trained):
    zero_3 = trained("three", 3)
    as_zero_1 = trained("one", 1, zero_3, 6)
    back = trained("back", 3, as_zero_1, 15)  # in the joint stage
    # Frozen is frozen: between 6 and 12 only the adaptor is trained.
    before, after = checkpoint_at(zero_3, 6), checkpoint_at(as_zero_1, 12)
    frozen = [k for k in before.shapes if k.startswith(("sft/encoder.", "sft/llm."))]
    trained_keys = [k for k in before.shapes if k.startswith("sft/adaptor.")]
    assert len(frozen) > 10
    assert all(torch.equal(before.whole(k), after.whole(k)) for k in frozen)
    assert not any(torch.equal(before.whole(k), after.whole(k)) for k in trained_keys)
    expected = metrics_by_step(zero_3)
    assert set(expected) == set(range(1, 18))
    for run, since in ((as_zero_1, 7), (back, 16)):
        metrics = metrics_by_step(run)
        assert set(metrics) == set(expected)
        for steps in range(since, 18):
            for name in RATES:  # each group's own
                assert metrics[steps].get(name) == expected[steps].get(name), (
                    run.name,
                    steps,
                    name,
                )
            # ZeRO stages sum the gradient norm in different orders.
            values, expected_values = (
                {k: x[steps][k] for k in LOSSES if k in x[steps]} for x in (metrics, expected)
            )
            assert values == pytest.approx(expected_values, rel=1e-6), (run.name, steps)
    assert expected[16]["lr_encoder"] < expected[16]["lr_adaptor"]
    for run in (as_zero_1, back):
        assert largest_difference(checkpoint_at(run, 17), checkpoint_at(zero_3, 17)) < 1e-6


@pytest.mark.slow
@pytest.mark.launcher
def test_bf16_masters_reach_the_joint_stage_through_a_resume(trained):
    """Resumed after the final swap, in a stage that does not train the encoder."""
    more = ("engine.precision=bf16", "stages.ia_sft.steps=4")
    whole = trained("bf16", 1, None, 0, *more)
    resumed = trained("bf16-resumed", 1, whole, 15, *more)
    at_joint, end = checkpoint_at(resumed, 18), (checkpoint_at(f, 20) for f in (whole, resumed))
    masters = [k for k in at_joint.shapes if k.startswith("sft/master/encoder.")]
    exact = [
        k for k in masters
        if not torch.equal(at_joint.whole(k), at_joint.whole(k.replace("/master", "")).float())
    ]  # fmt: skip
    assert len(masters) > 10 and len(exact) > len(masters) // 2
    assert largest_difference(*end) == 0
    assert metrics_by_step(resumed)[20]["nll"] == metrics_by_step(whole)[20]["nll"]


def largest_difference(a: FragmentReader, b: FragmentReader) -> float:
    """The largest difference between weights, masters and moments of two checkpoints."""
    assert set(a.shapes) == set(b.shapes)
    return max(float((a.whole(k).double() - b.whole(k).double()).abs().max()) for k in a.shapes)
