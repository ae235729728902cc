"""Two jobs and one store: each is killed and resumed; one job repeats their swaps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dsasr.checkpoint.manifest import read_manifest
from dsasr.checkpoint.tensor_fragments import FragmentReader
from dsasr.tracking import swap_replay
from dsasr.tracking.run_log import read_events, read_metrics


def events(folder: Path, kind: str) -> list[dict]:
    return [e for e in read_events(folder) if e["event"] == kind]


def sft_losses(folder: Path) -> list[tuple]:
    keys = ("stage", "step", "nll", "entropy", "accuracy", "grad_norm", "encoder_in_use")
    return [tuple(x[k] for k in keys) for x in read_metrics(folder) if "nll" in x]


def sft_weights(folder: Path) -> dict[str, torch.Tensor]:
    reader = FragmentReader(sorted((folder / "checkpoints").glob("step-*"))[-1])
    return {k: reader.whole(k) for k in reader.shapes if k.startswith("sft/")}


@pytest.mark.slow
@pytest.mark.launcher
def test_two_jobs_are_killed_resumed_and_repeated_in_one(start, tmp_path):
    run = tmp_path / "run"
    slow = "stages.pretrain.steps=28"
    sft = start(f"run={run}", "branch=sft", slow)
    sft.until("waiting for the next encoder at sft step 0")
    pretrain = start(f"run={run}", "branch=pretrain", slow)
    # Another reader of the same store, of another world size.
    alone = start(f"run={tmp_path / 'alone'}", "branch=sft", slow,
                  f"store.path={run / 'snapshots'}", world=1)  # fmt: skip
    pretrain.until("checkpoint step-0000000014 saved")
    pretrain.kill()
    sft.until("checkpoint step-0000000007 saved")
    sft.kill()
    assert not events(run / "pretrain", "finished")
    pretrain = start(f"run={run}", "branch=pretrain", slow)
    sft = start(f"run={run}", "branch=sft", slow)
    assert pretrain.wait() == [0, 0], pretrain.output[-3000:]
    assert sft.wait() == [0, 0], sft.output[-3000:]
    assert alone.wait() == [0], alone.output[-3000:]
    for folder in (run / "pretrain", run / "sft"):
        assert events(folder, "resumed") and events(folder, "finished")
    assert events(tmp_path / "alone" / "sft", "swap")[-1]["cause"] == "final"
    swaps = events(run / "sft", "swap")
    assert swaps[-1]["cause"] == "final" and swaps[-1]["pretrain"] == 28
    for swap in swaps:
        manifest = read_manifest(run / "snapshots" / swap["snapshot"])
        assert manifest["checksum"] == swap["checksum"]
    # The same swaps in one job: the same losses and weights, bit for bit.
    both = tmp_path / "both"
    job = start(f"run={both}", slow, "store.keep=1", *swap_replay.overrides(run / "sft"))
    assert job.wait() == [0, 0], job.output[-3000:]
    assert sft_losses(both) == sft_losses(run / "sft")
    again = [(e["pretrain"], e["sft"]) for e in events(both, "swap")]
    assert again == [(e["pretrain"], e["sft"]) for e in swaps]
    weights, expected = sft_weights(both), sft_weights(run / "sft")
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[k], expected[k]) for k in weights)
