"""A checkpoint of one ZeRO stage, resumed as another and back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from dsasr import fragments
from dsasr.fragments import FragmentReader

TRAIN = Path(__file__).parent.parent / "dsasr" / "train.py"
# Six steps of pretraining, ten that train the adaptor alone, eight that train all in three groups.
SHORT = ["stages.pretrain.steps=6", "stages.align.steps=10", "stages.joint.steps=8",
         "stages.ia_sft.steps=1", "stages.ia_sft.after_final=0", "drift.mode=final",
         "stages.joint.warmup=3", "monitor.every=1", "checkpoint.every_steps=4"]  # fmt: skip
LEARNT = ("ctc", "nll", "entropy", "accuracy", "grad_norm")
RATES = ("rate_encoder", "rate_ctc", "rate_adaptor", "rate_llm")


def lines(folder: Path) -> dict[int, dict]:
    held = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    return {x["steps"]: x for x in held if "grad_norm" in x}


def at(folder: Path, steps: int) -> FragmentReader:
    path = folder / "checkpoints" / f"step-{steps:010d}"
    fragments.verify(path)
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
def test_zero_3_goes_on_as_zero_1_or_2_and_back(trained):
    whole = trained("three", 3)
    one = trained("one", 1, whole, 8)
    back = trained("back", 3, one, 20)
    two = trained("two", 2, whole, 20)
    # Frozen is frozen: between 8 and 12 only the adaptor is trained.
    before, after = at(whole, 8), at(one, 12)
    frozen = [k for k in before.shapes if "/weight/" in f"/{k}/" and "adaptor" not in k]
    assert len(frozen) > 10 and any("llm" in k for k in frozen)
    moved = [k for k in frozen if not torch.equal(before.whole(k), after.whole(k))]
    assert not moved
    # A resumed state is the saved one: what was written by one stage is what the next starts from.
    assert at(one, 20).manifest["branches"] == at(whole, 20).manifest["branches"]
    told = lines(whole)
    assert set(told) == set(range(1, 26))
    for run, since in ((one, 9), (back, 21), (two, 21)):
        found = lines(run)
        assert set(found) == set(told)
        for steps in range(since, 26):
            for name in RATES:
                assert found[steps].get(name) == told[steps].get(name), (run.name, steps, name)
            for name in LEARNT:
                mine, theirs = found[steps].get(name), told[steps].get(name)
                assert mine == pytest.approx(theirs, rel=1e-6), (run.name, steps, name)
    # A group of its own for each part, with its own rate.
    assert len({told[22][f"rate_{part}"] for part in ("encoder", "adaptor")}) == 2
    for run in (one, back, two):
        assert finest(at(run, 25), at(whole, 25)) < 1e-6


def finest(one: FragmentReader, other: FragmentReader) -> float:
    """The largest difference between weights of two checkpoints."""
    assert set(one.shapes) == set(other.shapes)
    return max(
        float((one.whole(k).double() - other.whole(k).double()).abs().max()) for k in one.shapes
    )
