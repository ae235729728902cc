"""Two jobs and one store: each may die and come back; the history repeats in one job."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dsasr.checkpoint import tensor_fragments
from dsasr.checkpoint.tensor_fragments import FragmentReader
from dsasr.tracking import swap_replay
from dsasr.utils.errors import UserError


def lines(folder: Path, name: str = "metrics") -> list[dict]:
    return [json.loads(x) for x in (folder / f"{name}.jsonl").read_text().splitlines()]


def events(folder: Path, kind: str) -> list[dict]:
    return [e for e in lines(folder, "events") if e["event"] == kind]


def sft_losses(folder: Path) -> list[tuple]:
    kept = ("stage", "step", "nll", "entropy", "accuracy", "grad_norm", "encoder_in_use")
    return [tuple(x[k] for k in kept) for x in lines(folder) if "nll" in x]


def sft_weights(folder: Path) -> dict[str, torch.Tensor]:
    reader = FragmentReader(sorted((folder / "checkpoints").glob("step-*"))[-1])
    return {k: reader.whole(k) for k in reader.shapes if k.startswith("sft/")}


@pytest.mark.launcher
def test_two_jobs_are_killed_resumed_and_repeated_in_one(start, tmp_path):
    run = tmp_path / "run"
    slow = "stages.pretrain.steps=28"
    sft = start(f"run={run}", "branch=sft", slow)
    sft.until("waiting: sft=0")
    pretrain = start(f"run={run}", "branch=pretrain", slow)
    # Another reader of the same store, of another world size.
    alone = start(f"run={tmp_path / 'alone'}", "branch=sft", slow,
                  f"store.path={run / 'snapshots'}", world=1)  # fmt: skip
    pretrain.until("checkpoint: name=step-0000000014")
    pretrain.kill()
    sft.until("checkpoint: name=step-0000000007")
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
    taken = events(run / "sft", "swap")
    assert taken[-1]["cause"] == "final" and taken[-1]["pretrain"] == 28
    for swap in taken:
        assert (
            tensor_fragments.read_manifest(run / "snapshots" / swap["snapshot"])["checksum"]
            == (swap["checksum"])
        )
    # The same swaps in one job: the same losses and weights, bit for bit.
    both = tmp_path / "both"
    job = start(f"run={both}", slow, *swap_replay.overrides(run / "sft"))
    assert job.wait() == [0, 0], job.output[-3000:]
    assert sft_losses(both) == sft_losses(run / "sft")
    again = [(e["pretrain"], e["sft"]) for e in events(both, "swap")]
    assert again == [(e["pretrain"], e["sft"]) for e in taken]
    one, other = sft_weights(both), sft_weights(run / "sft")
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_history_of_nothing_and_of_no_run(tmp_path):
    with pytest.raises(UserError, match="no run folder"):
        swap_replay.overrides(tmp_path)
    (tmp_path / "events.jsonl").write_text('{"event": "stage", "steps": 0}\n{"event": "sw')
    with pytest.raises(UserError, match="no history"):
        swap_replay.overrides(tmp_path)
