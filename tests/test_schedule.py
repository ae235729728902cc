from __future__ import annotations

from dataclasses import replace

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dsasr import recipe
from dsasr.schedule import Progress, Schedule, Snapshot, add_published
from dsasr.stages import DriftConfig, PlannedSwap, StageConfig
from dsasr.utils.errors import UserError

PRETRAIN = StageConfig("pretrain", "pretrain", {"encoder": 5e-4, "ctc": 5e-4}, steps=20)
ALIGN = StageConfig("align", "sft", {"adaptor": 1e-3}, steps=4)
IA_SFT = StageConfig(
    "ia_sft", "sft", {"adaptor": 1e-5, "llm": 1e-5}, steps=10, swaps=True, steps_after_final_swap=3
)
JOINT = StageConfig("joint", "sft", {"encoder": 1e-5, "adaptor": 1e-5, "llm": 1e-5}, steps=3)
ALL = (PRETRAIN, ALIGN, IA_SFT, JOINT)


def play(schedule: Schedule, triggers=(), progress: Progress | None = None, limit=1000):
    """Run the schedule without a model: (turns, swaps as (id, sft step, stage), progress)."""
    progress = progress or Progress()
    turns, swaps = [], []
    for _ in range(limit):
        turn = schedule.next_turn(progress)
        if turn.kind != "step":
            return turns, swaps, progress, turn.kind
        if turn.load:
            swaps.append((turn.load.id, progress.sft, turn.stage.name))
        turns.append((turn.stage.name, turn.step))
        progress = schedule.advance(progress, turn)
        if turn.stage.branch == "pretrain":
            at = progress.pretrain
            cause = schedule.publishes_at(at) or ("drift" if at in triggers else None)
            if cause:
                progress = add_published(progress, [Snapshot(f"s{at}", at, cause)])
    raise AssertionError("the schedule never ends")


def steps_of(turns, name):
    return [step for stage, step in turns if stage == name]


def test_the_papers_stages():
    schedule = Schedule(ALL)
    turns, swaps, _, end = play(schedule, triggers=(10, 14))
    assert end == "end"
    for stage in ALL:
        assert steps_of(turns, stage.name) == list(range(stage.steps))
    # Alignment waits for the first trigger, IA-SFT starts on the same snapshot, later triggers
    # swap, the final encoder comes when pretraining ends, joint SFT needs no other one.
    assert turns.index(("align", 0)) == 10
    assert swaps[0] == ("s10", 0, "align")
    assert swaps[-1][0] == "s20" and swaps[-1][2] == "ia_sft"
    assert [s[0] for s in swaps] == ["s10", "s14", "s20"]
    # The last three IA-SFT steps ran after the final encoder was published.
    assert turns.index(("ia_sft", 7)) > turns.index(("pretrain", 19))
    assert turns.index(("joint", 0)) > turns.index(("ia_sft", 9))


def test_without_a_trigger_alignment_waits_for_the_end_of_pretraining():
    turns, swaps, _, _ = play(Schedule(ALL))
    assert turns[20] == ("align", 0) and [s[0] for s in swaps] == ["s20"]


def test_a_trigger_during_alignment_is_taken_when_ia_sft_begins():
    _, swaps, _, _ = play(Schedule(ALL), triggers=(10, 12))
    assert swaps[1] == ("s12", 4, "ia_sft")


def test_interleave_is_a_ratio():
    schedule = Schedule(
        (replace(PRETRAIN, steps=100), replace(IA_SFT, steps=40, steps_after_final_swap=0)),
        DriftConfig(mode="fixed", swaps=(PlannedSwap(10),)),
        interleave=(2, 1),
    )
    turns, *_ = play(schedule)
    window = [name for name, _ in turns[20:50]]
    assert window.count("pretrain") == 20 and window.count("ia_sft") == 10


def test_conventional_recipe_runs_one_stage_after_the_other():
    joint = replace(JOINT, steps=3)
    turns, swaps, _, _ = play(Schedule((PRETRAIN, ALIGN, joint), DriftConfig(mode="final")))
    names = [name for name, _ in turns]
    assert names == ["pretrain"] * 20 + ["align"] * 4 + ["joint"] * 3
    assert swaps == [("s20", 0, "align")]


def test_alignment_with_a_finished_encoder_and_no_pretraining():
    schedule = Schedule((ALIGN, replace(IA_SFT, steps_after_final_swap=10), JOINT))
    progress = add_published(Progress(), [Snapshot("given", 0, "given")])
    turns, swaps, _, end = play(schedule, progress=progress)
    assert end == "end" and len(turns) == 17 and swaps == [("given", 0, "align")]


def test_joint_with_a_frozen_encoder_and_stages_after_joint():
    frozen = StageConfig("late", "sft", {"adaptor": 1e-5, "llm": 1e-5}, steps=5)
    context = replace(JOINT, name="context", steps=2)
    after = replace(frozen, name="after", swaps=True)
    turns, swaps, _, _ = play(Schedule((PRETRAIN, ALIGN, frozen, JOINT, context, after)), (5,))
    assert steps_of(turns, "context") == [0, 1] and steps_of(turns, "after") == list(range(5))
    # Joint loads the final encoder; none replaces it once joint trains it.
    assert swaps == [("s5", 0, "align"), ("s20", 9, "joint")]


def test_planned_sft_steps_replay_a_history():
    plan = (PlannedSwap(5, 0), PlannedSwap(12, 6), PlannedSwap(20, 11))
    schedule = Schedule(ALL, DriftConfig(mode="fixed", swaps=plan))
    _, swaps, _, end = play(schedule)
    assert end == "end"
    assert [(s[0], s[1]) for s in swaps] == [("s5", 0), ("s12", 6), ("s20", 11)]


@given(
    st.lists(st.integers(1, 19), unique=True, min_size=1, max_size=8).map(sorted),
    st.data(),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
)
def test_what_a_plan_will_load_is_needed_until_then(published, data, ratio):
    """However far pretraining runs ahead, and however few snapshots are kept."""
    steps = data.draw(st.lists(st.integers(0, 12), min_size=len(published),
                               max_size=len(published)).map(sorted))  # fmt: skip
    swaps = [PlannedSwap(p, s) for p, s in zip(published, steps, strict=True)]
    drift = DriftConfig(mode="fixed", swaps=(*swaps, PlannedSwap(20, 13)))
    schedule = Schedule(ALL, drift, interleave=ratio)
    stored: set[str] = set()
    progress, loaded = Progress(), []
    while (turn := schedule.next_turn(progress)).kind == "step":
        if turn.load:
            assert turn.load.id in stored
            loaded.append(turn.load.id)
        progress = schedule.advance(progress, turn)
        cause = schedule.publishes_at(progress.pretrain)
        if turn.stage.branch == "pretrain" and cause:
            snapshot = Snapshot(f"s{progress.pretrain}", progress.pretrain, cause)
            progress = add_published(progress, [snapshot])
            stored = (stored | {snapshot.id}) & schedule.needed(progress)
    assert turn.kind == "end" and loaded[-1] == "s20"
    # Beside a pretrain job, which does not know how far the sft job is, all of the plan stays.
    alone = Schedule(ALL, drift, branch="pretrain")
    assert set(loaded) <= alone.needed(replace(progress, sft=0))
    # Without a plan the newest is loaded.
    assert Schedule(ALL).needed(progress) == {"s20"}


def test_one_branch_alone():
    turns, _, _, end = play(Schedule(ALL, branch="pretrain"), (10,))
    assert end == "end" and len(turns) == 20
    # The sft branch waits for what the other job publishes.
    sft = Schedule(ALL, branch="sft")
    turns, _, progress, end = play(sft)
    assert (turns, end) == ([], "wait")
    progress = add_published(progress, [Snapshot("a", 7, "drift")])
    turns, _, progress, end = play(sft, progress=progress)
    assert end == "wait" and len(turns) == 4 + 7
    progress = add_published(progress, [Snapshot("b", 20, "final")])
    turns, swaps, _, end = play(sft, progress=progress)
    assert end == "end" and swaps[0][0] == "b"


@given(
    st.integers(0, 60),
    st.lists(st.integers(1, 19), unique=True, max_size=4).map(sorted),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
)
def test_stopping_and_resuming_anywhere_changes_nothing(cut, triggers, ratio):
    schedule = Schedule(ALL, interleave=ratio)
    whole, _, end, _ = play(schedule, triggers)
    progress = Progress()
    turns = []
    for _ in range(len(whole)):
        if len(turns) == cut:  # as at a resume: the same progress from a checkpoint
            progress = Progress(**{f: getattr(progress, f) for f in progress.__dataclass_fields__})
        turn = schedule.next_turn(progress)
        turns.append((turn.stage.name, turn.step))
        progress = schedule.advance(progress, turn)
        at = progress.pretrain
        cause = schedule.publishes_at(at) or ("drift" if at in triggers else None)
        if turn.stage.branch == "pretrain" and cause:
            progress = add_published(progress, [Snapshot(f"s{at}", at, cause)])
    assert turns == whole and progress == end


def test_monitoring_follows_the_shares():
    schedule = Schedule((replace(PRETRAIN, steps=2000),), DriftConfig(start=0.25, interval=0.005))
    marks = {s: schedule.measures_at(s) for s in range(1, 2001) if schedule.measures_at(s)}
    assert marks.pop(500) == "reference"
    assert list(marks) == list(range(510, 2001, 10)) and set(marks.values()) == {"measure"}


def test_impossible_schedules_are_refused():
    with pytest.raises(UserError, match="no stages"):
        Schedule(())
    with pytest.raises(UserError, match="two stages are called"):
        Schedule((ALIGN, ALIGN))
    with pytest.raises(UserError, match="must have one objective"):
        Schedule((PRETRAIN, replace(PRETRAIN, name="again", objective="ctc")))
    with pytest.raises(UserError, match="branch=sft"):
        Schedule((PRETRAIN,), branch="sft")
    with pytest.raises(UserError, match="encoder of pretrain step 21, but pretraining has 20"):
        Schedule((PRETRAIN, ALIGN), DriftConfig(mode="fixed", swaps=(PlannedSwap(21),)))
    with pytest.raises(UserError, match="from sft step 4 on, but the sft stages have 4 steps"):
        Schedule((PRETRAIN, ALIGN), DriftConfig(mode="fixed", swaps=(PlannedSwap(5, 4),)))


# -- other stage tables by recipe alone ------------------------------------------------------

BOTH = "{adaptor: 1.0e-5, llm: 1.0e-5}"
FOUR = f"""
- {{name: pretrain, branch: pretrain, trains: {{encoder: 5.0e-4, ctc: 5.0e-4}}, steps: 20}}
- {{name: align, branch: sft, trains: {{adaptor: 1.0e-3}}, steps: 4}}
- {{name: ia_sft, branch: sft, trains: {BOTH}, steps: 10, swaps: true, steps_after_final_swap: 3}}
- {{name: joint, branch: sft, trains: {{encoder: 1.0e-5, adaptor: 1.0e-5, llm: 1.0e-5}}, steps: 3}}
"""
FOUR_ROWS = FOUR.strip().splitlines()


def schedule_of_recipe(folder, stages: list[str], **keys) -> Schedule:
    """The schedule of a recipe file with these stages."""
    data = {"cmvn": "c", "phonemes": "p", "train": [{"name": "a", "shards": "a"}]}
    data["valid"] = [{"name": "v", "shards": "v"}]
    values = {"run": "r", "data": data, "model": {"llm": {"path": "l"}}, **keys}
    text = yaml.safe_dump(values) + "stages:\n" + "\n".join(stages) + "\n"
    (folder / "r.yaml").write_text(text)
    return recipe.load(str(folder / "r.yaml")).schedule()


def test_recipe_with_fixed_swap_steps_and_no_cka(tmp_path):
    drift = {"mode": "fixed", "swaps": [{"pretrain": 6}, {"pretrain": 12}]}
    schedule = schedule_of_recipe(tmp_path, FOUR_ROWS, drift=drift)
    assert not any(schedule.measures_at(s) for s in range(1, 21))
    # Whatever CKA is, the encoders are the planned ones.
    turns, swaps, _, end = play(schedule)
    assert end == "end" and turns.index(("align", 0)) == 6
    assert [(s[0], s[2]) for s in swaps] == [("s6", "align"), ("s12", "ia_sft"), ("s20", "ia_sft")]


def test_recipe_of_the_conventional_stages(tmp_path):
    schedule = schedule_of_recipe(tmp_path, [*FOUR_ROWS[:2], FOUR_ROWS[3]], drift={"mode": "final"})
    turns, swaps, _, end = play(schedule, triggers=())
    assert end == "end" and swaps == [("s20", 0, "align")]
    assert [t[0] for t in turns] == ["pretrain"] * 20 + ["align"] * 4 + ["joint"] * 3


def test_recipe_that_aligns_with_a_finished_encoder(tmp_path):
    # Pretraining first, then alignment and IA-SFT on its last encoder ...
    schedule = schedule_of_recipe(tmp_path, FOUR_ROWS, drift={"mode": "final"})
    turns, swaps, _, _ = play(schedule)
    assert turns[20] == ("align", 0) and swaps == [("s20", 0, "align")]
    # ... or an encoder from elsewhere and no pretraining at all.
    model = {"llm": {"path": "l"}, "encoder_from": "snapshot"}
    schedule = schedule_of_recipe(tmp_path, FOUR_ROWS[1:], model=model)
    progress = add_published(Progress(), [Snapshot("given", 0, "given")])
    turns, swaps, _, end = play(schedule, progress=progress)
    assert end == "end" and swaps == [("given", 0, "align")]
    assert [t[0] for t in turns] == ["align"] * 4 + ["ia_sft"] * 10 + ["joint"] * 3


def test_recipe_of_a_joint_stage_with_a_frozen_encoder_and_stages_after_it(tmp_path):
    frozen = f"- {{name: joint, branch: sft, trains: {BOTH}, steps: 3}}"
    every = "{encoder: 1.0e-6, adaptor: 1.0e-6, llm: 1.0e-6}"
    context = f"- {{name: context, branch: sft, trains: {every}, steps: 2}}"
    reward = f"- {{name: last, branch: sft, trains: {BOTH}, steps: 2}}"
    schedule = schedule_of_recipe(tmp_path, [*FOUR_ROWS[:3], frozen, context, reward])
    turns, swaps, _, end = play(schedule, triggers=(8,))
    names = [name for name, _ in turns]
    assert end == "end" and names[-7:] == ["joint"] * 3 + ["context"] * 2 + ["last"] * 2
    assert not schedule.stages[3].trains_sft_encoder
    # All of them use pretraining's final encoder.
    assert swaps[-1][0] == "s20" and [s[0] for s in swaps] == ["s8", "s20"]


def test_pretraining_in_several_stages():
    head = replace(PRETRAIN, name="head", trains={"ctc": 1e-3}, steps=3)
    schedule = Schedule((head, PRETRAIN, ALIGN), DriftConfig(mode="final"))
    assert schedule.pretrain == (head, PRETRAIN)
    assert schedule.pretrain_steps() == 3 + PRETRAIN.steps
    assert schedule.pretrain_stage(2) == (head, 2) and schedule.pretrain_stage(3) == (PRETRAIN, 0)
    assert schedule.next_turn(Progress(pretrain=3)).stage is PRETRAIN
    assert schedule.publishes_at(3) is None
    assert schedule.publishes_at(3 + PRETRAIN.steps) == "final"


def test_text_alone_waits_for_no_encoder():
    read = replace(ALIGN, name="read", text_share=1.0)
    turn = Schedule((read,), branch="sft").next_turn(Progress())
    assert (turn.kind, turn.load) == ("step", None)
    assert Schedule((ALIGN,), branch="sft").next_turn(Progress()).kind == "wait"
