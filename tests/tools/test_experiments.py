"""The experiment's recipes and its summary, on synthetic results."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dsasr import config
from dsasr.entropy_allocation.allocation_row import (
    AllocationRow,
    EncoderSource,
    Estimate,
    LlmAllocation,
)
from dsasr.evaluation.hallucination import Example
from dsasr.recipe import Recipe
from dsasr.schedule import Progress, Snapshot, add_published
from dsasr.utils.errors import UserError

FOLDER = Path(__file__).parent.parent.parent / "tools" / "experiments"


@pytest.fixture(scope="module")
def experiment():
    """The modules systems and summary."""
    sys.path.insert(0, str(FOLDER))
    try:
        import summary
        import systems

        yield systems, summary
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def reproduce(experiment):
    import reproduce

    return reproduce


def small(systems):
    return systems.Sizes(pretrain=200, align=5, sft=60, joint=10, final=20)


def paths(*names: str) -> tuple[Path, ...]:
    return tuple(map(Path, names))


def test_every_recipe_is_sound_and_makes_the_same_steps(experiment):
    systems, _ = experiment
    for kind, sizes in (*systems.SIZES.items(), ("synth", systems.SHORT)):
        for variant in systems.PRETRAININGS:
            values = systems.pretraining(variant, kind, sizes, 3, *paths("corpus", "run"))
            recipe = config.build(Recipe, values)
            (stage,) = recipe.schedule().pretrain
            assert (recipe.branch, recipe.seed, stage.steps) == ("pretrain", 3, sizes.pretrain)
            # The same frames go through the encoder, in one view or two.
            assert stage.batch.frames * variant.views == sizes.frames
            assert (stage.objective == "cr_ctc") == (variant.views == 2)
        for system in systems.SYSTEMS:
            folders = paths("corpus", "run", "store")
            published = [10, sizes.pretrain]
            values = systems.sft(systems.trained(system), kind, sizes, 3, *folders, published)
            recipe = config.build(Recipe, values)
            stages = {s.name: s for s in recipe.stages}
            assert recipe.branch == "sft" and recipe.store.path == "store"
            after_align = sum(s.steps for n, s in stages.items() if n in ("ia_sft", "joint"))
            assert after_align == sizes.sft + sizes.joint
            # An sft job must accept the pretraining's encoders.
            pre = systems.pretraining(system.pretraining, kind, sizes, 3, *paths("corpus", "run"))
            expected = config.build(Recipe, pre).encoder_fingerprint()
            assert recipe.encoder_fingerprint() == expected
        values = systems.aligner(kind, sizes, *paths("corpus", "run"))
        recipe = config.build(Recipe, values)
        assert recipe.branch == "pretrain" and recipe.seed == 0
        assert recipe.data.phonemizer.kind != "characters"
    with pytest.raises(UserError, match="no-swap"):
        systems.named("none")


def test_systems_that_share_a_job(experiment):
    systems, _ = experiment
    shared = {s.name: systems.trained(s).name for s in systems.SYSTEMS}
    assert shared.pop("no-joint") == "paper"
    assert all(name == job for name, job in shared.items())
    assert systems.before_joint(small(systems)) == 65


def loaded_encoders(schedule, published) -> list[tuple[int, str, int]]:
    """(sft step, stage, pretrain step) of each encoder that an sft job loads."""
    loaded, progress = [], add_published(Progress(), published)
    while (turn := schedule.next_turn(progress)).kind == "step":
        if turn.load is not None:
            loaded.append((progress.sft, turn.stage.name, turn.load.pretrain))
        progress = schedule.advance(progress, turn)
    assert turn.kind == "end"
    return loaded


def test_when_each_system_loads_which_encoder(experiment):
    systems, _ = experiment
    steps = [120, 150, 200]
    published = [Snapshot(str(p), p, "final" if p == 200 else "drift") for p in steps]

    def swaps(name):
        folders = paths("corpus", "run", "store")
        values = systems.sft(systems.named(name), "synth", small(systems), 1, *folders, steps)
        return loaded_encoders(config.build(Recipe, values).schedule(), published)

    # 30 pretrain steps after the first encoder the second one is there; the final one after 80,
    # but the last 20 steps of IA-SFT (from 5 + 40 on) wait for it.
    assert swaps("paper") == [(0, "align", 120), (30, "ia_sft", 150), (65, "joint", 200)]
    assert swaps("no-swap") == [(0, "align", 120), (65, "joint", 200)]
    # One after the other: pretraining is over before anything else begins.
    for name in ("conventional", "phoneme", "late-joint"):
        assert swaps(name) == [(0, "align", 200)]


def result(system: str, label: str, seed: int, rate: float, loud: int) -> dict:
    rng = np.random.default_rng([seed, int(100 * rate)])
    clips = {}
    for condition, factor in (("clean", 1), ("snr5", 3), ("snr0", 4)):
        errors = rng.binomial(10, min(1, factor * rate), 60).tolist()
        clips[condition] = {"lang": ["en", "zh"] * 30, "errors": errors, "units": [10] * 60,
                            "flagged": [int(e > 5) for e in errors]}  # fmt: skip
    clips["cut50"] = {"lang": ["en", "zh"] * 30, "flagged": [1] * 6 + [0] * 54}
    clips["white"] = {"lang": ["en"] * 4, "characters": [loud] * 4, "seconds": [30.0] * 4}
    gain = Estimate(2.0, 1.9, 2.1, 4.0, 2.0, shuffled=0.001 * seed)
    none = Estimate(0.0, 0.0, 0.0, 4.0, 4.0, shuffled=0.0, detection_limit=0.012)
    csai = none if system == "paper" else replace(gain, value=0.3)
    llm = LlmAllocation(nll_without_audio=2.0, nll_with_audio=0.5)
    row = AllocationRow(EncoderSource("x", "checkpoint"), nse=0.5, pai=gain, csai=csai, llm=llm)
    random = replace(row, nse=0.2, pai=replace(gain, value=0.7 + 0.1 * seed), csai=none, llm=None)
    after = replace(row, cka_to_reference=0.9, reference="x")
    return {
        "set": "synth", "system": system, "label": label, "seed": seed, "clips": clips,
        "random": random.to_json(), "before": row.to_json(), "after": after.to_json(),
        "audio_hours": 12.0,
        "train_seconds": 600.0, "sizes": {"pretrain": 100}, "ctc": 0.5,
    }  # fmt: skip


@pytest.fixture
def results(tmp_path, experiment) -> Path:
    systems, _ = experiment
    (tmp_path / "synth").mkdir()
    for name, rate, loud in (("conventional", 0.2, 100), ("paper", 0.05, 10)):
        for seed in (1, 2, 3):
            values = result(name, systems.named(name).label, seed, rate, loud)
            (tmp_path / "synth" / f"{name}-seed{seed}.json").write_text(json.dumps(values))
    return tmp_path


def test_ratios_and_their_intervals(results, experiment):
    import resampling

    _, summary = experiment
    by_system = summary.load(results / "synth")
    assert list(by_system) == ["conventional", "paper"]
    one, two = (summary.errors(by_system[n], ["clean"]) for n in ("conventional", "paper"))
    assert one[0].shape == (3, 60)
    assert summary.value(one) == pytest.approx(one[0].sum() / 1800)
    low, high = resampling.interval(one)
    assert low < summary.value(one) < high and high - low < 0.1
    only = summary.errors(by_system["paper"], ["clean"], "zh")
    assert only[0].shape == (3, 30)
    # An utterance at two SNRs is one draw: repeated clips do not narrow the interval.
    pooled = summary.errors(by_system["paper"], ["clean", "clean"])
    assert pooled[0].shape == (3, 60)
    assert resampling.interval(pooled) == pytest.approx(resampling.interval(two))
    flags = summary.hallucinated(by_system["paper"], ["snr5", "snr0"])
    assert flags[0].shape == (3, 60) and (flags[1] == 2).all()
    # 100 characters in 30 s of each clip.
    assert summary.value(summary.nonspeech_rate(by_system["conventional"])) == pytest.approx(200)
    gap, low, high, p = summary.paired(one, two)
    assert low < gap < high < 0 and p < 0.01
    assert summary.paired(one, one)[0] == 0 and summary.paired(one, one)[3] == 1.0
    # Nothing hallucinated in 60 utterances: Wilson's upper end, not zero.
    none = np.zeros((3, 60)), np.ones((3, 60))
    assert summary.span(none, share=True) == pytest.approx((0, 0.0602), abs=1e-4)
    with pytest.raises(ValueError, match="no pairs"):
        summary.paired(one, only)


def test_intervals_cover_other_seeds_too(experiment):
    # Two systems of the same mean; seeds differ by 30%, clips too. Three seeds: a bootstrap over
    # seeds covered zero in 80% of such trials.
    from resampling import over_seeds, paired

    rng, pairs = np.random.default_rng(5), []
    for _ in range(100):
        hard = rng.gamma(1, 0.1, 100)
        sides = []
        for _ in range(2):
            luck = np.exp(0.3 * rng.standard_normal((3, 1)))
            errors = rng.binomial(10, np.clip(hard * luck, 0, 1)).astype(float)
            sides.append((errors, np.full((3, 100), 10.0)))
        pairs.append(paired(*sides)[:3])
    gap, low, high = np.array(pairs).T
    assert np.sum((low <= 0) & (high >= 0)) >= 91
    # Student's t of so few seeds is wide (4.3 or 2.8 instead of 2), but not without end.
    assert np.median(high - low) < 3 * (2 * 1.96 * gap.std())
    mean, half, p = over_seeds([1.0, 2.0, 3.0])  # t = 3.464 with 2 degrees: tables say p = 0.0742
    assert (mean, half, p) == pytest.approx((2, 4.3027 / 3**0.5, 0.0742), abs=1e-3)
    assert over_seeds([0.4])[0] == 0.4 and np.isnan(over_seeds([0.4])[1:]).all()


def test_table_and_figure(results, experiment):
    systems, _ = experiment
    # One seed more of a third system, which skips joint SFT; a system that has it in one seed.
    for name in ("no-joint", "phoneme"):
        values = result(name, systems.named(name).label, 2, 0.06, 10)
        (results / "synth" / f"{name}-seed2.json").write_text(json.dumps(values))
    command = [sys.executable, str(FOLDER / "summary.py"), "--results", str(results)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = (results / "synth.md").read_text()
    assert "| 1 character CTC, joint SFT | 3 |" in text and "| conventional, paper | 3 |" in text
    assert "| 4b the paper's, no joint SFT | 1 |" in text and "| no-joint, paper | 1 |" in text
    assert "| cut at 50% |" in text and "| 10.0 (" in text
    assert (
        "Controls, nats/frame: PAI 0.00 (0.00–0.00) with shuffled labels, 0.90 (0.80–1.00)" in text
    )
    assert "these CSAI have no control of phonemes alone" in text
    assert "| none found (< 0.012) |" in text and "| 0.300 → 0.300 (+0.000 ± 0.000) |" in text
    widths = [line.count("|") for line in text.splitlines() if line.startswith("|")]
    assert len(set(widths)) > 1 and min(widths) > 3
    assert (results / "synth.png").stat().st_size > 20_000
    short = (results / "short.md").read_text()
    rows = [line for line in short.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 4 and {row.count("|") for row in rows} == {7}
    assert "errors at 5 dB" in rows[0] and "hallucinated at 0 dB" in rows[0]
    assert "over seeds and clips, with one seed over clips alone" in short
    assert "(3 seeds)" in rows[2] and "(1 seed)" in rows[-1]
    drifts = {row.split(" | ")[0].strip("| "): row.split(" | ")[-1].strip("| ") for row in rows}
    assert drifts["1 character CTC, joint SFT (3 seeds)"] == "0.900 (0.900–0.900)"
    assert drifts["4b the paper's, no joint SFT (1 seed)"] == "–"
    empty = [*command[:-1], str(results / "none")]
    assert subprocess.run(empty, capture_output=True).returncode == 2


def test_the_figure_shows_whole_intervals_and_what_was_not_found(results, experiment, monkeypatch):
    import drawing
    import measured

    # Of an axis to an interval's end, in percent, and whether it is cut there.
    assert drawing.highest_shown(6.0, 1.7, True) == (pytest.approx(6.3), False)
    assert drawing.highest_shown(150.0, 105.0, False) == (pytest.approx(157.5), False)
    assert drawing.highest_shown(900.0, 105.0, False) == (pytest.approx(330.75), True)
    assert drawing.highest_shown(0.0, 0.0, True) == (1.0, False)

    drawn = []
    monkeypatch.setattr(drawing.figures, "save", lambda figure, path: drawn.append(figure))
    drawing.draw(measured.load(results / "synth"), results / "synth.png")
    errors, hallucinated, *_, csai, _ = drawn[0].axes
    for axis in (errors, hallucinated):
        ends = [y for bars in axis.collections for seg in bars.get_segments() for y in seg[:, 1]]
        assert axis.get_ylim()[0] < min(ends) and max(ends) < axis.get_ylim()[1]
    # No CSAI of the second system is detected: crosses for its three seeds, before and after.
    assert [line.get_marker() for line in csai.get_lines()].count("x") == 6
    assert [line.get_marker() for line in csai.get_lines()].count("o") == 6
    assert csai.get_title(loc="left").splitlines()[1:] == [
        "(a pair per seed; open: before joint SFT;",
        "×: not above 0 and its controls;",
        "not against phonemes alone: no sign of words)",
    ]


def test_results_of_other_test_sets_or_sizes_are_not_mixed(results, experiment):
    _, summary = experiment
    path = results / "synth" / "paper-seed3.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"sizes": {"pretrain": 200}}))
    with pytest.raises(UserError, match="mixes sizes"):
        summary.load(results / "synth")
    values["clips"]["white"]["lang"] = ["en"]
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match="mixes test sets"):
        summary.load(results / "synth")


def test_a_finished_job_of_another_recipe_is_refused(reproduce, experiment, tmp_path):
    systems, _ = experiment
    folders = tmp_path / "corpus", tmp_path / "run"
    sizes = small(systems)
    values = systems.pretraining(systems.PHONEMES, "synth", sizes, 1, *folders)
    folder = tmp_path / "run" / "pretrain"
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(config.dump(config.build(Recipe, values)))
    (folder / "events.jsonl").write_text('{"event": "finished"}\n')
    assert reproduce.train(values, 1) == folder
    longer = replace(sizes, pretrain=300)
    values = systems.pretraining(systems.PHONEMES, "synth", longer, 1, *folders)
    with pytest.raises(UserError, match="trained with other stages: delete it"):
        reproduce.train(values, 1)


def test_examples_are_of_every_kind(reproduce):
    def example(kind, condition, lang, number):
        return Example(kind, lang, condition, str(number), "", "", "")

    many = [example("nonspeech", "white", "und", i) for i in range(30)]
    many += [example("loop", "snr0", lang, i) for lang in ("en", "zh") for i in range(2)]
    selected = reproduce.varied(many, 6)
    assert [(e.kind, e.lang, e.key) for e in selected] == [
        ("nonspeech", "und", "0"), ("loop", "en", "0"), ("loop", "zh", "0"),
        ("nonspeech", "und", "1"), ("loop", "en", "1"), ("loop", "zh", "1"),
    ]  # fmt: skip
    assert len(reproduce.varied(many, 100)) == 34


def test_the_table_of_encoders_says_where_csai_clears_its_controls(experiment):
    import encoders

    def row(name: str, seed: int, low: float, alone: float) -> dict:
        pai = Estimate(value=3.0, low=2.9, high=3.1, shuffled=0.001)
        csai = Estimate(value=0.05, low=low, high=0.06, shuffled=0.002, phoneme_only=alone)
        source = EncoderSource("x", "snapshot")
        values = AllocationRow(encoder=source, pai=pai, csai=csai).to_json()
        return {"encoder": name, "seed": seed, "row": values}

    rows = [row("b", 1, 0.04, 0.01), row("a", 2, 0.04, 0.045), row("a", 1, 0.04, 0.039)]
    header, _, *lines = encoders.table(rows).splitlines()
    assert header.startswith("| encoder | seed | PAI |")
    assert [line.split(" | ")[:2] for line in lines] == [["| a", "1"], ["| a", "2"], ["| b", "1"]]
    assert [line.split(" | ")[-1] for line in lines] == ["yes |", "no |", "yes |"]
    assert "3.000 (2.900 to 3.100) | 0.001 | 0.050 (0.040 to 0.060) | 0.002 | 0.039" in lines[0]


def test_less_speech_and_less_text_are_parts_of_more(reproduce, tmp_path):
    import speech_and_text

    rows = [{"id": i, "duration": 3.0 + i % 5} for i in range(200)]
    some = [speech_and_text.some_speech(rows, minutes) for minutes in (2, 5, 1000)]
    seconds = [sum(row["duration"] for row in part) for part in some]
    assert 120 <= seconds[0] < 127 and 300 <= seconds[1] < 307
    assert some[1][: len(some[0])] == some[0] and some[2][: len(some[1])] == some[1]
    assert sorted(row["id"] for row in some[2]) == list(range(200))

    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {i}\n\n" for i in range(50)))
    few, many = (speech_and_text.some_lines(path, count) for count in (10, 1000))
    assert len(few) == 10 and few == many[:10] and len(set(many)) == 50


def test_without_text_a_point_of_the_curve_has_speech_alone(reproduce):
    import speech_and_text

    def stages(branch: str, lines: int) -> dict[str, dict]:
        args = SimpleNamespace(sft_share=0.5, tune_steps=7)
        return {s["name"]: s for s in speech_and_text.stages(branch, lines, args)}

    alone, both = stages("sft", 0), stages("sft", 1000)
    assert list(both) == ["read", *alone] and both["read"]["steps"] == 450
    assert all(both[name]["steps"] == stage["steps"] for name, stage in alone.items())
    assert all(stage["text_share"] for stage in both.values())
    assert not any("text_share" in stage for stage in alone.values())
    assert stages("pretrain", 0)["tune"]["steps"] == 7
