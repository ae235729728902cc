"""What `dsasr serve` says before it serves anything."""

from __future__ import annotations

import socket

import pytest

from dsasr.cli.serve import is_loopback, listen
from dsasr.utils.errors import UserError


def test_a_port_in_use_and_a_host_that_is_none_are_named(command):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        done = command("serve", "models/none", "--port", port)
    assert done.returncode == 2 and f"--port {port}: Address already in use" in done.stderr
    with pytest.raises(UserError, match="give another"):
        listen("no.such.host.invalid", 0)
    with pytest.raises(UserError, match="give another"):
        listen("127.0.0.1", 99_999)


def test_a_model_that_is_none_is_named(command, tmp_path):
    pytest.importorskip("starlette")
    done = command("serve", tmp_path, "--port", 0)
    assert done.returncode == 2 and "neither an exported model nor a run folder" in done.stderr


def test_without_its_packages_it_names_the_extra(command, monkeypatch, tmp_path):
    import sys

    for name in [name for name in sys.modules if name.startswith("dsasr.server")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    done = command("serve", tmp_path, "--port", 0)
    assert done.returncode == 2 and "pip install 'dsasr[serve]'" in done.stderr


def test_what_can_be_reached_from_this_machine_alone():
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.1.2", "example.org")))
