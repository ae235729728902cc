"""The sbatch commands of a recipe, and the Slurm scripts' own text."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from dsasr import config, recipe
from dsasr.launch import slurm
from dsasr.launch.slurm import SizeConfig, SlurmConfig
from dsasr.utils.errors import UserError

ROOT = Path(__file__).parents[2]
RUN = Path("/shared/run")


def test_a_training_job_takes_everything_from_the_recipe():
    chosen = SlurmConfig(
        size=SizeConfig(nodes=8, gpus=4, cpus=6), time="2-00:00:00", partition="gpu", account="asr",
        signal=600, container="image.sif", options=("--qos=high",),
    )  # fmt: skip
    made = slurm.train(chosen, RUN, "/venv/bin/python")
    assert made.command[0] == "sbatch" and made.command[-1].endswith("slurm/train.sbatch")
    given = set(made.command)
    assert {"--nodes=8", "--ntasks-per-node=4", "--gpus-per-node=4", "--cpus-per-task=6"} <= given
    assert {"--time=2-00:00:00", "--partition=gpu", "--account=asr", "--qos=high"} <= given
    assert {"--signal=USR1@600", "--output=/shared/run/logs/%x-%j.log"} <= given
    expected = {"RUN": "/shared/run", "PYTHON": "/venv/bin/python", "CONTAINER": "image.sif"}
    assert made.variables == expected
    assert ("size", "8 × 4 GPUs, 6 CPUs each: 32 ranks") in made.plan


def test_two_components_have_a_size_each():
    chosen = SlurmConfig(size=SizeConfig(nodes=4), sft=SizeConfig(nodes=2, gpus=2), account="a")
    command = slurm.concurrent(chosen, RUN, "python").command
    parted = command.index(":")
    first, second = command[:parted], command[parted:]
    assert "--nodes=4" in first and "--nodes=2" in second and "--ntasks-per-node=2" in second
    assert all("--account=a" in part and "--signal=USR1@300" in part for part in (first, second))


def test_an_evaluation_is_an_array_over_its_sets():
    made = slurm.evaluate(SlurmConfig(), RUN, "python", ["clean=/a/b", "other=s3://c/{0..3}.tar"])
    assert "--array=0-1" in made.command
    assert made.variables["DATA"] == "clean=/a/b other=s3://c/{0..3}.tar"
    for bad in ("clean", "=x", "../up=x", "a=b c", ".=x"):
        with pytest.raises(UserError, match="NAME=SHARDS"):
            slurm.evaluate(SlurmConfig(), RUN, "python", [bad])
    with pytest.raises(UserError, match="same name"):
        slurm.evaluate(SlurmConfig(), RUN, "python", ["a=x", "a=y"])


@pytest.mark.parametrize(
    "values",
    [
        {"time": "soon"}, {"signal": 0}, {"options": ["qos=high"]}, {"size": {"nodes": 0}},
        {"size": {"gpus": 8, "ranks": 4}},
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(values):
    with pytest.raises(UserError):
        config.build(SlurmConfig, values)


def test_the_size_is_no_reason_to_refuse_a_resume():
    assert "slurm" in recipe.HARMLESS
    assert SizeConfig(gpus=0, ranks=3).world_size == 3 and SizeConfig(gpus=0).world_size == 1


@pytest.mark.parametrize("script", sorted((ROOT / "slurm").iterdir()), ids=lambda p: p.name)
def test_scripts_parse_and_name_every_variable(script):
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    text = script.read_text()
    if script.suffix == ".sbatch":
        assert "#SBATCH --requeue" in text
    used = {"RECIPE", "RUN", "OVERRIDES", "PYTHON", "RETRIES", "CONTAINER", "MOUNTS", "NETWORK"}
    if script.name == "train.sbatch":
        head = text.partition("#SBATCH")[0]
        assert all(f"#   {name} " in head for name in used)
    for line in text.splitlines():
        words = line.split("#")[0].split()
        assert not words or words[0] not in ("env", "printenv", "export -p"), "an environment dump"


def submit(*arguments: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, ROOT / "tools" / "submit.py", *arguments], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_TOKEN": "hf_secret", **env},
    )  # fmt: skip


def test_the_tool_prints_its_plan_and_submits(tiny, tmp_path):
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    fake = bin_ / "sbatch"
    fake.write_text('#!/bin/bash\necho "$RECIPE $RUN $*" > "$RUN/asked"\n')
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    run = tmp_path / "run"
    wanted = ["train", "--recipe", str(tiny), f"run={run}", "seed=7"]
    wanted += ["slurm.size={nodes: 2, gpus: 0, ranks: 1}"]
    done = submit(*wanted, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "2 × 1 CPU ranks" in done.stdout and "--nodes=2" in done.stdout
    assert "ia_sft  14 steps" in done.stdout and not run.exists()
    done = submit(*wanted, PATH=f"{bin_}:{os.environ['PATH']}")
    assert done.returncode == 0, done.stderr
    saved, folder = (run / "asked").read_text().split()[:2]
    assert folder == str(run) and recipe.load(saved).seed == 7
    assert "hf_secret" not in done.stdout + Path(saved).read_text()
    assert submit("eval", "--recipe", str(tiny)).returncode == 2
    assert "there is no sbatch" in submit(*wanted, PATH="/nowhere").stderr
