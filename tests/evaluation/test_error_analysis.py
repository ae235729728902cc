"""Worst transcripts, confusions, groups and their sounds."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile

from dsasr.evaluation import error_analysis
from dsasr.evaluation.error_analysis import Difference, differences, duration_group
from dsasr.evaluation.results import Result, Results


def result(key, reference, hypothesis, lang="en", condition="clean", seconds=2.0):
    return Result(key, condition, lang, reference, hypothesis, seconds, 0.1, True)


def test_differences_are_unit_by_unit():
    assert differences("the cat sat down", "the hat sat down now", "en") == [
        Difference("same", "the", "the"),
        Difference("replaced", "cat", "hat"),
        Difference("same", "sat", "sat"),
        Difference("same", "down", "down"),
        Difference("added", "", "now"),
    ]
    assert differences("你好", "你", "zh")[-1] == Difference("missing", "好", "")
    assert differences("", "", "en") == []


def test_the_worst_have_the_most_errors_then_the_highest_rate():
    results = Results(
        [
            result("right", "a b c", "a b c"),
            result("long", "a b c d e f g h", "a b c d e f x y"),
            result("short", "a b", "x y"),
            result("most", "a b c d e f g h", "a b c d e"),
            result("noisy", "a b c d", "", condition="snr5"),
            result("nonspeech", None, "a b c d e f"),
        ]
    )
    worst = error_analysis.worst(results)
    assert [row.result.key for row in worst] == ["most", "short", "long"]
    assert worst[0].counts.deletions == 3 and worst[0].counts.reference == 8
    assert [row.result.key for row in error_analysis.worst(results, count=1)] == ["most"]


def test_confusions_count_pairs_over_all_utterances():
    results = Results(
        [result("1", "a b", "a c"), result("2", "b b", "c c"), result("3", "a b", "a b d"),
         result("4", "a b e", "a b")]
    )  # fmt: skip
    assert error_analysis.confusions(results) == [("b", "c", 3), ("", "d", 1), ("e", "", 1)]
    assert error_analysis.confusions(results, count=1) == [("b", "c", 3)]


@pytest.mark.parametrize(
    "seconds, name",
    [(0.5, "0 to 2 s"), (2.0, "2 to 5 s"), (19.9, "10 to 20 s"), (20.0, "20 s and more")],
)
def test_durations_have_groups(seconds, name):
    assert duration_group(result("x", "a", "a", seconds=seconds)) == name


def test_clips_are_written_whole_and_cut_at_their_limit(tmp_path):
    rate = 1000
    rng = np.random.default_rng(0)
    waves = {"a": rng.uniform(-0.5, 0.5, 500).astype(np.float32),
             "b": rng.uniform(-0.5, 0.5, 30 * rate).astype(np.float32)}  # fmt: skip
    worst = error_analysis.worst(Results([result(k, "a b", "x") for k in ("a", "b", "gone")]))
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "old.flac").write_bytes(b"")
    names = error_analysis.write_clips(tmp_path / "clips", worst, waves, rate)
    assert names == {"a": "01.flac", "b": "02.flac"}
    assert {p.name for p in (tmp_path / "clips").iterdir()} == set(names.values())
    back, of_rate = soundfile.read(tmp_path / "clips" / "01.flac", dtype="float32")
    assert of_rate == rate and back == pytest.approx(waves["a"], abs=1e-4)
    assert soundfile.info(tmp_path / "clips" / "02.flac").duration == 20.0
