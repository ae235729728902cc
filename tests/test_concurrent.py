"""Two jobs and one store: each may die and come back; the history repeats in one job."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dsasr import fragments, history, partition, recipe
from dsasr.config import fingerprint, to_plain
from dsasr.errors import UserError
from dsasr.fragments import FragmentReader
from dsasr.run import Run
from dsasr.stages import Snapshot


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
            fragments.read_manifest(run / "snapshots" / swap["snapshot"])["checksum"]
            == (swap["checksum"])
        )
    # The same swaps in one job: the same losses and weights, bit for bit.
    both = tmp_path / "both"
    job = start(f"run={both}", slow, *history.overrides(run / "sft"))
    assert job.wait() == [0, 0], job.output[-3000:]
    assert sft_losses(both) == sft_losses(run / "sft")
    again = [(e["pretrain"], e["sft"]) for e in events(both, "swap")]
    assert again == [(e["pretrain"], e["sft"]) for e in taken]
    one, other = sft_weights(both), sft_weights(run / "sft")
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


# -- decisions that need no ranks ------------------------------------------------------------


def opened(tiny: Path, folder: Path, *overrides: str) -> Run:
    chosen = [f"run={folder}", "branch=sft", "store.poll_seconds=0", *overrides]
    return Run(recipe.load(str(tiny), chosen))


def offer(run: Run, number: int, cause: str, seed: int = 0, spoil: str = "") -> None:
    """Publish an encoder as the pretrain job would."""
    module = run.build.pretrainer()
    module.reset_parameters(torch.Generator().manual_seed(seed))
    architecture = fingerprint(to_plain(run.recipe.model.encoder))
    if spoil == "architecture":
        architecture = "another"
    snapshot = Snapshot(f"encoder-{number:09d}", number, cause)
    info = {"architecture": architecture, "reference": None}
    assert run.exchange.store.publish(module, {}, snapshot, info)
    if spoil == "nan":  # written by something else than our publisher
        next(module.encoder.parameters()).data.fill_(float("nan"))
        manifest = run.exchange.store.manifest(snapshot.id)
        fragments.write_folder(
            run.exchange.store.folder / snapshot.id, partition.weights(module), manifest
        )


def in_stage(run: Run, position: int):
    """The sft branch as it is in that stage, without an engine."""
    branch = run._branch("sft")
    branch.stage = run.schedule.sft[position]
    return branch


def test_a_late_publisher_by_recipe(tiny, tmp_path):
    run = opened(tiny, tmp_path / "a", "store.late=stop", "store.silent_seconds=-1")
    assert run.turn().kind == "wait"
    with pytest.raises(UserError, match="publisher has been silent"):
        run.wait()
    run.close()
    run = opened(tiny, tmp_path / "b", "store.late=continue", "store.silent_seconds=-1")
    with pytest.raises(UserError, match="publisher has been silent"):
        run.wait()  # nothing there to continue with
    offer(run, 5, "drift")
    offer(run, 9, "drift", seed=1)
    run.progress = replace(run.progress, stage=1, step=11, sft=15, in_use="encoder-000000005")
    assert run.turn().kind == "wait"  # the last segment needs the final encoder
    run.wait()
    turn = run.turn()
    assert (turn.kind, turn.load.id, turn.load.cause) == ("step", "encoder-000000009", "final")
    assert events(run.recipe.folder, "publisher_lost")[0]["last"] == "encoder-000000009"
    # The publisher comes back after all: its final encoder is taken.
    offer(run, 20, "final", seed=2)
    assert run.turn().load.id == "encoder-000000020"
    run.close()
    run = opened(tiny, tmp_path / "c", "store.late=wait", "store.silent_seconds=-1")
    for _ in range(3):
        assert run.turn().kind == "wait"
        run.wait()
    assert len(events(run.recipe.folder, "waiting")) == 1
    run.close()


@pytest.mark.parametrize("spoil", ["architecture", "nan"])
def test_a_bad_encoder_is_refused_and_the_branch_left_as_it_was(tiny, tmp_path, spoil):
    run = opened(tiny, tmp_path / "run")
    offer(run, 5, "drift")
    branch = in_stage(run, 0)
    turn = run.turn()
    assert run.swap(branch, turn.load)
    assert branch.checksum() == run.exchange.store.manifest("encoder-000000005")["checksum"]
    run.progress = replace(run.progress, stage=1, sft=4, in_use="encoder-000000005")
    before, stage = branch.checksum(""), in_stage(run, 1).stage
    offer(run, 9, "drift", seed=1, spoil=spoil)
    turn = run.turn()
    assert turn.load.id == "encoder-000000009" and not run.swap(branch, turn.load)
    assert branch.checksum("") == before and branch.stage is stage
    told = events(run.recipe.folder, "refused")
    assert len(told) == 1 and told[0]["snapshot"] == "encoder-000000009"
    assert {"architecture": "another architecture", "nan": "not finite"}[spoil] in told[0]["reason"]
    # It is not tried again, and the next good one is taken.
    assert run.turn().load is None
    offer(run, 12, "drift", seed=3)
    assert run.turn().load.id == "encoder-000000012"
    # Without a final encoder there is no going on.
    offer(run, 20, "final", seed=4, spoil=spoil)
    with pytest.raises(UserError, match="final encoder cannot be used"):
        run.swap(branch, run.turn().load)
    assert branch.checksum("") == before
    run.close()


def test_a_pruned_snapshot_is_refused_with_its_reason(tiny, tmp_path):
    run = opened(tiny, tmp_path / "run")
    gone = Snapshot("encoder-000000003", 3, "drift")
    run.progress = replace(run.progress, published=(gone,))
    assert not run.swap(in_stage(run, 0), run.turn().load)
    assert "no readable manifest" in events(run.recipe.folder, "refused")[0]["reason"]
    assert run.turn().kind == "wait"
    run.close()


def test_a_store_of_another_recipe_is_not_published_into(tiny, tmp_path):
    run = opened(tiny, tmp_path / "run")
    offer(run, 5, "drift")
    run.close()
    with pytest.raises(UserError, match="holds encoders of another recipe"):
        Run(recipe.load(str(tiny), [f"run={tmp_path / 'run'}", "branch=pretrain"]))


def test_history_of_nothing_and_of_no_run(tmp_path):
    with pytest.raises(UserError, match="no run folder"):
        history.overrides(tmp_path)
    (tmp_path / "events.jsonl").write_text('{"event": "stage", "steps": 0}\n{"event": "sw')
    with pytest.raises(UserError, match="no history"):
        history.overrides(tmp_path)
