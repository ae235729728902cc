"""Whether the ranks of a job can meet at the address that they are given."""

from __future__ import annotations

import os
import socket
import time

from dsasr.utils.errors import UserError

SECONDS = 60.0  # that a name may take to resolve: a node's network may come up late
POLL = 2.0


def check_master(seconds: float = SECONDS) -> None:
    """Raise `UserError` where MASTER_ADDR does not resolve within ``seconds``.

    torch would go on trying until the process group's timeout, an hour or more.
    """
    host = os.environ.get("MASTER_ADDR", "")
    if os.environ.get("WORLD_SIZE", "1") == "1" or not host:
        return
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.getaddrinfo(host, None)
            return
        except OSError as error:
            reason = error.strerror or str(error)
        if time.monotonic() > deadline:
            raise UserError(
                f"MASTER_ADDR={host} does not resolve on {socket.gethostname()} ({reason}): give "
                "MASTER_ADDR as an address of rank 0's node that all nodes know"
            )
        time.sleep(POLL)
