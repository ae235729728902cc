"""The measured rate of products."""

from __future__ import annotations

from dsasr.planning.measure_rate import measure_rate


def test_the_rate_of_this_machine():
    assert measure_rate(0.01, 64) > 0
