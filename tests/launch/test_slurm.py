"""The sbatch commands that a recipe gives; the Slurm scripts' own text."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from dsasr import config, recipe
from dsasr.launch import slurm
from dsasr.launch.slurm import SizeConfig, SlurmConfig
from dsasr.utils.errors import UserError

ROOT = Path(__file__).parents[2]
RUN = Path("/shared/run")


def test_a_training_job_takes_everything_from_the_recipe():
    cfg = SlurmConfig(
        size=SizeConfig(nodes=8, gpus=4, cpus=6), time="2-00:00:00", partition="gpu", account="asr",
        signal=600, container="image.sif", options=("--qos=high",),
    )  # fmt: skip
    job = slurm.train(cfg, RUN, "/venv/bin/python")
    assert job.command[0] == "sbatch" and job.command[-1].endswith("slurm/train.sbatch")
    given = set(job.command)
    assert {"--nodes=8", "--ntasks-per-node=4", "--gpus-per-node=4", "--cpus-per-task=6"} <= given
    assert {"--time=2-00:00:00", "--partition=gpu", "--account=asr", "--qos=high"} <= given
    assert {"--signal=B:USR1@600", "--output=/shared/run/logs/%x-%j.log"} <= given
    expected = {"RUN": "/shared/run", "PYTHON": "/venv/bin/python", "CONTAINER": "image.sif"}
    assert job.variables == {**expected, "CODE": str(ROOT), "DOCTOR": "warn"}
    assert slurm.concurrent(SlurmConfig(doctor="off"), RUN, "python").variables["DOCTOR"] == "off"
    assert ("size", "8 × 4 GPUs, 6 CPUs each: 32 ranks") in job.plan


def test_two_components_have_a_size_each():
    cfg = SlurmConfig(size=SizeConfig(nodes=4), sft=SizeConfig(nodes=2, gpus=2), account="a")
    command = slurm.concurrent(cfg, RUN, "python").command
    parted = command.index(":")
    first, second = command[:parted], command[parted:]
    assert "--nodes=4" in first and "--nodes=2" in second and "--ntasks-per-node=2" in second
    assert all("--account=a" in part and "--signal=B:USR1@300" in part for part in (first, second))


def test_an_evaluation_is_an_array_over_its_sets():
    job = slurm.evaluate(SlurmConfig(), RUN, "python", ["clean=/a/b", "other=s3://c/{0..3}.tar"])
    assert "--array=0-1" in job.command
    given = [option for option in job.command if option.startswith(("--time", "--signal"))]
    assert given == ["--time=4:00:00"] and ("time", "4:00:00") in job.plan  # not training's
    assert job.variables["DATA"] == "clean=/a/b other=s3://c/{0..3}.tar"
    for bad in ("clean", "=x", "../up=x", "a=b c", ".=x"):
        with pytest.raises(UserError, match="NAME=SHARDS"):
            slurm.evaluate(SlurmConfig(), RUN, "python", [bad])
    with pytest.raises(UserError, match="same name"):
        slurm.evaluate(SlurmConfig(), RUN, "python", ["a=x", "a=y"])


@pytest.mark.parametrize(
    "values",
    [
        {"time": "soon"}, {"time": "0:00"}, {"eval_time": "4h"}, {"signal": 0},
        {"time": "5:00", "signal": 300}, {"time": "5"}, {"time": "0-00:04"},
        {"options": ["qos=high"]}, {"size": {"nodes": 0}},
        {"size": {"gpus": 8, "ranks": 4}}, {"doctor": "on"},
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(values):
    with pytest.raises(UserError):
        config.build(SlurmConfig, values)


@pytest.mark.parametrize(
    ("time", "expected"),
    [
        ("90", 5400), ("15:00", 900), ("1:00:05", 3605), ("2-03", 183600), ("1-00:30", 88200),
        ("1-00:00:01", 86401),
    ],
)  # fmt: skip
def test_time_limits_are_read_as_slurm_reads_them(time, expected):
    assert slurm.seconds(time) == expected


@pytest.mark.parametrize("name", ["100%", "a\\b"])
def test_a_run_folder_whose_logs_slurm_would_put_elsewhere_is_refused(name):
    for build in (slurm.train, slurm.concurrent):
        with pytest.raises(UserError, match="give another folder"):
            build(SlurmConfig(), Path("/runs") / name, "python")
    with pytest.raises(UserError, match="give another folder"):
        slurm.evaluate(SlurmConfig(), Path("/runs") / name, "python", ["a=x"])


def test_a_job_is_asked_to_stop_by_its_id(tmp_path):
    assert slurm.job_of(tmp_path) == ""
    (tmp_path / slurm.JOB_LOCK).write_text("12 node now\n")
    slurm.ask_to_stop(tmp_path, slurm.job_of(tmp_path))
    assert (tmp_path / slurm.JOB_STOP).read_text() == "12\n"


def test_the_size_is_no_reason_to_refuse_a_resume():
    assert "slurm" in recipe.RESUME_MAY_CHANGE
    assert SizeConfig(gpus=0, ranks=3).world_size == 3
    assert SizeConfig(gpus=0).world_size == 1


@pytest.mark.parametrize("script", sorted((ROOT / "slurm").glob("*.s*")), ids=lambda p: p.name)
def test_scripts_parse_and_name_every_variable(script):
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    text = script.read_text()
    if script.suffix == ".sbatch":
        assert "#SBATCH --requeue" in text
    used = {"RECIPE", "RUN", "OVERRIDES", "PYTHON", "RETRIES", "CONTAINER", "MOUNTS", "NETWORK"}
    used |= {"CODE", "DOCTOR"}
    if script.name == "train.sbatch":
        head = text.partition("#SBATCH")[0]
        assert all(f"#   {name} " in head for name in used)
    for line in text.splitlines():
        words = line.split("#")[0].split()
        assert not words or words[0] not in ("env", "printenv", "export -p"), "an environment dump"
