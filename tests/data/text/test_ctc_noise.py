"""Errors drawn from a CTC head's confusions."""

from __future__ import annotations

import json

import numpy as np
import pytest

from dsasr.data.text.ctc_noise import Confusions, CtcNoise
from dsasr.utils.errors import UserError

UNITS = ("<blk>", "a", "b", "c")


def test_counts_of_an_alignment_by_hand():
    confusions = Confusions.empty(UNITS)
    confusions.add([1, 2, 3], [1, 3, 3])  # b written as c
    confusions.add([1, 2], [2])  # a left out
    confusions.add([3], [3, 1])  # an a inserted after c
    expected = np.zeros((4, 4))
    expected[1, 1] = expected[2, 3] = expected[1, 0] = expected[2, 2] = expected[0, 1] = 1
    expected[3, 3] = 2
    assert (confusions.written_PP == expected).all() and confusions.gaps == 4 + 3 + 2
    assert confusions.rates == pytest.approx(
        {"substitutions": 1 / 6, "deletions": 1 / 6, "insertions": 1 / 6}
    )


def test_drawn_errors_have_the_rates_that_were_counted():
    confusions = Confusions.uniform(UNITS, 0.2, 0.1, 0.05)
    assert confusions.rates == pytest.approx(
        {"substitutions": 0.2, "deletions": 0.1, "insertions": 0.05}
    )
    noise, rng = CtcNoise(confusions, prior=0.0), np.random.default_rng(0)
    alone = [noise.write([1], rng) for _ in range(20_000)]
    deleted = np.mean([written == [] for written in alone])
    kept = np.mean([written == [1] for written in alone])
    geometric = 1 - 0.05 / 1.05  # nothing inserted in a gap
    assert deleted == pytest.approx(0.1 * geometric**2, abs=0.006)
    assert kept == pytest.approx(0.7 * geometric**2, abs=0.01)
    assert {written[0] for written in alone if len(written) == 1} == {1, 2, 3}


def test_no_errors_change_nothing():
    noise = CtcNoise(Confusions.uniform(UNITS, 0.0, 0.0, 0.0))
    assert noise.write([1, 1, 2, 3], np.random.default_rng(0)) == [1, 1, 2, 3]
    # A unit that was never seen is written as it is.
    noise = CtcNoise(Confusions.empty(UNITS))
    assert noise.write([3, 1], np.random.default_rng(0)) == [3, 1]


def test_a_file_comes_back_and_other_units_are_refused(tmp_path):
    confusions = Confusions.empty(UNITS)
    confusions.add([1, 2, 3], [1, 3, 3])
    confusions.save(tmp_path / "c.json")
    loaded = Confusions.load(tmp_path / "c.json", UNITS)
    assert (loaded.written_PP == confusions.written_PP).all() and loaded.gaps == confusions.gaps
    with pytest.raises(UserError, match="other units"):
        Confusions.load(tmp_path / "c.json", UNITS[:-1])
    (tmp_path / "d.json").write_text("[]")
    with pytest.raises(UserError, match="dsasr data confusions"):
        Confusions.load(tmp_path / "d.json", UNITS)


@pytest.mark.parametrize(
    "change",
    [{"written": [[1]]}, {"written": "x"}, {"gaps": None}, {"units": 3}, {"written": None}],
)
def test_a_damaged_file_is_one_line(tmp_path, change):
    path = tmp_path / "confusions.json"
    Confusions.empty(UNITS).save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=r"confusions\.json is damaged; make it with") as caught:
        Confusions.load(path, UNITS)
    assert "\n" not in str(caught.value)
