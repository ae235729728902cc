"""The soak in small, and comparisons that can see what differs."""

from __future__ import annotations

import json
import random
import shutil

import pytest
import torch

from dsasr import recipe
from dsasr.checkpoint import tensor_fragments
from dsasr.checkpoint.tensor_fragments import Fragment
from dsasr.testing import soak, soak_check
from dsasr.utils.errors import UserError


def write(path, lines):
    path.write_text("".join(json.dumps(x) + "\n" for x in lines))


def ended(folder, value: float = 1.0, nll: float = 2.0, streams: int = 0, key: str = "c"):
    """A run folder at its end."""
    held = {"sft/w": Fragment((3,), 0, torch.tensor([1.0, 2.0, value]))}
    info = {"steps": 4, "progress": {"sft": 4}, "streams": {"sft": streams}, "branches": {}}
    tensor_fragments.write_folder(folder / "checkpoints" / "step-0000000004", held, info)
    lines = [{"steps": 3, "nll": 2.5}, {"steps": 4, "nll": nll, "step_seconds": value}]
    write(folder / "metrics.jsonl", lines)
    write(folder / "ledger.jsonl", [{"steps": 4, "branch": "sft", "samples": [[[0, ["a", key]]]]}])
    return folder


def test_a_comparison_sees_weights_cursors_losses_and_samples(tmp_path):
    calm = ended(tmp_path / "calm")
    differences = soak_check.differences
    assert differences(calm, ended(tmp_path / "same")) == []
    assert differences(calm, ended(tmp_path / "w", value=1.0000001)) == ["sft/w"]
    found = differences(calm, ended(tmp_path / "n", nll=2.0000001))
    assert found == ["line 2 of the metrics: nll"]
    found = differences(calm, ended(tmp_path / "s", streams=1))
    assert found == ["streams of the last checkpoint"]
    assert differences(calm, ended(tmp_path / "l", key="d")) == ["line 1 of the ledger: samples"]
    assert soak_check.repeated(calm, ended(tmp_path / "r", key="d"))
    assert soak_check.repeated(calm, tmp_path / "same") == []
    shutil.rmtree(tmp_path / "same" / "checkpoints")
    assert "no whole checkpoint" in differences(calm, tmp_path / "same")[0]


def ledger(chosen, keys, per_step: int = 13):
    """A faultless one: each stage goes over ``keys``, two ranks, until its steps are made."""
    lines, total = [], 0
    for stage in chosen.stages:
        for step in range(1, stage.steps + 1):
            total += 1
            epoch, at = divmod((step - 1) * per_step, len(keys))
            drawn = keys[at : at + per_step]
            halves = [[[epoch, drawn[:6]]], [[epoch, drawn[6:]]]]
            head = {"steps": total, "branch": stage.branch, "stage": stage.name, "step": step}
            lines.append(head | {"samples": halves})
    return lines


def test_a_ledger_shows_exactly_once_or_what_is_wrong(tiny, tmp_path):
    chosen = recipe.load(str(tiny), [f"run={tmp_path}"])
    keys = sorted(soak_check._keys(chosen.data.train[0].shards))
    assert len(keys) == 52
    good = ledger(chosen, keys)

    def faults(lines) -> str:
        write(tmp_path / "ledger.jsonl", lines)
        return "; ".join(soak_check.balance(tmp_path, chosen).faults)

    assert faults(good) == ""
    found = soak_check.balance(tmp_path, chosen)
    assert (found.steps, found.samples, found.epochs) == (42, 42 * 13, 4 + 3)
    assert "no ledger" in faults([])
    assert "not 1, 2, 3" in faults([*good[:5], good[4], *good[5:]])  # a step replayed, kept twice
    assert "pretrain lacks steps" in faults([*good[:5], *good[6:]])
    again = json.loads(json.dumps(good))
    again[1]["samples"][0][0][1][0] = keys[0]  # once too often, and another not at all
    assert "pretrain, epoch 0: 1 twice (" + keys[0] in faults(again)
    assert "pretrain, epoch 0: 1 missing (" + keys[13] in faults(again)
    again[1]["samples"][0][0][1][0] = "nobody"
    assert "unknown (nobody" in faults(again)
    # One that the run has dropped and named is not missed.
    del again[1]["samples"][0][0][1][0]
    write(tmp_path / "bad_samples.jsonl", [{"key": keys[13]}])
    assert "epoch 0" not in faults(again)


def test_all_places_and_targets_are_dealt():
    decks = soak.deal(["both"], 32, random.Random(0))
    assert {place for _, place in decks["both"]} == set(soak.PLACES)
    assert {target for target, _ in decks["both"]} == set(soak.TARGETS)
    pair = soak.deal(["pretrain", "sft"], 31, random.Random(0))
    assert len(pair["pretrain"]) + len(pair["sft"]) == 31
    assert "swap" not in {place for _, place in pair["pretrain"]}


def test_a_used_folder_is_refused(tmp_path):
    (tmp_path / "calm").mkdir()
    with pytest.raises(UserError, match="new folder"):
        soak.soak("demo", [], tmp_path, kills=1, world=1, seed=0)


@pytest.mark.launcher
def test_kills_in_a_save_in_a_swap_and_of_the_launcher(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    told: list[str] = []
    short = ["stages.pretrain.steps=8", "stages.ia_sft.steps=6", "stages.joint.steps=2",
             "checkpoint.every_steps=3"]  # fmt: skip
    deck = [("rank", "save"), ("launcher", "step"), ("node", "swap")]
    verdict = soak.soak(
        str(tiny), short, tmp_path / "soak", kills=3, world=2, seed=3,
        decks={"both": deck}, tell=told.append,
    )  # fmt: skip
    assert not verdict.faults, verdict.faults
    assert verdict.by(1) == {"rank": 1, "launcher": 1, "node": 1}
    assert {"save", "swap"} <= set(verdict.by(2)), verdict
    assert (verdict.starts, verdict.steps) == (4, 20) and verdict.epochs >= 1, verdict
    assert told[-1] == "comparing"
