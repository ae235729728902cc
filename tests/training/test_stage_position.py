"""A checkpoint's position in a stage table that was changed since."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dsasr import config
from dsasr.schedule import Progress, Schedule, Snapshot, add_published
from dsasr.stages import StageConfig
from dsasr.training.stage_position import progress_in
from dsasr.utils.errors import UserError

PRETRAIN = StageConfig("pretrain", "pretrain", {"encoder": 1e-3, "ctc": 1e-3}, steps=20)
ALIGN = StageConfig("align", "sft", {"adaptor": 1e-3}, steps=4)
IA_SFT = StageConfig("ia_sft", "sft", {"adaptor": 1e-3, "llm": 1e-3}, steps=10, swaps=True)
JOINT = StageConfig("joint", "sft", {"encoder": 1e-3, "llm": 1e-3}, steps=3)
NEW = StageConfig("new", "sft", {"adaptor": 1e-3}, steps=5)
ALL = (PRETRAIN, ALIGN, IA_SFT, JOINT)
OVER = add_published(Progress(pretrain=20), [Snapshot("s20", 20, "final")])


def steps(stage: StageConfig, count: int) -> StageConfig:
    return replace(stage, steps=count)


def placed(progress: Progress, *stages: StageConfig, branch: str = "both") -> Progress:
    recipe = {"stages": config.to_plain(ALL)}
    manifest = {"progress": config.to_plain(progress), "recipe": recipe}
    return progress_in(manifest, Schedule(stages, branch=branch))


@pytest.mark.parametrize(
    ("at", "stages", "expected"),
    [
        ((1, 6), ALL, (1, 6)),
        # A finished stage leaves the table: the one in training goes on where it was.
        ((1, 6), (PRETRAIN, IA_SFT, JOINT), (0, 6)),
        ((2, 0), (PRETRAIN, JOINT), (0, 0)),
        ((1, 6), (PRETRAIN, ALIGN, IA_SFT), (1, 6)),
        ((1, 6), (PRETRAIN, ALIGN, IA_SFT, NEW, JOINT), (1, 6)),
        # Longer or shorter, also after its end.
        ((1, 6), (PRETRAIN, ALIGN, steps(IA_SFT, 30), JOINT), (1, 6)),
        ((1, 6), (PRETRAIN, ALIGN, steps(IA_SFT, 6), JOINT), (2, 0)),
        ((2, 0), (PRETRAIN, ALIGN, steps(IA_SFT, 30), JOINT), (1, 10)),
        ((3, 0), (PRETRAIN, ALIGN, IA_SFT, steps(JOINT, 9)), (2, 3)),
        ((3, 0), (*ALL, NEW), (3, 0)),
        ((3, 0), (PRETRAIN, NEW), (0, 0)),
        ((3, 0), (PRETRAIN, ALIGN), (1, 0)),
        ((1, 0), (PRETRAIN, ALIGN, NEW, IA_SFT), (1, 0)),
    ],
)
def test_a_stage_goes_on_by_its_name(at, stages, expected):
    progress = replace(OVER, stage=at[0], step=at[1], sft=17)
    found = placed(progress, *stages)
    assert (found.stage, found.step) == expected
    assert replace(found, stage=at[0], step=at[1]) == progress  # all else is as it was


@pytest.mark.parametrize(
    ("at", "stages", "words"),
    [
        ((1, 6), (PRETRAIN, ALIGN, JOINT), "'ia_sft' has done 6 of its 10 .*steps=6 to end"),
        ((1, 6), (PRETRAIN, steps(ALIGN, 9), IA_SFT, JOINT), r"stages\.align\.steps=4"),
        ((1, 6), (PRETRAIN, ALIGN, NEW, IA_SFT), "'new' is new, and 'ia_sft' behind it"),
        ((1, 6), (steps(PRETRAIN, 30), *ALL[1:]), "cannot be extended"),
        ((1, 6), (replace(PRETRAIN, name="align"), IA_SFT), "was of branch sft"),
        ((1, 6), (steps(PRETRAIN, 12), *ALL[1:]), "no step of the stages"),
    ],
)
def test_a_table_without_a_common_position_is_refused(at, stages, words):
    with pytest.raises(UserError, match=words) as caught:
        placed(replace(OVER, stage=at[0], step=at[1], sft=10), *stages)
    assert "\n" not in str(caught.value)


def test_pretraining_that_goes_on_may_be_longer_and_not_shorter():
    progress = Progress(pretrain=12)
    assert placed(progress, steps(PRETRAIN, 30), *ALL[1:]) == progress
    # The sft job of a concurrent run counts no pretrain steps.
    assert placed(Progress(), steps(PRETRAIN, 30), *ALL[1:], branch="sft") == Progress()
    for count in (12, 10):
        with pytest.raises(UserError, match="has done 12 steps"):
            placed(progress, steps(PRETRAIN, count), *ALL[1:])
    # An encoder from outside in place of pretraining that is over.
    assert placed(OVER, *ALL[1:]) == OVER


def test_a_finished_run_that_is_extended_trains_on(tiny, tmp_path, trainer_of):
    overrides = ["branch=sft", "store.poll_seconds=1000"]
    trainer = trainer_of(tmp_path / "run", *overrides)
    trainer.branches.get("sft")
    trainer.progress = add_published(Progress(stage=3, sft=22, in_use="x"),
                                     [Snapshot("x", 20, "final")])  # fmt: skip
    trainer._finished = True
    assert trainer.save()
    trainer.close()
    again = trainer_of(tmp_path / "run", *overrides)
    assert again._finished and again.next_turn().kind == "end"
    again.close()
    longer = trainer_of(tmp_path / "run", *overrides, "stages.joint.steps=9", "allow_changed=true")
    turn = longer.next_turn()
    assert (turn.kind, turn.stage.name, turn.step) == ("step", "joint", 4)
    assert not longer._finished
    longer.close()
    saved = (tmp_path / "run" / "sft" / "recipe.yaml").read_text()
    with pytest.raises(UserError, match=r"stages\.align\.steps=4"):
        trainer_of(tmp_path / "run", *overrides, "stages.align.steps=9", "allow_changed=true")
    assert (tmp_path / "run" / "sft" / "recipe.yaml").read_text() == saved
