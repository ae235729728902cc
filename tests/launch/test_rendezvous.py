"""The address that the ranks meet at."""

from __future__ import annotations

import pytest

from dsasr.launch import rendezvous
from dsasr.utils.errors import UserError


def test_a_name_that_does_not_resolve_is_one_line(monkeypatch):
    monkeypatch.setattr(rendezvous, "POLL", 0.01)
    monkeypatch.setenv("MASTER_ADDR", "no-such-node.invalid")
    monkeypatch.setenv("WORLD_SIZE", "1")
    rendezvous.check_master(0.1)  # one rank meets nobody
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"MASTER_ADDR=no-such-node\.invalid does not resolve on"):
        rendezvous.check_master(0.1)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    rendezvous.check_master(0.1)


def test_a_name_that_resolves_late_is_waited_for(monkeypatch):
    answers = iter([OSError("not yet"), OSError("not yet"), []])

    def resolve(*_):
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer

    monkeypatch.setattr(rendezvous, "POLL", 0.01)
    monkeypatch.setattr(rendezvous.socket, "getaddrinfo", resolve)
    monkeypatch.setenv("MASTER_ADDR", "late")
    monkeypatch.setenv("WORLD_SIZE", "2")
    rendezvous.check_master(10)
    assert next(answers, None) is None
