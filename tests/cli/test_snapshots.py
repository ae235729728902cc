from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

from dsasr.checkpoint.snapshot_store import SnapshotStore
from dsasr.stages import Snapshot

TOOL = Path(__file__).parents[2] / "tools" / "snapshots.py"


def run(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_list_verify_prune(tmp_path):
    store, module = SnapshotStore(tmp_path / "s"), nn.Module()
    for number in range(1, 5):
        torch.manual_seed(number)
        module.encoder = nn.Linear(3, 2)
        info = {"reference": None, "cka": 0.97}
        store.publish(module, {}, Snapshot(f"encoder-{number}", number, "drift"), info)
    store.use("run-a", "encoder-1")
    told = run("list", store.folder)
    assert told.returncode == 0 and told.stdout.count("0.9700") == 4
    assert "in use: run-a" in told.stdout.splitlines()[1]
    assert run("verify", store.folder).returncode == 0
    path = store.folder / "encoder-2" / "rank-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    told = run("verify", store.folder)
    assert told.returncode == 1
    assert "encoder-2" in told.stdout and "4 snapshots, 1 bad" in told.stdout
    told = run("prune", store.folder, "--keep", 1)
    assert "pruned 2: encoder-2, encoder-3" in told.stdout
    assert run("list", tmp_path / "none").returncode == 2
