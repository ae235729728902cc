"""Real jobs on a real Slurm: two nodes, signals, kills, requeues, the pair, an array."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest

from dsasr import fragments

ROOT = Path(__file__).parent.parent.parent
SIZE = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0", "--time=20")
CLOCK = re.compile(r"seconds|_per_|_share|queue")  # metrics that depend on the clock


def lines(folder: Path, name: str) -> list[dict]:
    path = folder / f"{name}.jsonl"
    return [json.loads(x) for x in path.read_text().splitlines()] if path.is_file() else []


def events(folder: Path, kind: str) -> list[dict]:
    return [e for e in lines(folder, "events") if e["event"] == kind]


def trace(folder: Path) -> list[dict]:
    """The metrics without what a clock said, NaN made comparable."""
    return [
        {k: repr(v) for k, v in line.items() if not CLOCK.search(k)}
        for line in lines(folder, "metrics")
    ]


def last(folder: Path) -> dict:
    return fragments.verify(sorted((folder / "checkpoints").glob("step-*"))[-1])


def told(run: Path) -> str:
    """All logs of a run, for a failed test's message."""
    return "\n".join(f"== {p.name}\n{p.read_text()[-1500:]}" for p in sorted(run.glob("logs/*")))


class Jobs:
    def __init__(self, cluster, tiny: Path, folder: Path):
        self.cluster, self.tiny, self.folder = cluster, tiny, folder

    def submit(self, name: str, *arguments: str, script="train", overrides="", **env) -> tuple:
        """(job id, run folder)"""
        run = self.folder / name
        (run / "logs").mkdir(parents=True)
        job = self.cluster.sbatch(
            f"--output={run}/logs/batch.log", *(arguments or SIZE), f"slurm/{script}.sbatch",
            RECIPE=str(self.tiny), RUN=str(run), OVERRIDES=overrides, MASTER_ADDR="127.0.0.1",
            **env,
        )  # fmt: skip
        return job, run

    def until(self, job: str, run: Path, text: str, seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while text not in told(run):
            state = self.cluster.show(job, "JobState")
            if time.monotonic() > end or state in ("FAILED", "COMPLETED", "CANCELLED"):
                pytest.fail(f"'{text}' never came, job {job} is {state}\n{told(run)}")
            time.sleep(0.1)

    def finish(self, job: str, run: Path) -> None:
        state = self.cluster.wait(job)
        assert state == "COMPLETED", f"{state}\n{told(run)}"


@pytest.fixture
def jobs(cluster, tiny, tmp_path):
    return Jobs(cluster, tiny, tmp_path)


@pytest.fixture(scope="module")
def whole(cluster, tiny, tmp_path_factory) -> Path:
    """An uninterrupted ZeRO-3 run of two nodes."""
    jobs = Jobs(cluster, tiny, tmp_path_factory.mktemp("whole"))
    job, run = jobs.submit("run")
    jobs.finish(job, run)
    return run


def rank_pid(run: Path, rank: int) -> int:
    """The process of that rank of train.py, found by its environment."""
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes().split(b"\0")
            given = (entry / "environ").read_bytes().split(b"\0")
        except (OSError, ValueError):
            continue
        ours = f"run={run}".encode() in command and any(b"train.py" in c for c in command[:2])
        if ours and f"RANK={rank}".encode() in given:
            return int(entry.name)
    pytest.fail(f"rank {rank} of {run} does not run")


def test_two_nodes_train_to_the_end(whole):
    assert events(whole, "finished") and last(whole)["progress"]["sft"] == 22
    manifest = last(whole)
    assert sorted(manifest["files"]) == ["rank-00000.safetensors", "rank-00001.safetensors"]
    logs = {p.name.split("-", 1)[1] for p in (whole / "logs").glob("*node*")}
    assert logs == {"train-node0.log", "train-node1.log"}
    assert (whole / "code/dsasr/train.py").is_file() and (whole / "recipe.yaml").is_file()
    assert not list((whole / "code").rglob("__pycache__"))
    assert "finished after 0 requeues" in told(whole)
    assert not (whole / "requeues.jsonl").exists()


def test_a_signal_requeues_and_the_losses_are_those_of_an_uninterrupted_run(jobs, whole):
    job, run = jobs.submit("run", overrides="checkpoint.every_steps=0")
    jobs.until(job, run, "] ia_sft 3")
    jobs.cluster.run("scancel", "--signal=USR1", job)  # what --signal=USR1@300 sends
    jobs.finish(job, run)
    requeued = lines(run, "requeues")
    assert [(r["start"], r["cause"]) for r in requeued] == [(0, "signal")]
    stopped = events(run, "stopped")[0]["steps"]
    assert requeued[0]["checkpoint"] == f"step-{stopped:010d}" and stopped < 42
    assert events(run, "resumed")[0]["steps"] == stopped
    assert trace(run) == trace(whole)
    assert last(run)["files"] == last(whole)["files"]
    assert "finished after 1 requeues" in told(run)


def test_a_killed_rank_requeues_and_nothing_hangs(jobs, whole):
    job, run = jobs.submit("run")
    jobs.until(job, run, "checkpoint: name=step-0000000014")
    os.kill(rank_pid(run, 1), signal.SIGKILL)
    killed = time.monotonic()
    while not lines(run, "requeues"):
        assert time.monotonic() - killed < 60, told(run)
        time.sleep(0.2)
    jobs.finish(job, run)
    assert lines(run, "requeues")[0]["cause"] == "train ended with 137"
    assert events(run, "resumed")
    assert trace(run) == trace(whole)
    assert last(run)["files"] == last(whole)["files"]


def test_a_dead_node_requeues(jobs, whole):
    job, run = jobs.submit("run")
    jobs.until(job, run, "checkpoint: name=step-0000000014")
    pid = rank_pid(run, 1)
    given = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    node = next(x for x in given if x.startswith(b"SLURMD_NODENAME=")).decode().partition("=")[2]
    jobs.cluster.kill_node(node, pid)
    killed = time.monotonic()
    while jobs.cluster.show(job, "Restarts") != "1":
        assert time.monotonic() - killed < 90, told(run)
        time.sleep(0.2)
    jobs.cluster.node(node)
    jobs.finish(job, run)
    assert events(run, "resumed")
    assert trace(run) == trace(whole)


def test_a_mistake_is_told_and_not_requeued(jobs):
    job, run = jobs.submit("run", overrides="stages.pretrain.rate=3")
    assert jobs.cluster.wait(job) == "FAILED"
    assert "not requeued: error: " in told(run) and not (run / "requeues.jsonl").exists()


def test_failures_without_progress_end_the_job(jobs):
    job, run = jobs.submit("run", PYTHON="false", RETRIES="2")
    assert jobs.cluster.wait(job) == "FAILED"
    assert "2 failures in a row without a new checkpoint" in told(run)
    assert [r["cause"] for r in lines(run, "requeues")] == ["train ended with 1"] * 2


def test_the_asynchronous_pair(jobs):
    part = ("--nodes=1", *SIZE[1:])
    job, run = jobs.submit("run", *part, ":", *part, script="async")
    jobs.until(job, run, "checkpoint: name=step-0000000014")
    os.kill(rank_pid(run, 0), signal.SIGKILL)
    jobs.finish(job, run)
    assert "ended with 137" in lines(run, "requeues")[0]["cause"]
    for branch in ("pretrain", "sft"):
        assert events(run / branch, "finished"), told(run)
    swap = events(run / "sft", "swap")[-1]
    assert (swap["cause"], swap["pretrain"]) == ("final", 20)
    manifest = fragments.verify(run / "snapshots" / swap["snapshot"])
    assert manifest["checksum"] == swap["checksum"]


def test_an_evaluation_array(cluster, tiny, whole):
    data = tiny.parent / "valid"
    job = cluster.sbatch(
        "--array=0-1", "--time=20", "--gpus-per-node=0", "--cpus-per-task=1",
        f"--output={whole}/logs/eval-%a", "slurm/eval.sbatch",
        RUN=str(whole), DATA=f"one={data} two={data}",
    )  # fmt: skip
    for task in (0, 1):
        assert cluster.wait(f"{job}_{task}") == "COMPLETED", told(whole)
    rows = {n: lines(whole / "evaluation", n) for n in ("one", "two")}
    assert len(rows["one"]) == 8 and rows["one"] == rows["two"]
    assert "8 clips: WER" in (whole / "evaluation" / "one.txt").read_text()
