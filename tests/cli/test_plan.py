"""`dsasr plan`."""

from __future__ import annotations


def test_a_cluster_from_shapes_alone(command):
    done = command("plan", "cluster", "--recipe", "nim-2.3b", "--nodes", 4, "--start", "2026-01-01")
    assert done.returncode == 0, done.stderr
    assert "from 2026-01-01 to 20" in done.stdout and "GPU-hours" in done.stdout
    assert " 1024 " in done.stdout
    for wrong in (["--start", "soon"], ["--nodes", 0], ["--stage", "none"]):
        assert command("plan", "cluster", "--recipe", "nim-2.3b", *wrong).returncode == 2


def test_padding_of_each_stage(command, tiny):
    done = command("plan", "padding", "--recipe", tiny)
    assert done.returncode == 0, done.stderr
    stages = [line.split()[0] for line in done.stdout.splitlines()]
    assert stages == ["stage", "pretrain", "align", "ia_sft", "joint"]
