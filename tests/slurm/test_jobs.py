"""Real jobs on a real Slurm: two nodes, signals, kills, requeues, the pair, an array."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest

from dsasr.checkpoint import tensor_fragments

ROOT = Path(__file__).parent.parent.parent
SIZE = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0", "--time=20")
CLOCK = re.compile(r"seconds|_per_|_share|queue|memory")  # metrics that depend on the clock


def lines(folder: Path, name: str) -> list[dict]:
    path = folder / f"{name}.jsonl"
    return [json.loads(x) for x in path.read_text().splitlines()] if path.is_file() else []


def events(folder: Path, kind: str) -> list[dict]:
    return [e for e in lines(folder, "events") if e["event"] == kind]


def trace(folder: Path) -> list[dict]:
    """The metrics without times and memory, NaN made comparable."""
    return [
        {k: repr(v) for k, v in line.items() if not CLOCK.search(k)}
        for line in lines(folder, "metrics")
    ]


def last(folder: Path) -> dict:
    return tensor_fragments.verify(sorted((folder / "checkpoints").glob("step-*"))[-1])


def told(run: Path) -> str:
    """All logs of a run, for a failed test's message."""
    return "\n".join(f"== {p.name}\n{p.read_text()[-1500:]}" for p in sorted(run.glob("logs/*")))


class Jobs:
    def __init__(self, cluster, tiny: Path, folder: Path):
        self.cluster, self.tiny, self.folder = cluster, tiny, folder
        self.holding = folder / "holding-python"
        hold = Path(__file__).parent / "hold.py"
        self.holding.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{hold}" "$@"\n')
        self.holding.chmod(0o755)

    def submit(self, name: str, *arguments: str, script="train", overrides="", **env) -> tuple:
        """(job id, run folder)"""
        run = self.folder / name
        (run / "logs").mkdir(parents=True, exist_ok=True)
        job = self.cluster.sbatch(
            f"--output={run}/logs/batch.log", *(arguments or SIZE), f"slurm/{script}.sbatch",
            RECIPE=str(self.tiny), RUN=str(run), OVERRIDES=overrides, MASTER_ADDR="127.0.0.1",
            **{k: str(v) for k, v in env.items()},
        )  # fmt: skip
        return job, run

    def held(self, job: str, run: Path, start: int, world: int = 1, whole: str = "") -> list[dict]:
        """The ranks that wait in that start (hold.py), once checkpoint ``whole`` is there too."""
        paths = [run / f"held-{start}-{rank}.json" for rank in range(world)]
        awaited = [*paths, *([run / "checkpoints" / whole] if whole else [])]
        self.cluster.wait(job, until=lambda: all(p.exists() for p in awaited))
        assert all(p.exists() for p in awaited), told(run)
        return [json.loads(p.read_text()) for p in paths]

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


def test_two_nodes_train_to_the_end(whole):
    assert events(whole, "finished") and last(whole)["progress"]["sft"] == 22
    manifest = last(whole)
    assert sorted(manifest["files"]) == ["rank-00000.safetensors", "rank-00001.safetensors"]
    logs = {p.name.split("-", 1)[1] for p in (whole / "logs").glob("*-node*")}
    assert logs == {"train-node0.log", "train-node1.log"}
    assert (whole / "code/dsasr/train.py").is_file() and (whole / "recipe.yaml").is_file()
    assert not list((whole / "code").rglob("__pycache__"))
    assert "finished after 0 requeues" in told(whole)
    assert not (whole / "requeues.jsonl").exists()


def test_machines_that_fall_short_end_the_job_before_it_trains(jobs):
    job, run = jobs.submit("run", overrides="checkpoint.keep=1000000000", DOCTOR="stop")
    assert jobs.cluster.wait(job) == "FAILED", told(run)
    table = (run / "logs" / f"{job}.0-train-doctor.txt").read_text()
    assert "2 on n1, n2" in table and "all-reduce" in table and "short: free space" in table
    assert "error: the machines fall short" in told(run) and "short: free space" in told(run)
    assert not (run / "metrics.jsonl").exists() and not (run / "job.lock").exists()
    assert not (run / "requeues.jsonl").exists()


@pytest.mark.slow
def test_a_signal_a_killed_rank_and_a_dead_node_leave_no_trace_in_the_training(jobs, whole):
    job, run = jobs.submit("run", PYTHON=jobs.holding, HOLD="5 16 30")
    jobs.held(job, run, 0, 2)
    jobs.cluster.run("scancel", "--signal=USR1", job)  # what --signal=USR1@300 sends

    ranks = jobs.held(job, run, 1, 2, whole="step-0000000014")
    first = lines(run, "requeues")[0]
    assert (first["start"], first["cause"]) == (0, "signal"), first
    assert first["checkpoint"] == "step-0000000005"
    assert events(run, "stopped")[0]["steps"] == 5
    os.kill(ranks[1]["pid"], signal.SIGKILL)

    ranks = jobs.held(job, run, 2, 2, whole="step-0000000028")
    second = lines(run, "requeues")[1]
    assert second["start"] == 1, second
    node = ranks[1]["node"]
    killed = f"train ended with 137: {second['node']}, task 1: Killed"
    assert second["node"] and second["cause"].startswith(killed), second
    jobs.cluster.kill_node(node, ranks[1]["pid"])
    jobs.cluster.mark(node, "down")  # as Slurm does by itself after SlurmdTimeout
    jobs.cluster.wait(job, until=lambda: jobs.cluster.show(job, "Restarts") == "3")
    jobs.cluster.node(node)
    jobs.cluster.mark(node, "resume")

    jobs.finish(job, run)
    assert [e["steps"] for e in events(run, "resumed")] == [5, 14, 28]
    assert trace(run) == trace(whole)
    assert last(run)["files"] == last(whole)["files"]
    third = lines(run, "requeues")[2]
    assert node in third["cause"] and third["node"] == node, third
    assert len(lines(run, "requeues")) == 3 and "finished after 3 requeues" in told(run)


def test_a_mistake_is_told_and_not_requeued(jobs):
    job, run = jobs.submit("run", overrides="stages.pretrain.rate=3")
    assert jobs.cluster.wait(job) == "FAILED"
    assert "not requeued: error: " in told(run) and not (run / "requeues.jsonl").exists()


def test_failures_without_progress_end_the_job(jobs):
    # One task: of two, the one that srun ends (143) may be the one it tells of.
    job, run = jobs.submit("run", "--nodes=1", *SIZE[1:], PYTHON="false", RETRIES="2")
    assert jobs.cluster.wait(job) == "FAILED"
    assert "2 failures in a row without a new checkpoint" in told(run)
    causes = [r["cause"] for r in lines(run, "requeues")]
    assert len(causes) == 2
    for cause in causes:
        assert re.fullmatch(r"train ended with 1: n\d, task 0: Exited with exit code 1", cause)


def test_an_end_without_training_is_a_failure_whatever_its_exit_code(jobs):
    job, run = jobs.submit("run", "--nodes=1", *SIZE[1:], PYTHON="true", RETRIES="2")
    assert jobs.cluster.wait(job) == "FAILED"
    causes = [r["cause"] for r in lines(run, "requeues")]
    assert causes == ["train ended with 0 before it was finished"] * 2


def test_a_cancelled_job_saves_and_ends(jobs):
    job, run = jobs.submit("run", PYTHON=jobs.holding, HOLD="5")
    jobs.held(job, run, 0, 2)
    jobs.cluster.run("scancel", job)
    assert jobs.cluster.wait(job) == "CANCELLED"
    jobs.cluster.until_gone(job)
    assert events(run, "stopped")[0]["steps"] == 5 and last(run)["steps"] == 5, told(run)
    assert "cancelled: not requeued" in told(run) and not (run / "requeues.jsonl").exists()
    assert jobs.cluster.show(job, "Restarts") == "0" and not (run / "job.lock").exists()


def test_a_run_is_one_jobs_alone_until_it_is_stopped(jobs, command):
    job, run = jobs.submit("run", "--nodes=1", *SIZE[1:], PYTHON=jobs.holding, HOLD="5")
    jobs.held(job, run, 0)
    marked = run / "code" / "mark"
    marked.touch()
    second, _ = jobs.submit("run", "--nodes=1", *SIZE[1:])
    assert jobs.cluster.wait(second) == "FAILED"
    assert f"error: {run} belongs to job {job} (RUNNING): wait for its end" in told(run)
    assert marked.exists() and not events(run, "stopped")
    done = command("stop", run)
    assert done.returncode == 0 and f"Slurm job {job}, process" in done.stdout, done.stderr
    jobs.finish(job, run)
    assert events(run, "stopped")[0]["cause"] == "dsasr stop" and last(run)["steps"] == 5
    assert "stopped by dsasr stop: not requeued" in told(run)
    assert not (run / "requeues.jsonl").exists()
    assert not [p.name for p in run.iterdir() if "lock" in p.name or "stop" in p.name]


@pytest.mark.slow
def test_a_node_that_failed_twice_is_excluded(jobs):
    job, run = jobs.submit("run", "--nodes=1", *SIZE[1:], PYTHON=jobs.holding, HOLD="5 16")
    nodes = []
    for start in (0, 1):
        rank = jobs.held(job, run, start)[0]
        nodes.append(rank["node"])
        os.kill(rank["pid"], signal.SIGKILL)
    jobs.finish(job, run)
    assert nodes[0] == nodes[1] == jobs.cluster.show(job, "ExcNodeList"), nodes
    assert f"excluded: {nodes[0]}, which failed twice" in told(run)
    assert jobs.cluster.show(job, "NodeList") != nodes[0]


@pytest.mark.slow
def test_the_asynchronous_pair(jobs):
    part = ("--nodes=1", *SIZE[1:])
    job, run = jobs.submit("run", *part, ":", *part, script="async", PYTHON=jobs.holding, HOLD="16")
    # The sft branch cannot come that far before the pretrain branch has ended.
    rank = jobs.held(job, run / "pretrain", 0, whole="step-0000000014")[0]
    os.kill(rank["pid"], signal.SIGKILL)
    jobs.finish(job, run)
    assert lines(run, "requeues")[0]["cause"].startswith("pretrain ended with 137: n")
    for branch in ("pretrain", "sft"):
        assert events(run / branch, "finished"), told(run)
    swap = events(run / "sft", "swap")[-1]
    assert (swap["cause"], swap["pretrain"]) == ("final", 20)
    manifest = tensor_fragments.verify(run / "snapshots" / swap["snapshot"])
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
