"""The exchange's decisions, of one rank: waiting, taking, refusing, and what is told of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dsasr import recipe
from dsasr.checkpoint import snapshot_store, tensor_fragments, zero_partition
from dsasr.config import fingerprint, to_plain
from dsasr.stages import Snapshot
from dsasr.tracking import timeline_plot
from dsasr.training.trainer import Trainer
from dsasr.utils.errors import UserError


def lines(folder: Path, name: str = "metrics") -> list[dict]:
    return [json.loads(x) for x in (folder / f"{name}.jsonl").read_text().splitlines()]


def events(folder: Path, kind: str) -> list[dict]:
    return [e for e in lines(folder, "events") if e["event"] == kind]


def a_run(tiny: Path, folder: Path, *overrides: str) -> Trainer:
    # There is no process group here to cut parameters for: ZeRO-2 leaves them whole.
    return Trainer(recipe.load(str(tiny), [f"run={folder}", "engine.deepspeed=zero2", *overrides]))


def opened(tiny: Path, folder: Path, *overrides: str) -> Trainer:
    return a_run(tiny, folder, "branch=sft", "store.poll_seconds=0", *overrides)


def offer(run: Trainer, number: int, cause: str, seed: int = 0, spoil: str = "") -> None:
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
        tensor_fragments.write_folder(
            run.exchange.store.folder / snapshot.id,
            zero_partition.weight_fragments(module),
            manifest,
        )


def in_stage(run: Trainer, position: int):
    """The sft branch as it is in that stage, without an engine."""
    branch = run.branches.get("sft")
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
        Trainer(recipe.load(str(tiny), [f"run={tmp_path / 'run'}", "branch=pretrain"]))


# -- what is said in the store and in the log ------------------------------------------------


def test_a_refused_snapshot_is_not_the_one_in_use(tiny, tmp_path):
    run = opened(tiny, tmp_path / "run")
    store, branch = run.exchange.store, in_stage(run, 0)
    offer(run, 3, "drift", spoil="nan")
    assert not run.swap(branch, run.turn().load)
    assert store.in_use() == {}
    offer(run, 5, "drift", seed=1)
    assert run.swap(branch, run.turn().load)
    assert list(store.in_use().values()) == ["encoder-000000005"]
    run.progress = replace(run.progress, stage=1, sft=4, in_use="encoder-000000005")
    in_stage(run, 1)
    offer(run, 9, "drift", seed=2, spoil="nan")
    assert not run.swap(branch, run.turn().load)
    assert list(store.in_use().values()) == ["encoder-000000005"]
    # Refused once is refused after a resume too: no older encoder comes back as the newest.
    assert run.exchange.state()["refused"] == ["encoder-000000003", "encoder-000000009"]
    run.close()


def test_a_store_that_cannot_be_written_can_still_be_read(tiny, tmp_path, monkeypatch):
    run = opened(tiny, tmp_path / "run")
    offer(run, 5, "drift")

    def full(path, data):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(snapshot_store, "atomic_write", full)
    branch = in_stage(run, 0)
    assert run.swap(branch, run.turn().load)
    assert branch.checksum() == run.exchange.store.manifest("encoder-000000005")["checksum"]
    assert "No space left" in events(run.recipe.folder, "not_marked")[0]["reason"]
    run.close()


@pytest.mark.parametrize("problem", ["full", "nan"])
def test_an_encoder_that_cannot_be_published_is_told_with_its_step(
    tiny, tmp_path, monkeypatch, problem
):
    run = a_run(tiny, tmp_path / "run")
    live = run.branches.get("pretrain")
    run.progress = replace(run.progress, pretrain=7, sft=2)
    if problem == "nan":
        next(live.module.parameters()).data.view(-1)[0] = float("nan")
    else:

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(tensor_fragments, "write_file", full)
    before = run.progress
    run.publish("drift", {"cka": 0.9})
    assert run.progress == before
    told = events(run.recipe.folder, "refused")[0]
    assert (told["steps"], told["pretrain"], told["snapshot"]) == (9, 7, "encoder-000000007")
    assert {"full": "No space", "nan": "not finite"}[problem] in told["reason"]
    with pytest.raises(UserError, match=r"final encoder could not be published.*start again"):
        run.publish("final", {})
    assert run.exchange.store.snapshots() == [] and not list(run.exchange.store.folder.glob(".*"))
    # The picture shows the refusal.
    drawn = []
    axis = type("Axis", (), {"plot": lambda self, *given, **_: drawn.append(given[:2])})()
    timeline_plot._draw_swaps(axis, lines(run.recipe.folder, "events"), 20, 2)
    assert drawn[0] == (9, 0.3)
    run.close()


def test_a_drift_that_is_no_number_is_told_and_publishes_nothing(tiny, tmp_path):
    run = a_run(tiny, tmp_path / "run")
    live = run.branches.get("pretrain")
    run.progress = replace(run.progress, pretrain=4)
    assert run.drift_cause() == (None, {})
    next(live.module.encoder.parameters()).data.fill_(float("nan"))
    run.progress = replace(run.progress, pretrain=6)
    cause, found = run.drift_cause()
    assert cause is None and found["cka"] != found["cka"]
    told = events(run.recipe.folder, "refused")[0]
    assert (told["reason"], told["steps"], told["pretrain"]) == ("CKA is not a number", 6, 6)
    run.close()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [("", None), ("nan", "not finite"), ("architecture", "another architecture"), ("gone", "snap")],
)
def test_an_encoder_from_outside_is_taken_or_the_run_does_not_start(tiny, tmp_path, spoil, words):
    maker = opened(tiny, tmp_path / "maker")
    offer(maker, 5, "drift", spoil="nan" if spoil == "nan" else "")
    maker.close()
    folder = tmp_path / ("nothing" if spoil == "gone" else "maker") / "snapshots"
    chosen = [f"model.encoder_from={folder / 'encoder-000000005'}"]
    if spoil == "architecture":
        chosen.append("model.encoder.ffn=48")

    def take() -> None:
        run = a_run(tiny, tmp_path / "run", *chosen)
        branch = in_stage(run, 0)
        before = branch.checksum()
        turn = run.turn()
        try:
            assert turn.load.id == "given" and run.swap(branch, turn.load)
        except UserError:
            assert branch.checksum() == before
            raise
        finally:
            run.close()
        assert branch.checksum() == maker.exchange.store.manifest("encoder-000000005")["checksum"]

    if words is None:
        take()
    else:
        with pytest.raises(UserError, match=f"model.encoder_from.*{words}"):
            take()
