from __future__ import annotations

import torch
from torch import nn

from dsasr.checkpoint.snapshot_store import SnapshotStore
from dsasr.schedule import Snapshot


def test_list_verify_prune(tmp_path, command):
    store, module = SnapshotStore(tmp_path / "s"), nn.Module()
    for number in range(1, 5):
        torch.manual_seed(number)
        module.encoder = nn.Linear(3, 2)
        info = {"reference": None, "cka": 0.97}
        store.publish(module, {}, Snapshot(f"encoder-{number}", number, "drift"), info)
    store.use("run-a", "encoder-1")
    done = command("snapshots", "list", store.folder)
    assert done.returncode == 0 and done.stdout.count("0.9700") == 4
    assert "in use: run-a" in done.stdout.splitlines()[1]
    assert command("snapshots", "verify", store.folder).returncode == 0
    path = store.folder / "encoder-2" / "rank-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    done = command("snapshots", "verify", store.folder)
    assert done.returncode == 1
    assert "encoder-2" in done.stdout and "4 snapshots, 1 bad" in done.stdout
    # One that no snapshot can be read from is shown beside the others, and never pruned.
    odd = store.folder / "odd"
    odd.mkdir()
    (odd / "manifest.json").write_text('{"format": 1, "kind": "snapshot", "files": {}}')
    done = command("snapshots", "list", store.folder)
    assert done.returncode == 0 and done.stdout.count("0.9700") == 4
    assert "bad:" in done.stdout and "lacks 'id'" in done.stdout
    assert "5 snapshots, 2 bad" in command("snapshots", "verify", store.folder).stdout
    done = command("snapshots", "prune", store.folder, "--keep", 1)
    assert "pruned 2: encoder-2, encoder-3" in done.stdout
    assert command("snapshots", "list", tmp_path / "none").returncode == 2
