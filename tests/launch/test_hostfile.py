"""Lines of a hostfile, and ssh to its hosts, with a script in place of ssh."""

from __future__ import annotations

import os
import socket

import pytest

from dsasr.launch import hostfile
from dsasr.utils.errors import UserError


def test_lines_are_read_as_deepspeed_reads_them(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("# two nodes\n\n  node-1 slots=8\nme@10.0.0.2\tslots=4 max_slots=8\n")
    assert hostfile.read_hosts(path) == {"node-1": 8, "me@10.0.0.2": 4}
    deepspeed = pytest.importorskip("deepspeed.launcher.runner")
    assert dict(deepspeed.fetch_hostfile(str(path))) == hostfile.read_hosts(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a slots=8\nb\n", "line 2: 'b' is not HOST slots=N"),
        ("a 8\n", "write it as a slots=8"),
        ("a slots=8x\n", "not HOST slots=N"),
        ("a slots=0\n", "not HOST slots=N"),
        ("-oProxyCommand=x slots=8\n", "not HOST slots=N"),
        ("a slots=8\n\na slots=4\n", "line 3: a is named twice"),
        ("# nothing\n", "names no host"),
        (b"\xff\xfe", "cannot be read as text"),
    ],
)
def test_a_line_that_is_no_host_is_named(tmp_path, text, words):
    path = tmp_path / "hosts"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as error:
        hostfile.read_hosts(path)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_hostfile_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="there is no hostfile"):
        hostfile.read_hosts(tmp_path / "hosts")


def test_this_machine_alone():
    assert hostfile.is_local(["localhost"]) and hostfile.is_local([socket.gethostname()])
    assert not hostfile.is_local(["localhost", "b.x"]) and not hostfile.is_local(["b.x"])


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """``commands(ssh=…, pdsh=…)``: shell scripts that are all of PATH; returns it."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def make(**scripts: str):
        for name, script in scripts.items():
            (folder / name).write_text(f"#!/bin/sh\n{script}\n")
            (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", str(folder))
        return folder

    return make


def test_each_host_is_tried_once_and_each_failure_is_a_line(commands, tmp_path, capsys):
    script = f"""echo "$*" >> {tmp_path}/asked
case "$5" in good) exit 0 ;; mute) exit 7 ;; esac
echo noise >&2; echo "ssh: no route to $5" >&2; exit 255"""
    commands(ssh=script, pdsh="exit 1")
    hostfile.check_reachable(["good"])
    with pytest.raises(UserError) as error:
        hostfile.check_reachable(["far", "good", "mute"])
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and told[0].startswith("error: host far cannot be reached with ssh (ssh:")
    assert "no route to far" in told[0] and "ssh -o BatchMode=yes far hostname" in told[0]
    assert "host mute" in str(error.value) and "exit code 7" in str(error.value)
    asked = sorted((tmp_path / "asked").read_text().splitlines())
    options = "-o BatchMode=yes -o ConnectTimeout=10"
    assert asked == sorted(f"{options} {host} hostname" for host in ("good", "far", "good", "mute"))


def test_a_host_that_does_not_answer(commands, monkeypatch):
    sleep = next(p for p in ("/bin/sleep", "/usr/bin/sleep") if os.path.exists(p))
    commands(ssh=f"exec {sleep} 30")
    monkeypatch.setattr(hostfile, "ALL_SECONDS", 0.3)
    with pytest.raises(UserError, match=r"no answer in 0\.3 s"):
        hostfile.check_reachable(["slow"])


def test_ssh_and_pdsh_must_be_there(commands):
    commands()
    with pytest.raises(UserError, match="ssh is not here"):
        hostfile.check_reachable(["a"])
    commands(ssh="exit 0")
    hostfile.check_reachable(["a"])  # DeepSpeed starts the ranks of a single host without pdsh
    with pytest.raises(UserError, match="apt-get install pdsh"):
        hostfile.check_reachable(["a", "b"])
