"""Encoder swaps on one rank: waiting, loading, refusing, and their events."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dsasr import recipe
from dsasr.checkpoint import snapshot_store, tensor_fragments, zero_partition
from dsasr.checkpoint.manifest import DIGEST
from dsasr.config import fingerprint, to_plain
from dsasr.schedule import Snapshot
from dsasr.tracking import timeline_plot
from dsasr.tracking.run_log import read_events
from dsasr.training.trainer import Trainer
from dsasr.utils.errors import UserError


def events(folder: Path, kind: str) -> list[dict]:
    return [e for e in read_events(folder) if e["event"] == kind]


def new_trainer(tiny: Path, folder: Path, *overrides: str) -> Trainer:
    # There is no process group here to cut parameters for: ZeRO-2 leaves them whole.
    return Trainer(recipe.load(str(tiny), [f"run={folder}", "engine.deepspeed=zero2", *overrides]))


def sft_trainer(tiny: Path, folder: Path, *overrides: str) -> Trainer:
    # So short that every call polls, however fast the machine is.
    return new_trainer(tiny, folder, "branch=sft", "store.poll_seconds=1e-9", *overrides)


def publish(trainer: Trainer, number: int, cause: str, seed: int = 0, fault: str = "") -> None:
    """Publish an encoder as the pretrain job does, or with a ``fault``."""
    module = trainer.builder.ctc_model()
    module.reset_parameters(torch.Generator().manual_seed(seed))
    architecture = fingerprint(to_plain(trainer.recipe.model.encoder))
    if fault == "architecture":
        architecture = "another"
    snapshot = Snapshot(f"encoder-{number:09d}", number, cause)
    info = {"architecture": architecture, "reference": None}
    assert trainer.encoder_swap.store.publish(module, {}, snapshot, info)
    if fault == "nan":  # the publisher itself writes no such snapshot
        next(module.encoder.parameters()).data.fill_(float("nan"))
        manifest = trainer.encoder_swap.store.manifest(snapshot.id)
        tensor_fragments.write_folder(
            trainer.encoder_swap.store.folder / snapshot.id,
            zero_partition.weight_fragments(module),
            manifest,
        )


def in_stage(trainer: Trainer, position: int):
    """The sft branch as it is in that stage, without an engine."""
    branch = trainer.branches.get("sft")
    branch.stage = trainer.schedule.sft[position]
    return branch


def test_a_late_publisher_by_recipe(tiny, tmp_path):
    trainer = sft_trainer(tiny, tmp_path / "a", "store.late=stop", "store.silent_seconds=1.0e-6")
    assert trainer.next_turn().kind == "wait"
    with pytest.raises(UserError, match="publisher has been silent"):
        trainer.wait_for_encoder()
    trainer.close()
    trainer = sft_trainer(
        tiny, tmp_path / "b", "store.late=continue", "store.silent_seconds=1.0e-6"
    )
    with pytest.raises(UserError, match="publisher has been silent"):
        trainer.wait_for_encoder()  # no encoder to continue with
    publish(trainer, 5, "drift")
    publish(trainer, 9, "drift", seed=1)
    trainer.progress = replace(
        trainer.progress, stage=1, step=11, sft=15, in_use="encoder-000000005"
    )
    assert trainer.next_turn().kind == "wait"  # the last segment needs the final encoder
    trainer.wait_for_encoder()
    turn = trainer.next_turn()
    assert (turn.kind, turn.load.id, turn.load.cause) == ("step", "encoder-000000009", "final")
    assert events(trainer.recipe.folder, "publisher_lost")[0]["last"] == "encoder-000000009"
    # The publisher returns: its final encoder is loaded.
    publish(trainer, 20, "final", seed=2)
    assert trainer.next_turn().load.id == "encoder-000000020"
    trainer.close()
    trainer = sft_trainer(tiny, tmp_path / "c", "store.late=wait", "store.silent_seconds=1.0e-6")
    for _ in range(3):
        assert trainer.next_turn().kind == "wait"
        trainer.wait_for_encoder()
    assert len(events(trainer.recipe.folder, "waiting")) == 1
    trainer.close()


@pytest.mark.parametrize("fault", ["architecture", "nan"])
def test_a_bad_encoder_is_refused_and_the_branch_unchanged(tiny, tmp_path, fault):
    trainer = sft_trainer(tiny, tmp_path / "run")
    publish(trainer, 5, "drift")
    branch = in_stage(trainer, 0)
    turn = trainer.next_turn()
    assert trainer.swap_encoder(branch, turn.load)
    assert branch.checksum() == trainer.encoder_swap.store.manifest("encoder-000000005")["checksum"]
    trainer.progress = replace(trainer.progress, stage=1, sft=4, in_use="encoder-000000005")
    before, stage = branch.checksum(""), in_stage(trainer, 1).stage
    publish(trainer, 9, "drift", seed=1, fault=fault)
    turn = trainer.next_turn()
    assert turn.load.id == "encoder-000000009" and not trainer.swap_encoder(branch, turn.load)
    assert branch.checksum("") == before and branch.stage is stage
    refusals = events(trainer.recipe.folder, "refused")
    assert len(refusals) == 1 and refusals[0]["snapshot"] == "encoder-000000009"
    assert {"architecture": "another architecture", "nan": "not finite"}[fault] in refusals[0][
        "reason"
    ]
    # It is not tried again; the next valid one is loaded.
    assert trainer.next_turn().load is None
    publish(trainer, 12, "drift", seed=3)
    assert trainer.next_turn().load.id == "encoder-000000012"
    # The final encoder cannot be skipped.
    publish(trainer, 20, "final", seed=4, fault=fault)
    with pytest.raises(UserError, match="final encoder cannot be used"):
        trainer.swap_encoder(branch, trainer.next_turn().load)
    assert branch.checksum("") == before
    trainer.close()


def test_an_odd_manifest_is_refused_once_and_hides_no_other(tiny, tmp_path):
    trainer = sft_trainer(tiny, tmp_path / "run")
    publish(trainer, 5, "drift")
    publish(trainer, 9, "drift", seed=1)
    path = trainer.encoder_swap.store.folder / "encoder-000000009" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in manifest.items() if k not in ("cause", DIGEST)}))
    for _ in range(3):
        assert trainer.next_turn().load.id == "encoder-000000005"
    refusals = events(trainer.recipe.folder, "refused")
    assert [r["snapshot"] for r in refusals] == ["encoder-000000009"]
    assert "lacks 'cause'" in refusals[0]["reason"]
    assert trainer.encoder_swap.state()["refused"] == []  # it may be mended
    path.write_text(json.dumps(manifest))
    assert trainer.next_turn().load.id == "encoder-000000009"
    # A checksum that is not its encoder's stops the job in one line.
    del manifest[DIGEST]
    path.write_text(json.dumps(manifest | {"checksum": "0"}))
    with pytest.raises(UserError, match="manifest 0: remove it") as caught:
        trainer.swap_encoder(in_stage(trainer, 0), trainer.next_turn().load)
    assert "\n" not in str(caught.value)
    trainer.close()


def test_a_pruned_snapshot_is_refused_with_its_reason(tiny, tmp_path):
    trainer = sft_trainer(tiny, tmp_path / "run")
    pruned = Snapshot("encoder-000000003", 3, "drift")
    trainer.progress = replace(trainer.progress, published=(pruned,))
    assert not trainer.swap_encoder(in_stage(trainer, 0), trainer.next_turn().load)
    assert "no readable manifest" in events(trainer.recipe.folder, "refused")[0]["reason"]
    assert trainer.next_turn().kind == "wait"
    trainer.close()


def test_a_store_of_another_recipe_is_not_published_into(tiny, tmp_path):
    trainer = sft_trainer(tiny, tmp_path / "run")
    publish(trainer, 5, "drift")
    trainer.close()
    with pytest.raises(UserError, match="holds encoders of another recipe"):
        Trainer(recipe.load(str(tiny), [f"run={tmp_path / 'run'}", "branch=pretrain"]))


# -- marks in the store, events ------------------------------------------------------------


def test_a_refused_snapshot_is_not_the_one_in_use(tiny, tmp_path):
    trainer = sft_trainer(tiny, tmp_path / "run")
    store, branch = trainer.encoder_swap.store, in_stage(trainer, 0)
    publish(trainer, 3, "drift", fault="nan")
    assert not trainer.swap_encoder(branch, trainer.next_turn().load)
    assert store.in_use() == {}
    publish(trainer, 5, "drift", seed=1)
    assert trainer.swap_encoder(branch, trainer.next_turn().load)
    assert list(store.in_use().values()) == ["encoder-000000005"]
    trainer.progress = replace(trainer.progress, stage=1, sft=4, in_use="encoder-000000005")
    in_stage(trainer, 1)
    publish(trainer, 9, "drift", seed=2, fault="nan")
    assert not trainer.swap_encoder(branch, trainer.next_turn().load)
    assert list(store.in_use().values()) == ["encoder-000000005"]
    # After a resume it is still refused: no older encoder becomes the newest one again.
    assert trainer.encoder_swap.state()["refused"] == ["encoder-000000003", "encoder-000000009"]
    trainer.close()


def test_a_store_that_cannot_be_written_can_still_be_read(tiny, tmp_path, monkeypatch):
    trainer = sft_trainer(tiny, tmp_path / "run")
    publish(trainer, 5, "drift")

    def full(path, data):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(snapshot_store, "atomic_write", full)
    branch = in_stage(trainer, 0)
    assert trainer.swap_encoder(branch, trainer.next_turn().load)
    assert branch.checksum() == trainer.encoder_swap.store.manifest("encoder-000000005")["checksum"]
    assert "No space left" in events(trainer.recipe.folder, "not_marked")[0]["reason"]
    trainer.close()


@pytest.mark.parametrize("problem", ["full", "nan"])
def test_an_encoder_that_cannot_be_published_is_an_event_with_its_step(
    tiny, tmp_path, monkeypatch, problem
):
    trainer = new_trainer(tiny, tmp_path / "run")
    live = trainer.branches.get("pretrain")
    trainer.progress = replace(trainer.progress, pretrain=7, sft=2)
    if problem == "nan":
        next(live.module.parameters()).data.view(-1)[0] = float("nan")
    else:

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(tensor_fragments, "write_file", full)
    before = trainer.progress
    trainer.publish_encoder("drift", 0.9)
    assert trainer.progress == before
    refusal = events(trainer.recipe.folder, "refused")[0]
    assert (refusal["steps"], refusal["pretrain"], refusal["snapshot"]) == (
        9,
        7,
        "encoder-000000007",
    )
    assert {"full": "No space", "nan": "not finite"}[problem] in refusal["reason"]
    with pytest.raises(UserError, match=r"final encoder could not be published.*start again"):
        trainer.publish_encoder("final", None)
    assert trainer.encoder_swap.store.snapshots() == [] and not list(
        trainer.encoder_swap.store.folder.glob(".*")
    )
    # The plot shows the refusal.
    drawn = []
    axis = type("Axis", (), {"plot": lambda self, *args, **_: drawn.append(args[:2])})()
    timeline_plot._draw_swaps(axis, read_events(trainer.recipe.folder), 20, 2)
    assert drawn[0] == (9, 0.3)
    trainer.close()


def test_a_nan_drift_is_an_event_and_publishes_nothing(tiny, tmp_path):
    trainer = new_trainer(tiny, tmp_path / "run")
    live = trainer.branches.get("pretrain")
    trainer.progress = replace(trainer.progress, pretrain=4)
    assert trainer.check_drift() == (None, None)
    next(live.module.encoder.parameters()).data.fill_(float("nan"))
    trainer.progress = replace(trainer.progress, pretrain=6)
    cause, cka = trainer.check_drift()
    assert cause is None and math.isnan(cka)
    refusal = events(trainer.recipe.folder, "refused")[0]
    assert (refusal["reason"], refusal["steps"], refusal["pretrain"]) == (
        "CKA is not a number",
        6,
        6,
    )
    trainer.close()


@pytest.mark.parametrize(
    ("fault", "words"),
    [("", None), ("nan", "not finite"), ("architecture", "another architecture"), ("gone", "snap")],
)
def test_an_external_encoder_is_loaded_or_the_run_does_not_start(tiny, tmp_path, fault, words):
    publisher = sft_trainer(tiny, tmp_path / "publisher")
    publish(publisher, 5, "drift", fault="nan" if fault == "nan" else "")
    publisher.close()
    folder = tmp_path / ("nothing" if fault == "gone" else "publisher") / "snapshots"
    overrides = [f"model.encoder_from={folder / 'encoder-000000005'}"]
    if fault == "architecture":
        overrides.append("model.encoder.ffn=48")

    def swap_first() -> None:
        trainer = new_trainer(tiny, tmp_path / "run", *overrides)
        branch = in_stage(trainer, 0)
        before = branch.checksum()
        turn = trainer.next_turn()
        try:
            assert turn.load.id == "given" and trainer.swap_encoder(branch, turn.load)
        except UserError:
            assert branch.checksum() == before
            raise
        finally:
            trainer.close()
        assert (
            branch.checksum()
            == publisher.encoder_swap.store.manifest("encoder-000000005")["checksum"]
        )

    if words is None:
        swap_first()
    else:
        with pytest.raises(UserError, match=f"model.encoder_from.*{words}"):
            swap_first()
