"""Ranks started by DeepSpeed's launcher; their output without its and the libraries' chatter.

Signals go to the ranks themselves, which save and stop; DeepSpeed's launcher would end them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, MutableMapping, Sequence
from functools import partial
from pathlib import Path
from typing import TextIO

from dsasr.launch.hostfile import check_reachable, is_local, read_hosts
from dsasr.launch.killed_ranks import KilledRanks
from dsasr.launch.orphan_ranks import parent_of
from dsasr.utils.errors import UserError

LAUNCHER = (sys.executable, "-m", "deepspeed.launcher.runner")
MISTAKE = 2  # exit code of a `UserError`
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
CHATTER = re.compile(
    r"^\[\d{4}-\d\d-\d\d|^\[W\d|^W\d{4} |Warning: |^\s+return func|^\s+warnings\.warn"
    r"|^DeepSpeed deepspeed\.ops|^ninja:|^Loading extension|^Building extension|^Using .* as Py"
    r"|^Creating extension|^Detected |^Emitting ninja|^Allowing ninja|^Time to load"
    r"|^\[\d+/\d+\] (c\+\+|nvcc)|Loading weights:"
)
PR_SET_PDEATHSIG = 1  # of prctl(2)
_PRCTL = ctypes.CDLL(None).prctl if sys.platform == "linux" else None  # found before any fork


def run(
    program: Path,
    arguments: Sequence[str],
    *,
    ranks: int = 0,
    hostfile: Path | None = None,
    explained: Collection[int] = (),
) -> int:
    """Run ``program`` on ``ranks`` ranks and return the launcher's exit code.

    ``ranks``: of a node; 0: one a GPU, or one where there is none. ``hostfile``: DeepSpeed's, for
    several nodes; where it names this one alone, its slots are ``ranks``. ``explained``: exit codes
    of the program after which the ranks' own output says enough.

    If the ranks fail, the last lines of the hidden output are shown after all. They are not where
    the cause is known: a user's mistake, a signal that this process passed on, or a killed rank,
    which is named in a line.

    Raises `UserError` for more ranks than GPUs, and for a hostfile that is missing, has a line that
    is not HOST slots=N, or names a host that ssh does not reach.
    """
    if hostfile is not None:
        hosts = read_hosts(hostfile)
        if is_local(hosts):  # DeepSpeed would need ssh to this machine
            slots, count = sum(hosts.values()), gpus()
            if not ranks and 0 < count < slots:
                raise UserError(f"{hostfile}: this machine has {count} GPUs: give slots={count}")
            hostfile, ranks = None, ranks or slots
        else:
            check_reachable(hosts)
    # Ranks on a CPU build DeepSpeed's extension, with this environment's ninja, activated or not:
    # two versions of ninja in turn build it anew each time.
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"}
    command = [*LAUNCHER, *placement(env, ranks, hostfile), str(program), *arguments]
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        encoding="utf-8", errors="replace", start_new_session=True,
        preexec_fn=partial(_end_with_parent, os.getpid()),
    )  # fmt: skip
    watch = KilledRanks(lambda: _grandchildren(process.pid))
    with _signals_forwarded(process, local=hostfile is None) as received, watch:
        try:
            hidden = pass_on(process.stdout, sys.stdout)
            code = process.wait()
        except BaseException:  # nobody reads the output any more
            process.stdout.close()
            os.killpg(process.pid, signal.SIGTERM)
            raise
    code = code if code >= 0 else 128 - code  # as a shell counts a process that a signal ended
    if code == 0 and signal.SIGINT in received:
        code = 128 + signal.SIGINT  # saved and stopped, and a shell's script stops too
    if killed := watch.lines():
        print(*killed, sep="\n", flush=True)
    elif code not in (0, MISTAKE, *explained) and not received:
        print("the launcher's last lines:", *hidden, sep="\n")
        print(f"the ranks ended with exit code {code}", flush=True)
    return code


def gpus() -> int:
    """GPUs of this machine that are to be used."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return 0
    import torch

    return torch.cuda.device_count()


def placement(
    env: MutableMapping[str, str], ranks: int = 0, hostfile: Path | None = None
) -> list[str]:
    """The launcher's options; in ``env`` the CPU is chosen where there is no GPU."""
    if ranks < 0:
        raise UserError(f"--ranks {ranks}: a number of ranks, or 0 for one a GPU")
    if hostfile is not None:
        return ["--hostfile", str(hostfile), *(["--num_gpus", str(ranks)] if ranks else [])]
    count = gpus()
    if count == 0:
        env["DS_ACCELERATOR"] = "cpu"
    elif ranks > count:
        raise UserError(f"--ranks {ranks}: this machine has {count} GPUs")
    ranks = ranks or count or 1
    port = ["--master_port", str(_free_port())]
    visible = _visible(env) if count else []
    if visible:  # --num_gpus would count from GPU 0
        return [*port, "--include", f"localhost:{','.join(visible[:ranks])}"]
    return [*port, "--num_gpus", str(ranks)]


def _visible(env: Mapping[str, str]) -> list[str]:
    return [n for n in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if n]


def _free_port() -> int:
    """Another training on this machine may have the launcher's usual port."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def pass_on(lines: Iterable[str], out: TextIO) -> list[str]:
    """Write ``lines`` without chatter to ``out``; returns the last lines of the chatter."""
    hidden: deque[str] = deque(maxlen=40)
    for line in lines:
        if CHATTER.search(line):
            hidden.append(line.rstrip("\n"))
        else:
            print(line, end="", file=out, flush=True)
    return list(hidden)


@contextlib.contextmanager
def _signals_forwarded(process: subprocess.Popen, local: bool) -> Iterator[list[int]]:
    """While this is open, signals of this process are passed on; yields those received."""
    received: list[int] = []

    def forward(number: int, _frame: object) -> None:
        received.append(number)
        ranks = _grandchildren(process.pid) if local else []
        with contextlib.suppress(ProcessLookupError):
            if not local:  # the launcher stops the ranks on all nodes, on these two signals only
                process.send_signal(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)
            elif not ranks:
                os.killpg(process.pid, number)
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank, number)

    before = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _grandchildren(process: int) -> list[int]:
    """The ranks: children of the launcher's one child, which starts them on this node."""
    pids = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    return [pid for pid in pids if parent_of(parent_of(pid)) == process]


def _end_with_parent(parent: int) -> None:
    """In the launcher's process: end when ``dsasr train``, process ``parent``, is killed with
    ``kill -9``; the ranks then save and end by themselves (`orphan_ranks`)."""
    if _PRCTL is not None:
        _PRCTL(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it was killed before this line
            os._exit(128 + signal.SIGTERM)
