"""DeepSpeed's launcher, forked: the imports of its two processes (3 s of a core each) come once.

    python launcher_server.py deepspeed.launcher.runner deepspeed.launcher.launch

Reads a job a line from standard input (JSON: arguments, environment, folder, log), runs it and
prints its process id, then its exit code. Process tree, signals and code are those of the
``deepspeed`` command: the runner in a session of its own, below it the launch of this node, below
that the ranks, which start as anywhere. Ranks know their launcher by the words above.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import types
from collections.abc import Callable

from deepspeed.launcher import launch, runner


class ForkedLaunch:
    """What the runner needs of `subprocess.Popen` for its one command, ``python -m …launch …``."""

    def __init__(self, command: list[str], env: dict[str, str]):
        module = command.index("deepspeed.launcher.launch")
        self.pid = fork(lambda: run(launch.main, command[module + 1 :], env))
        self.returncode = 0

    def wait(self) -> None:
        self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def run(main: Callable[[], None], arguments: list[str], env: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(env)
    sys.argv = [main.__module__, *arguments]
    main()


def fork(function: Callable[[], None]) -> int:
    """Process id of a child that runs ``function`` and ends as a program does."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        function()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code & 0xFF)


def run_job(job: dict) -> None:
    os.setsid()
    os.chdir(job["folder"])
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    runner.subprocess = types.SimpleNamespace(Popen=ForkedLaunch)
    run(runner.main, job["arguments"], job["environment"])


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        pid = fork(lambda job=job: run_job(job))
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
