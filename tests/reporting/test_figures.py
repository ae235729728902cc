"""The report's figures of synthetic runs."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

from dsasr.entropy_allocation.allocation_row import Estimate
from dsasr.reporting import course_figures, figures


def test_many_runs_have_one_key_and_no_overlapping_names(made, tmp_path, monkeypatch):
    """Names over bars and of systems do not overlap, nor does the key overlap the figures."""
    drawn = []
    for module in (figures, course_figures):
        monkeypatch.setattr(module, "save", lambda figure, path: drawn.append(figure) or path)
    many = [made.run(f"paper-without-{i}") for i in range(6)]
    for draw in (figures.joint, course_figures.over_training, course_figures.against_time):
        assert draw(many, tmp_path / "x.png")
    for figure in drawn:
        figure.canvas.draw()
        [key] = figure.legends
        assert all(axis.get_legend() is None for axis in figure.axes)
        box = key.get_window_extent()
        assert not any(axis.get_window_extent().overlaps(box) for axis in figure.axes)
        assert box.x1 <= figure.bbox.x1
        for axis in figure.axes:
            low, high = axis.get_window_extent().intervalx
            names = [t for t in axis.get_xticklabels() if t.get_text()]
            if names and names[0].get_rotation() == 0:
                boxes = [t.get_window_extent().intervalx for t in names]
                boxes = [(a, b) for a, b in boxes if low - 1 <= (a + b) / 2 <= high + 1]
                assert all(a[1] < b[0] for a, b in itertools.pairwise(boxes))
    assert len(drawn) == 3 and len(drawn[0].axes) == 3


def test_an_estimate_that_is_not_detected_says_so(made, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.append(figure) or path)

    estimate = Estimate(0.4, 0.3, 0.5, 0.8, 0.4)
    none = Estimate(0.0, 0.0, 0.0, 0.8, 0.8, detection_limit=0.012)
    snapshot = made.row("first/encoder-100", "snapshot", 0.4)
    checkpoint = made.row(
        "first/step-210", "checkpoint", 0.4, stage="joint", snapshot="encoder-100"
    )
    rows = [
        replace(snapshot, pai=estimate, csai=estimate),
        replace(checkpoint, pai=estimate, csai=none),
    ]
    assert figures.joint([made.run(checkpoints=rows)], tmp_path / "x.png")
    assert figures.allocation([made.run(checkpoints=rows)], tmp_path / "x.png")
    csai = drawn[0].axes[2]
    assert [t.get_text() for t in csai.texts if t.get_text()] == ["none found (< 0.012)"]
    heights = [bar.get_height() for bar in csai.patches]
    assert heights[0] == 0.4 and math.isnan(heights[1])
    labels = [t.get_text() for t in drawn[1].axes[0].texts]
    assert labels == ["50%", "50%", "50%", "none found (< 0.012 nats a frame)"]


def bands(figure):
    """The shaded intervals of each panel."""
    return [len(axis.collections) for axis in figure.axes]


def test_intervals_are_drawn_for_enough_utterances_only(made, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(course_figures, "save", lambda figure, path: drawn.append(figure) or path)
    for count in (4, 8):
        run = made.run()
        for line in run.metrics:
            if line["stage"].startswith("allocation_"):
                line["probe_utterances"] = count
            if line["stage"].startswith("valid_"):
                line["hallucination/utterances"] = count
        course_figures.over_training([run], tmp_path / "x.png")
        course_figures.against_time([run], tmp_path / "x.png")
    few, few_errors, enough, enough_errors = map(bands, drawn)
    assert few == [0, 0, 0] and enough == [0, 2, 2]  # NSE has none; a band for each branch
    assert few_errors == [0, 0, 0] and enough_errors == [0, 1, 0]


def test_an_interval_of_a_single_point_is_an_error_bar(made, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(course_figures, "save", lambda figure, path: drawn.append(figure) or path)
    run = made.run()
    run.metrics = [m for m in run.metrics if m["stage"] != "valid_joint"]
    [line] = run.validation
    line |= {"wer_low": 0.7, "wer_high": 0.9, "hallucination/flagged": 0.0}
    course_figures.against_time([run], tmp_path / "x.png")
    errors, hallucinated, _ = drawn[0].axes
    [bar] = errors.collections
    [((_, low), (_, high))] = bar.get_segments()
    assert (round(low, 6), round(high, 6)) == (70, 90)
    # A curve at 0 lies above the axis.
    assert list(hallucinated.get_lines()[0].get_ydata()) == [0]
    assert hallucinated.get_ylim()[0] < 0


def test_cka_is_a_line_for_each_reference(made, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.append(figure) or path)
    run = made.run()
    run.events[2:2] = [{"event": "drift", "pretrain": 30, "cka": 0.97, "steps": 30, "seconds": 60}]
    run.events.sort(key=lambda e: e["steps"])
    run.events += [
        {"event": "drift", "pretrain": s, "cka": 0.99, "steps": s + 50, "seconds": 300}
        for s in (60, 80)
    ]
    # The last encoder is published without a measurement.
    run.events.append({"event": "published", "snapshot": "encoder-100", "cause": "final",
                       "pretrain": 100, "steps": 150, "seconds": 300})  # fmt: skip
    figures.cka([run], tmp_path / "x.png")
    before, after, measured, final = drawn[0].axes[0].get_lines()[:4]
    assert list(before.get_xdata()) == [30, 40] and list(after.get_xdata()) == [60, 80]
    assert list(measured.get_xdata()) == [40] and list(final.get_xdata()) == [100]


def test_health_shows_each_branch_in_its_unit(made, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(course_figures, "save", lambda figure, path: drawn.append(figure) or path)
    run = made.run()
    for line in run.trained:
        line |= {"memory_bytes": 2.5e9, "grad_norm": 0.5}
    run.metrics.append({**run.trained[-1], "branch": "sft", "stage": "align", "seconds": 90.0})
    course_figures.health([run], tmp_path / "x.png")
    norm, speed, memory = drawn[0].axes
    assert norm.get_yscale() == "log"
    assert [line.get_linestyle() for line in memory.get_lines()][:2] == ["-", "--"]
    assert set(memory.get_lines()[0].get_ydata()) == {2.5}
    assert set(speed.get_lines()[0].get_ydata()) == {360.0}
