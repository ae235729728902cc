"""DeepSpeed's list of machines, checked before its launcher reads it: lines, and ssh to each host.

DeepSpeed itself ends in a traceback at a line that it cannot read and at a first host that ssh does
not reach; at another such host pdsh fails, after the ranks of the others have been started.
"""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dsasr.utils.errors import UserError
from dsasr.utils.masking import mask

# As DeepSpeed's; what follows is ignored. A host is a word of ssh's and of pdsh's command lines.
_LINE = re.compile(r"([^\s#,-][^\s,]*)\s+slots=(\d+)(\s.*)?")
_LOCAL = {"localhost", "127.0.0.1", "::1"}
CONNECT_SECONDS = 10  # in which a host must answer
ALL_SECONDS = 60  # in which ssh must have ended, with a login script that is slow
AT_ONCE = 32  # hosts that are tried at the same time
SSH = ("ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}")


def read_hosts(path: Path) -> dict[str, int]:
    """Host → slots (ranks), in the file's order: a line ``HOST slots=N`` each, ``#`` a comment.

    Raises `UserError` for a file that is missing, has another line, or a host twice.
    """
    if not path.is_file():  # DeepSpeed would take this machine alone
        raise UserError(f"there is no hostfile {path}")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--hostfile {path} cannot be read as text: {error}") from None
    hosts: dict[str, int] = {}
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        found = _LINE.fullmatch(line)
        if found is None or not int(found[2]):
            raise UserError(
                f"{path}, line {number}: {line!r} is not HOST slots=N, with the number of the "
                f"host's GPUs (ranks): write it as {line.split()[0]} slots=8"
            )
        if found[1] in hosts:
            raise UserError(
                f"{path}, line {number}: {found[1]} is named twice: give one line with all its "
                "slots"
            )
        hosts[found[1]] = int(found[2])
    if not hosts:
        raise UserError(f"{path} names no host: give a line HOST slots=N for each machine")
    return hosts


def is_local(hosts: Iterable[str]) -> bool:
    """Whether they are this machine alone, by the names that it has itself."""
    name = socket.gethostname()
    names = _LOCAL | {name, name.partition(".")[0], socket.getfqdn()}
    return all(host in names for host in hosts)


def check_reachable(hosts: Iterable[str]) -> None:
    """Try ssh without a password to each host; several need pdsh, which starts their ranks, too.

    Raises `UserError` where a command is missing, and for the last host that is not reached; those
    before it have a line ``error:`` on stderr each.
    """
    hosts = list(hosts)
    for command in ("ssh", "pdsh") if len(hosts) > 1 else ("ssh",):
        if shutil.which(command) is None:
            raise UserError(
                f"{command} is not here, and DeepSpeed starts the ranks of several machines with "
                f"it: install it, such as with apt-get install "
                f"{'openssh-client' if command == 'ssh' else command}"
            )
    with ThreadPoolExecutor(AT_ONCE) as pool:
        causes = dict(zip(hosts, pool.map(_ssh, hosts), strict=True))
    errors = [
        f"host {host} cannot be reached with ssh ({cause}): `{' '.join(SSH[:3])} {host} hostname` "
        "must work without a password; correct its name, set up its key, or take it out of the "
        "hostfile"
        for host, cause in causes.items()
        if cause
    ]
    for error in errors[:-1]:
        print(f"error: {mask(error)}", file=sys.stderr, flush=True)
    if errors:
        raise UserError(errors[-1])


def _ssh(host: str) -> str:
    """Why ``host`` does not run a command; empty: it does."""
    try:
        done = subprocess.run(
            [*SSH, host, "hostname"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, text=True, errors="replace", timeout=ALL_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"no answer in {ALL_SECONDS} s"
    if not done.returncode:
        return ""
    said = done.stderr.strip().splitlines()
    return said[-1].strip() if said else f"exit code {done.returncode}"
