"""Ranks and DeepSpeed's launcher, forked: what they import (8 s of a core a rank, 3 s each process
of the launcher) is imported once.

    python launcher_server.py deepspeed.launcher.runner deepspeed.launcher.launch

Reads a request a line from standard input (JSON) and answers each with a line:

    {"start": "job" | "rank", "command": […], "environment": {…}, "folder": …, "log": …}
                                 its process id
    {"poll": process id}         its exit code, or "running"

A ``job`` is the ``deepspeed`` command with these arguments. Its process tree, signals and codes are
those of the command: the runner in a session of its own, below it the launch of this node, below
that the ranks, which know their launcher by the words above. A ``rank`` is a Python program with
its arguments. An environment that libraries read when they are loaded, and that differs from this
server's, gets a rank started as anywhere.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import random
import runpy
import signal
import subprocess
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path

SERVER_ENVIRONMENT = dict(os.environ)  # before libraries add to it

from deepspeed.launcher import launch, runner  # noqa: E402

# Variables that are read once, by whoever is imported or loaded first. (CUDA_VISIBLE_DEVICES, which
# the launcher sets, is read when a GPU is first used: never, on DS_ACCELERATOR=cpu.)
READ_AT_IMPORT = (
    "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "LD_", "PYTHON", "PATH", "DS_ACC", "TORCH",
    "PYTORCH", "TRITON", "HF_", "TRANSFORMERS", "ACCELERATE", "USE_",
)  # fmt: skip
# What ranks import before and while they train.
OF_RANKS = (
    "dsasr.training.trainer", "dsasr.training.preflight", "dsasr.training.first_samples",
    "dsasr.training.initial_weights",
    "dsasr.engine.deepspeed_import", "dsasr.kernels.dispatch", "dsasr.launch.rendezvous",
)  # fmt: skip


class Forked:
    """A forked child, with what the launcher and its runner need of `subprocess.Popen`."""

    def __init__(self, function: Callable[[], None]):
        self.pid = fork(function)
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None and (ended := os.waitpid(self.pid, os.WNOHANG))[0]:
            self.returncode = os.waitstatus_to_exitcode(ended[1])
        return self.returncode

    def wait(self) -> None:
        self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def start_launch(command: list[str], env: dict[str, str]) -> Forked:
    """The runner's one command, ``python -m deepspeed.launcher.launch …``."""
    module = command.index("deepspeed.launcher.launch")
    launch.subprocess = types.SimpleNamespace(Popen=start_rank)
    return Forked(lambda: run(launch.main, command[module + 1 :], env))


def start_rank(command: list[str], env: dict[str, str]) -> Forked | subprocess.Popen:
    """``python -u program …``"""
    if not same_at_import(env):
        return subprocess.Popen(command, env=env)
    program = command.index("-u") + 1
    return Forked(lambda: run_rank(command[program:], env))


def same_at_import(env: dict[str, str]) -> bool:
    names = {n for n in {*env, *SERVER_ENVIRONMENT} if n.startswith(READ_AT_IMPORT)}
    return all(env.get(name) == SERVER_ENVIRONMENT.get(name) for name in names)


def run(main: Callable[[], None], arguments: list[str], env: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(env)
    sys.argv = [main.__module__, *arguments]
    main()


def run_rank(command: list[str], env: dict[str, str]) -> None:
    """A program, in this process, as ``python -u`` would run it in one of its own."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = command
    sys.path[0] = str(Path(command[0]).parent)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(write_through=True)
    # Nothing may hang on generators that happen to be equal in all ranks.
    numpy, torch = sys.modules["numpy"], sys.modules["torch"]
    random.seed()
    numpy.random.seed()
    torch.seed()
    runpy.run_path(command[0], run_name="__main__")


def fork(function: Callable[[], None]) -> int:
    """Process id of a child that runs ``function`` and ends as a program does."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        function()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException as error:
        sys.excepthook(*sys.exc_info())
        if isinstance(error, KeyboardInterrupt):
            code = 130
    finally:
        with contextlib.suppress(BaseException):
            threading._shutdown()  # waits for threads that are no daemons
        with contextlib.suppress(BaseException):
            atexit._run_exitfuncs()
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code & 0xFF)


def enter(job: dict) -> None:
    """Take the job's folder, and its log as the output."""
    os.chdir(job["folder"])
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.close(log)
    os.close(null)


def run_job(job: dict) -> None:
    enter(job)
    if job["start"] == "job":
        os.setsid()
        runner.subprocess = types.SimpleNamespace(Popen=start_launch)
        run(runner.main, job["command"], job["environment"])
    elif same_at_import(job["environment"]):
        run_rank(job["command"], job["environment"])
    else:
        os.execve(sys.executable, [sys.executable, *job["command"]], job["environment"])


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    for name in OF_RANKS:
        importlib.import_module(name)
    sys.modules["dsasr.engine.deepspeed_import"].import_deepspeed()
    gc.collect()
    gc.freeze()  # a collection in a child would copy the pages of all these objects
    children: dict[int, Forked] = {}
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            child = Forked(lambda request=request: run_job(request))
            children[child.pid] = child
            print(child.pid, flush=True)
        else:
            code = children[request["poll"]].poll()
            print("running" if code is None else code, flush=True)


if __name__ == "__main__":
    main()
