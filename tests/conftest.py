"""What all tests share: recordings, commands, and programs started by the deepspeed launcher."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import io
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SERVER = ROOT / "tests" / "programs" / "launcher_server.py"
RECORDINGS = ROOT.parent / "shared" / "data"
FETCHING = ROOT.parent / "shared" / "tools"  # scripts that make folders of published models
FETCH_SECONDS = 240  # that one may take; a minute on a quiet machine
RANK_ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
# As in an activated environment: two versions of ninja in turn rebuild an extension each time.
os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
# Of several processes with threads on all cores, most wait for each other, spinning.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Files that take longest without starting ranks (tests that do are marked): see
# `pytest_collection_modifyitems`.
LONG = ("kernels/test_interpreted.py", "entropy_allocation/test_pai_csai.py",
        "analysis/test_measure_allocation.py", "tools/test_experiments.py", "demo/test_small_lm.py",
        "planning/test_batch_search.py", "kernels/test_compile.py")  # fmt: skip


def pytest_collection_modifyitems(items) -> None:
    """Long files first, where processes share the files (`--no-loadscope-reorder` keeps this
    order): none is left running alone at the end."""
    weights: dict[Path, int] = {}
    for item in items:
        long = item.path.as_posix().endswith(LONG)
        started = any(item.get_closest_marker(name) for name in ("launcher", "slurm", "slow"))
        weights[item.path] = weights.get(item.path, 0) + 3 * long + started
    items.sort(key=lambda item: -weights[item.path])


@pytest.fixture(scope="session")
def recordings() -> Path:
    """Real recordings beside the checkout; tests that need them are skipped without."""
    if not RECORDINGS.is_dir():
        pytest.skip("no real recordings beside this checkout")
    return RECORDINGS


def published_model(name: str, script: str) -> Path:
    """The folder ``name`` of a cache, which a script beside the checkout makes once, under its last
    name only when it is whole; a test that needs it is skipped where that fails."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache = Path(os.environ.get("DSASR_TEST_MODELS") or home / "dsasr-tests")
    if (cache / name).is_dir():
        return cache / name
    if not (FETCHING / script).is_file():
        pytest.skip(f"no {name}: there is no ../shared/tools/{script} beside this checkout")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        # One process of several fetches; the others find what it made.
        with (cache / "lock").open("w") as lock, tempfile.TemporaryDirectory(dir=cache) as made:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (cache / name).is_dir():
                _fetch([sys.executable, FETCHING / script, Path(made) / name], Path(made) / "log")
                # The folder itself last (after whisper-base-lm): it says that all is there.
                for folder in sorted(Path(made).glob(f"{name}*"), reverse=True):
                    folder.rename(cache / folder.name)
    except OSError as error:
        pytest.skip(f"no {name}: {error}")
    return cache / name


def _fetch(command: list, log: Path) -> None:
    """Run a script that fetches; the test is skipped, with the reason, where it fails."""
    # What a killed script leaves goes with the log's folder.
    settings = {**os.environ, "PIP_RETRIES": "1", "TMPDIR": str(log.parent)}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=settings, start_new_session=True
        )
        try:
            code = process.wait(FETCH_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            pytest.skip(f"{command[1].name} took more than {FETCH_SECONDS} s")
    if code:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines or [f"code {code}"]
        pytest.skip(f"{command[1].name} failed: {errors[-1]}")


@pytest.fixture(scope="session")
def whisper_base() -> Path:
    """The folder of OpenAI's Whisper base, whole; its decoder as a language model is beside it, in
    whisper-base-lm."""
    return published_model("whisper-base", "whisper_base.py")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct."""
    return published_model("smollm2", "smollm2.py")


@pytest.fixture(scope="session")
def command():
    """``command("data", "verify", …)``: a `dsasr` command in this process, which has torch already;
    returns its exit code and what it printed."""
    from dsasr.cli.main import main

    def run(*words) -> subprocess.CompletedProcess:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = main([str(word) for word in words])
            except SystemExit as end:  # argparse
                code = end.code
        return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())

    return run


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def forget(port: int) -> None:
    """Remove the shared buffers (66 MiB a rank) of ranks that were killed."""
    for left in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
        left.unlink(missing_ok=True)


class LauncherServer:
    """tests/programs/launcher_server.py, started with the first job or rank."""

    def __init__(self) -> None:
        self.process: subprocess.Popen | None = None
        self.one = threading.Lock()  # question and answer at a time

    def ask(self, **request) -> str:
        """Its answer to a request."""
        with self.one:
            if self.process is None:
                self._start()
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            return self._line(60)

    def _start(self) -> None:
        # Unbuffered: `select` must see each line that is still to be read.
        self.process = subprocess.Popen(
            [sys.executable, SERVER, "deepspeed.launcher.runner", "deepspeed.launcher.launch"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, cwd=ROOT,
            env={**os.environ, **RANK_ENVIRONMENT},
        )  # fmt: skip
        while self._line(300) != "ready":
            pass

    def _line(self, seconds: float) -> str:
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        line = self.process.stdout.readline() if ready else b""
        assert line, "the launcher's server does not answer"
        return line.decode().strip()

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()


class Served:
    """A process of the launcher's server, with what tests need of `subprocess.Popen`."""

    def __init__(self, server: LauncherServer, kind: str, command: list, log: Path, env: dict,
                 folder: Path = ROOT):  # fmt: skip
        self.server, self.returncode = server, None
        self.pid = int(server.ask(start=kind, command=[str(word) for word in command],
                                  environment=env, folder=str(folder), log=str(log)))  # fmt: skip

    def poll(self) -> int | None:
        if self.returncode is None:
            answer = self.server.ask(poll=self.pid)
            self.returncode = None if answer == "running" else int(answer)
        return self.returncode

    def wait(self, timeout: float = 300) -> int:
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(0.02)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


@pytest.fixture(scope="session")
def launcher_server():
    server = LauncherServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def launch(launcher_server, tmp_path_factory):
    """``launch(program, *arguments, ranks=2)``: run it under the deepspeed launcher on the CPU.

    Returns the finished process with its output; a launcher that hangs is killed with its ranks.
    """
    folder = tmp_path_factory.mktemp("launched")

    def run(program, *arguments, ranks=2, timeout=300, env=None):
        port = free_port()
        command = [
            *("--num_gpus", str(ranks), "--master_port", str(port)),
            *(str(program), *map(str, arguments)),
        ]
        settings = {**os.environ, **RANK_ENVIRONMENT, **(env or {})}
        log = folder / f"{port}-{time.monotonic_ns()}.log"
        job = Served(launcher_server, "job", command, log, settings)
        with contextlib.suppress(subprocess.TimeoutExpired):
            job.wait(timeout)
        output = log.read_text(encoding="utf-8", errors="replace")
        forget(port)
        if job.returncode is None:
            os.killpg(job.pid, signal.SIGKILL)
            pytest.fail(f"{program} hung:\n{output[-3000:]}")
        return subprocess.CompletedProcess(command, job.returncode, output)

    return run


@pytest.fixture(scope="session")
def alone(launcher_server, tmp_path_factory):
    """``alone(program, *arguments)``: run it as one rank without a launcher, as `launch` does."""
    folder = tmp_path_factory.mktemp("alone")

    def run(program, *arguments, timeout=300, env=None, cwd=ROOT):
        settings = {**os.environ, **RANK_ENVIRONMENT, **(env or {})}
        log = folder / f"{time.monotonic_ns()}.log"
        rank = Served(launcher_server, "rank", [program, *arguments], log, settings, cwd)
        try:
            rank.wait(timeout)
        except subprocess.TimeoutExpired:
            rank.kill()
            pytest.fail(f"{program} hung:\n{log.read_text(errors='replace')[-3000:]}")
        output = log.read_text(encoding="utf-8", errors="replace")
        return subprocess.CompletedProcess([program, *arguments], rank.returncode, output)

    return run


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A recipe that trains in seconds (tests/programs/tiny.py), with its corpus beside it."""
    place = ROOT / "tests" / "programs" / "tiny.py"
    spec = importlib.util.spec_from_file_location("tiny", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.make(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def logged_run(tmp_path):
    """``logged_run("run", branch="both", …)``: a run folder with recipe and logs, made by hand.

    ``steps`` of the 40 of its first stage are done, one line for each 10; ``ends``: the event at
    the end, if any; further ``events`` come before it.
    """

    def make(name="run", branch="both", steps=30, ends="", events=()) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        stages = [("ctc", "pretrain", 40), ("align", "sft", 10)]
        own = [s for s in stages if branch in ("both", s[1])]
        table = [dict(zip(("name", "branch", "steps"), s, strict=True)) for s in stages]
        (folder / "recipe.yaml").write_text(json.dumps({"branch": branch, "stages": table}))
        first, of, total = own[0]
        metrics = [
            {"steps": n, "branch": of, "stage": first, "step": n, "seconds": 6.0 * n,
             "ctc" if of == "pretrain" else "nll": 8.0 / n, "audio_hours_per_hour": 20.0,
             "step_seconds": 6.0, "wait_share": 0.25, "lr_encoder": 1e-3}
            for n in range(10, min(steps, total) + 1, 10)
        ]  # fmt: skip
        rows = [{"event": "stage", "seconds": 1.0, "name": first, "branch": of, "steps": 0,
                 "switch_seconds": 0.5}, *events]  # fmt: skip
        if ends:
            rows.append({"event": ends, "seconds": 6.0 * steps, "steps": steps, "cause": "SIGTERM"})
        for path, values in (("metrics.jsonl", metrics), ("events.jsonl", rows)):
            (folder / path).write_text("".join(json.dumps(row) + "\n" for row in values))
        return folder

    return make


@pytest.fixture(scope="session")
def whisper(tmp_path_factory) -> Path:
    """The folder of a tiny random Whisper, decoder included."""
    import torch
    from transformers import WhisperConfig, WhisperModel

    folder = tmp_path_factory.mktemp("whisper")
    shape = {"d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2,
             "encoder_ffn_dim": 32}  # fmt: skip
    small = {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 8}
    tokens = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
              "decoder_start_token_id": 1}  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        WhisperModel(WhisperConfig(**shape, **small, **tokens)).save_pretrained(folder)
    return folder


class Job:
    """Ranks of train.py, or of a program around it, started as the launcher would start them, each
    to be killed by itself."""

    def __init__(self, server: LauncherServer, arguments, world: int, log: Path, program: Path):
        self.log, self.port = log, free_port()
        shared = {
            **os.environ,
            **RANK_ENVIRONMENT,
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.port),
        }
        log.touch()
        self.ranks = [
            Served(server, "rank", [program, *arguments], log,
                   {**shared, "RANK": str(r), "LOCAL_RANK": str(r)}, log.parent)
            for r in range(world)
        ]  # fmt: skip

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def until(self, text: str, timeout: float = 240) -> None:
        """Wait until the job's output holds ``text``."""
        end = time.monotonic() + timeout
        while text not in self.output:
            if time.monotonic() > end or all(r.poll() is not None for r in self.ranks):
                self.kill()
                pytest.fail(f"'{text}' never came:\n{self.output[-3000:]}")
            time.sleep(0.02)

    def kill(self) -> None:
        """kill -9 of all ranks that still run."""
        for rank in self.ranks:
            if rank.poll() is None:
                rank.kill()
            rank.wait()
        forget(self.port)

    def wait(self, timeout: float = 240) -> list[int]:
        """The exit codes, in rank order; a job that hangs fails the test."""
        end = time.monotonic() + timeout
        try:
            return [r.wait(max(end - time.monotonic(), 0.1)) for r in self.ranks]
        except subprocess.TimeoutExpired:
            pytest.fail(f"the job hung:\n{self.output[-3000:]}")
        finally:
            self.kill()


@pytest.fixture
def start(launcher_server, tiny, tmp_path):
    """``start(*overrides, world=2)``: a `Job` on the tiny recipe, killed at the test's end."""
    jobs = []

    def begin(*overrides, world: int = 2, program: Path = ROOT / "dsasr" / "train.py") -> Job:
        log = tmp_path / f"job-{len(jobs)}.log"
        jobs.append(Job(launcher_server, ["--recipe", tiny, *overrides], world, log, program))
        return jobs[-1]

    yield begin
    for job in jobs:
        job.kill()


@pytest.fixture(scope="session")
def small_whisper(tmp_path_factory) -> Path:
    """The folder of a Whisper with random weights: two encoder layers, 80 mel bins, 30 s."""
    import torch
    from transformers import WhisperConfig, WhisperModel

    torch.manual_seed(1)
    config = WhisperConfig(
        d_model=32, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=48,
        decoder_layers=1, decoder_attention_heads=4, decoder_ffn_dim=8, vocab_size=50,
        num_mel_bins=80, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("whisper")
    WhisperModel(config).save_pretrained(folder)
    return folder
