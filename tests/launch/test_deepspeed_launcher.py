"""`dsasr train`'s way to the ranks, with a small script in place of DeepSpeed's launcher."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import socket
import sys
import threading
import time

import pytest

from dsasr.launch import deepspeed_launcher
from dsasr.utils.errors import UserError

CHATTER = "[2026-01-01 00:00:00,000] [INFO] [launch.py:1:main] process 7 spawned\n"


def test_chatter_is_left_out_and_its_end_kept():
    out, step = io.StringIO(), "step 1  loss 2.0\n"
    hidden = deepspeed_launcher.pass_on([CHATTER, step, "ninja: no work to do\n"], out)
    assert out.getvalue() == step and hidden == [CHATTER.strip(), "ninja: no work to do"]
    assert len(deepspeed_launcher.pass_on([CHATTER] * 99, out)) == 40


@pytest.fixture
def local(monkeypatch):
    """``local(gpus, ranks, **variables)``: the launcher's options and the accelerator."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def place(count: int, ranks: int = 0, **env: str) -> tuple[list[str], str | None]:
        monkeypatch.setattr(deepspeed_launcher, "gpus", lambda: count)
        port, number, *options = deepspeed_launcher.placement(env, ranks)
        assert port == "--master_port" and int(number) > 0
        return options, env.get("DS_ACCELERATOR")

    return place


def test_one_rank_a_gpu_or_one_on_the_cpu(local):
    assert local(0) == (["--num_gpus", "1"], "cpu")
    assert local(0, 2) == (["--num_gpus", "2"], "cpu")
    assert local(8) == (["--num_gpus", "8"], None)
    assert local(8, 2) == (["--num_gpus", "2"], None)
    assert local(2, CUDA_VISIBLE_DEVICES="5,7") == (["--include", "localhost:5,7"], None)
    assert local(2, 1, CUDA_VISIBLE_DEVICES="5,7") == (["--include", "localhost:5"], None)
    with pytest.raises(UserError, match="this machine has 2 GPUs"):
        local(2, 3)
    with pytest.raises(UserError, match="--ranks -1"):
        local(2, -1)


def test_a_hostfile_places_the_ranks(tmp_path):
    hosts = tmp_path / "hosts"
    options = deepspeed_launcher.placement({}, 0, hosts)
    assert options == ["--hostfile", str(hosts)]
    assert deepspeed_launcher.placement({}, 4, hosts) == [*options, "--num_gpus", "4"]


def test_hosts_are_read_and_tried_before_the_launcher_starts(monkeypatch, tmp_path):
    tried = []
    monkeypatch.setattr(deepspeed_launcher, "check_reachable", tried.append)
    monkeypatch.setattr(deepspeed_launcher, "LAUNCHER", ("bash", "-c", 'echo "$*"', "x"))
    monkeypatch.setattr(deepspeed_launcher, "gpus", lambda: 0)

    def start(text: str, ranks: int = 0) -> str:
        hosts.write_text(text)
        with contextlib.redirect_stdout(io.StringIO()) as out:
            program = tmp_path / "train.py"
            assert deepspeed_launcher.run(program, [], ranks=ranks, hostfile=hosts) == 0
        return out.getvalue()

    hosts = tmp_path / "hosts"
    for host in ("localhost", socket.gethostname()):  # no ssh to this machine
        said = start(f"{host} slots=3\n")
        assert "--num_gpus 3" in said and "--hostfile" not in said and not tried
    assert "--num_gpus 2" in start("localhost slots=3\n", ranks=2)
    assert f"--hostfile {hosts} --num_gpus 2" in start("localhost slots=3\nb.x slots=3\n", ranks=2)
    assert tried == [{"localhost": 3, "b.x": 3}]
    hosts.write_text("b.x\n")
    with pytest.raises(UserError, match="line 1"):
        deepspeed_launcher.run(tmp_path / "train.py", [], hostfile=hosts)
    monkeypatch.setattr(deepspeed_launcher, "gpus", lambda: 2)
    hosts.write_text("localhost slots=3\n")
    with pytest.raises(UserError, match="has 2 GPUs: give slots=2"):
        deepspeed_launcher.run(tmp_path / "train.py", [], hostfile=hosts)


LAUNCHER = """
# As deepspeed.launcher.runner: one child, which starts the ranks.
import os, subprocess, sys
assert os.environ["DS_ACCELERATOR"] == "cpu"
assert os.environ["PATH"].startswith(os.path.dirname(sys.executable) + ":")
sys.exit(subprocess.call([sys.executable, f"{__file__}.launch", *sys.argv[-2:]]))
"""
LAUNCH = """
import signal, subprocess, sys
# A shell's background job ignores it, and bash cannot trap what is ignored when it starts.
signal.signal(signal.SIGINT, signal.SIG_DFL)
print("[2026-01-01 00:00:00,000] [INFO] [launch.py:1:main] two ranks", flush=True)
import os
command = ["bash", sys.argv[1]]
ranks = [
    subprocess.Popen([*command, rank, sys.argv[2]], env=os.environ | {"RANK": rank})
    for rank in ("0", "1")
]
sys.exit(max(rank.wait() for rank in ranks))
"""
RANK = """
trap 'echo "rank $1 saves"; exit 0' USR1 TERM
trap 'exit 130' INT
echo "rank $1 ready"
case $2 in
  kill) [ "$1" = 1 ] && { sleep 0.6; kill -9 $$; }; sleep 1.5; echo "rank 0 fails"; exit 1 ;;
  wait) for _ in {1..600}; do sleep 0.05; done; exit 99 ;;
  *) exit "$2" ;;
esac
"""


@pytest.fixture
def start(monkeypatch, tmp_path):
    """``start("wait", signal)``: exit code and output of two ranks that are sent ``signal``."""
    script, rank = tmp_path / "launcher", tmp_path / "rank"
    script.write_text(LAUNCHER)
    (tmp_path / "launcher.launch").write_text(LAUNCH)
    rank.write_text(RANK)
    monkeypatch.setattr(deepspeed_launcher, "LAUNCHER", (sys.executable, str(script)))
    monkeypatch.setattr(deepspeed_launcher, "gpus", lambda: 0)

    def run(argument: str, number: int = 0) -> tuple[int, str]:
        out = io.StringIO()

        def send() -> None:
            end = time.monotonic() + 20
            while out.getvalue().count("ready") < 2 and time.monotonic() < end:
                time.sleep(0.02)
            os.kill(os.getpid(), number)

        if number:
            threading.Thread(target=send, daemon=True).start()
        with contextlib.redirect_stdout(out):
            code = deepspeed_launcher.run(rank, [argument], ranks=2)
        return code, out.getvalue()

    return run


@pytest.mark.parametrize("code", [0, 2, 75])
def test_the_exit_code_is_passed_on(start, code):
    ended, output = start(str(code))
    assert ended == code
    # What failed shows the launcher's words; a user's mistake explains itself.
    assert ("[launch.py:1:main]" in output) == (code == 75)
    assert ("exit code 75" in output) == (code == 75)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_ranks_save_and_stop_on_a_signal(start, number):
    before = signal.getsignal(number)
    code, output = start("wait", number)
    assert code == 0 and "rank 0 saves" in output and "rank 1 saves" in output
    assert "[launch.py" not in output
    assert signal.getsignal(number) == before


def test_a_rank_that_was_killed_is_named_in_a_line(start):
    code, output = start("kill")
    assert code != 0
    (line,) = [line for line in output.splitlines() if "signal 9" in line]
    assert line.startswith("rank 1 was killed") and "batch.frames" in line
    assert "[launch.py" not in output and "exit code" not in output


def test_ctrl_c_ends_the_ranks(start):
    assert start("wait", signal.SIGINT)[0] == 130


def test_a_launcher_that_was_killed_is_reported(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(deepspeed_launcher, "LAUNCHER", ("bash", "-c", "kill -9 $$", "x"))
    monkeypatch.setattr(deepspeed_launcher, "gpus", lambda: 0)
    assert deepspeed_launcher.run(tmp_path / "train.py", []) == 128 + signal.SIGKILL
    assert "the ranks ended with exit code 137" in capsys.readouterr().out


def test_a_launcher_without_ranks_yet_is_ended(monkeypatch, tmp_path):
    monkeypatch.setattr(deepspeed_launcher, "LAUNCHER", ("bash", "-c", "echo; exec sleep 30", "x"))
    monkeypatch.setattr(deepspeed_launcher, "gpus", lambda: 0)
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    assert deepspeed_launcher.run(tmp_path / "train.py", []) == 128 + signal.SIGTERM
