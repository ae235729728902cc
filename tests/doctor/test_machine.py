"""What a machine tells of itself, from texts that nvidia-smi and Linux print."""

from __future__ import annotations

import os
import time

import pytest

from dsasr.doctor import machine
from dsasr.doctor.machine import Gpu, Link

SOUND = "0, NVIDIA H200, 4, 143771, 0, 0, 0, [N/A], Not Active, Not Active, 5, 16"


def test_a_sound_gpu():
    [gpu] = machine.parse_gpus(SOUND + "\n")
    assert (gpu.index, gpu.name, gpu.troubles) == (0, "NVIDIA H200", ())
    assert gpu.total == pytest.approx(150.75, abs=0.01) and gpu.pcie == pytest.approx(63.0, abs=0.1)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("1, A, 4, 9, 17, 0, 0, [N/A], Not Active, Not Active, 4, 16", "17 uncorrected memory"),
        ("1, A, 4, 9, 0, 1, 0, [N/A], Not Active, Not Active, 4, 16", "waits for a reset"),
        ("1, A, 4, 9, 0, 0, 0, Yes, Not Active, Not Active, 4, 16", "waits for a reset"),
        ("1, A, 4, 9, 0, 0, 1, No, Not Active, Not Active, 4, 16", "could not be remapped"),
        ("1, A, 4, 9, 0, 0, 0, No, Active, Not Active, 4, 16", "hw thermal slowdown"),
        ("1, A, 8000, 9, 0, 0, 0, No, Not Active, Not Active, 4, 16", "8.4 GB"),
    ],
)
def test_what_is_wrong_with_a_gpu(line, words):
    [gpu] = machine.parse_gpus(line)
    assert len(gpu.troubles) == 1 and words in gpu.troubles[0]


def test_a_gpu_that_tells_little_and_lines_that_are_none():
    text = "No devices were found\n\n0, GeForce, [N/A]\n"
    assert machine.parse_gpus(text) == [Gpu(0, "GeForce")]


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """``smi(script)``: an nvidia-smi first on the path."""

    def put(script: str) -> None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/bash\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    return put


def test_an_nvidia_smi_that_hangs_or_fails_is_left(smi, monkeypatch):
    monkeypatch.setattr(machine, "SECONDS", 0.3)
    smi("exec sleep 30")
    started = time.monotonic()
    assert machine.gpus()[1].startswith("nvidia-smi does not answer")
    assert time.monotonic() - started < 10
    smi("exit 9")
    assert machine.gpus() == ([], machine.gpus()[1])
    smi(f"[[ $1 == *throttle* ]] && exit 2; echo '{', '.join(SOUND.split(', ')[:5])}'")
    [gpu], problem = machine.gpus()
    assert gpu.name == "NVIDIA H200" and gpu.pcie == 0.0 and problem == ""
    smi(f"echo '{SOUND}'")
    assert machine.gpus()[0][0].name == "NVIDIA H200" and machine.gpus()[1] == ""


def test_gpus_that_slurm_gave_and_torch_does_not_see(monkeypatch):
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    assert machine.gpus_of_node() == ([], "")  # DS_ACCELERATOR=cpu: on purpose
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr("dsasr.utils.distributed._has_gpu", lambda: False)
    assert "8 GPUs, and torch sees none" in machine.gpus_of_node()[1]
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert machine.gpus_of_node() == ([], "")


def test_links_inside_a_node(smi):
    smi("printf 'GPU 0: NVIDIA H200\\n\\t Link 0: 26.562 GB/s\\n\\t Link 1: 26.562 GB/s\\n'")
    assert machine.inside_link(Gpu(0, "H200")) == Link("NVLink", pytest.approx(53.124))
    smi("echo 'GPU 0: L4'")
    assert machine.inside_link(Gpu(0, "L4", pcie=31.5)) == Link("PCIe", 31.5)
    assert machine.inside_link(None) == Link()


def test_links_between_nodes(tmp_path, monkeypatch):
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    route = tmp_path / "route"
    route.write_text("Iface\tDestination\tGateway\nlo\t0000007F\t0\neth1\t00000000\t0101A8C0\n")
    assert machine.network_link(tmp_path, route) == Link("eth1")  # its speed is not known
    for name, speed in (("eth1", "25000"), ("ib0", "-1")):
        (tmp_path / "net" / name).mkdir(parents=True)
        (tmp_path / "net" / name / "speed").write_text(f"{speed}\n")
    assert machine.network_link(tmp_path, route) == Link("eth1", pytest.approx(3.125))
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    assert machine.network_link(tmp_path, route) == Link("ib0")
    for card, state in (("mlx5_0", "4: ACTIVE"), ("mlx5_1", "1: DOWN"), ("mlx5_2", "4: ACTIVE")):
        port = tmp_path / "infiniband" / card / "ports" / "1"
        port.mkdir(parents=True)
        (port / "state").write_text(f"{state}\n")
        (port / "rate").write_text("400 Gb/sec (4X NDR)\n")
    assert machine.network_link(tmp_path, route) == Link("2 InfiniBand ports", 100.0)


def test_two_checkouts_of_one_version_differ(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n")
    first = machine.code_digest(tmp_path)
    assert first == machine.code_digest(tmp_path) and len(first) == 10
    (tmp_path / "a.py").write_text("x = 2\n")
    assert machine.code_digest(tmp_path) != first
    assert "dsasr's code" in machine.versions() and "torch" in machine.versions()
