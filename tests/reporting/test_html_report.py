"""The report's figures and page of synthetic runs, and how a browser renders it."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
import subprocess
import types
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from dsasr import config, recipe
from dsasr.entropy_allocation.allocation_row import (
    AllocationRow,
    EncoderSource,
    Estimate,
    LlmAllocation,
)
from dsasr.evaluation.hallucination import wilson
from dsasr.reporting import figures, html_report, run_data
from dsasr.reporting.run_data import RunData
from dsasr.stages import DriftConfig, Schedule, StageConfig
from dsasr.tracking import timeline_plot
from dsasr.tracking.monitor import add_images
from dsasr.utils.errors import UserError


def schedule() -> Schedule:
    both = {"adaptor": 1e-3, "llm": 1e-3}
    return Schedule(
        (
            StageConfig("pretrain", "pretrain", {"encoder": 1e-3, "ctc": 1e-3}, 100),
            StageConfig("align", "sft", {"adaptor": 1e-3}, 10),
            StageConfig("ia_sft", "sft", both, 80, swaps=True, steps_after_final_swap=20),
            StageConfig("joint", "sft", {"encoder": 1e-5, **both}, 20),
        ),
        DriftConfig(start=0.3, interval=0.1, threshold=0.95),
    )


def online(steps, branch, stage, **figures) -> dict:
    """A metrics line of the online probe."""
    row = AllocationRow(
        EncoderSource("x", "live"), nse=0.4 + steps / 1000, effective_rank=9.0, **figures
    )
    head = {"steps": steps, "branch": branch, "stage": f"allocation_{stage}"}
    return head | {"seconds": 2.0 * steps, **row.scalars()}


def probes(pai, csai) -> dict[str, Estimate]:
    values = {"pai": pai, "csai": csai}
    return {name: Estimate(v, v - 0.1, v + 0.1, 4.0, 4.0 - v) for name, v in values.items()}


def run(name="first", **fields) -> RunData:
    events = [
        {"event": "stage", "name": "pretrain", "branch": "pretrain", "steps": 0, "seconds": 0},
        {"event": "drift", "pretrain": 40, "cka": 0.9, "steps": 40, "seconds": 80},
        {"event": "published", "snapshot": "encoder-40", "cause": "drift", "pretrain": 40,
         "cka": 0.9, "steps": 40, "seconds": 80},
        {"event": "stage", "name": "align", "branch": "sft", "steps": 40, "seconds": 80},
        {"event": "swap", "snapshot": "encoder-40", "cause": "drift", "stage": "align",
         "pretrain": 40, "steps": 40, "seconds": 80},
        {"event": "stage_end", "name": "align", "steps": 50, "stage_seconds": 20, "seconds": 100},
        {"event": "stage", "name": "ia_sft", "branch": "sft", "steps": 50, "seconds": 100},
        {"event": "stage_end", "name": "pretrain", "steps": 150, "stage_seconds": 200,
         "seconds": 300},
        {"event": "stage_end", "name": "ia_sft", "steps": 190, "stage_seconds": 160,
         "seconds": 380},
        {"event": "stage", "name": "joint", "branch": "sft", "steps": 190, "seconds": 380},
        {"event": "stage_end", "name": "joint", "steps": 210, "stage_seconds": 40,
         "seconds": 420},
    ]  # fmt: skip
    rates = {"audio_hours_per_hour": 360.0, "step_seconds": 2.0}
    metrics = [
        {"steps": s, "branch": "pretrain", "stage": "pretrain", "step": s, "seconds": 2.0 * s,
         "ctc": 5 - s / 40, **rates}
        for s in (20, 50, 100)
    ]  # fmt: skip
    metrics += [
        {"steps": 40, "branch": "pretrain", "stage": "drift", "seconds": 80.0, "cka": 0.9,
         "cka_threshold": 0.95},
        online(40, "pretrain", "pretrain", **probes(1.0, 0.1)),
        online(150, "pretrain", "pretrain", **probes(2.0, 0.2)),
        online(190, "sft", "ia_sft", llm=LlmAllocation(2.0, 0.4), **probes(2.0, 0.2)),
        online(210, "sft", "joint", llm=LlmAllocation(2.0, 2.3), cka_to_reference=0.98,
               **probes(-0.1, 0.3)),
    ]  # fmt: skip
    metrics += [
        {"steps": s, "branch": "sft", "stage": f"valid_{stage}", "seconds": 2.0 * s, "wer": w,
         "cer": w / 2, "hallucination/flagged": w / 10, "hallucination/characters_per_minute": 60}
        for s, stage, w in ((100, "ia_sft", 0.8), (210, "joint", 0.3))
    ]  # fmt: skip
    return RunData(name, events, metrics, schedule=schedule(), **fields)


def rated(rate):
    counts = {"substitutions": 1, "deletions": 0, "insertions": 0, "units": 10, "utterances": 3}
    return {"rate": rate, "low": rate - 0.02, "high": rate + 0.03, **counts}


def suite() -> dict:
    """A report.json."""
    languages = {"languages": {"en": rated(0.1) | {"unit": "word"}}}
    base = {"lang": "en", "characters": 0, "seconds": 0.0}
    rows = [
        {**base, "condition": "clean", "utterances": 100, "flagged": 1, "clips": 0},
        {**base, "condition": "snr5", "utterances": 100, "flagged": 9, "clips": 0},
        {**base, "condition": "white", "utterances": 0, "flagged": 0, "clips": 4,
         "seconds": 120.0, "characters": 50},
    ]  # fmt: skip
    example = {"kind": "loop", "lang": "en", "condition": "snr5", "key": "k", "detail": "",
               "reference": "a <b> c", "hypothesis": "a a a a a"}  # fmt: skip
    conditions = {"clean": rated(0.1) | languages, "snr5": rated(0.5) | languages}
    return {"conditions": conditions, "hallucination": {"rows": rows, "examples": [example]}}


class Page(HTMLParser):
    """Open tags, text, and the resources that a page fetches."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.text, self.fetched = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        self.fetched += [v for k, v in attrs if k in ("src", "href") and v]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_whole_and_needs_no_network(tmp_path):
    page = html_report.write([run(suite=suite()), run("second")], tmp_path)
    text = page.read_text()
    parsed = Page(text)
    assert not parsed.open and parsed.fetched
    assert all(x.startswith("data:image/png;base64,") for x in parsed.fetched)
    assert not re.search(r"https?://", text)
    shown = " ".join(" ".join(parsed.text).split())
    assert '<th colspan="2">errors, %</th>' in text  # en and 5 dB
    for part in ("10.0", "8.0…13.0", "50.0", "a <b> c", "Before and after", "Who resolves"):
        assert part in shown
    # 50 characters in 120 s, 1 of 100, 9 of 100; 100 steps of 2 s at 360 h/h.
    assert "25.0" in shown and "9.0" in shown and "20.0" in shown
    assert "en WER, clean" in shown and "by dsasr evaluate … --suite --report: second." in shown
    names = {p.name for p in tmp_path.glob("*.png")}
    assert names == {"timeline-first.png", "timeline-second.png", "cka.png", "metrics.png",
                     "joint.png", "allocation.png", "training.png"}  # fmt: skip
    for path in tmp_path.glob("*.png"):
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 5000


def test_foreign_text_is_neither_markup_nor_a_formula(tmp_path):
    """A run folder of others: its names, stages, languages and transcripts are shown as text."""
    evil = r"<script>alert(1)</script>$\q$"
    results = suite()
    results["conditions"][evil] = rated(0.2)
    results["conditions"]["clean"]["languages"][evil] = rated(0.1) | {"unit": "word"}
    example = results["hallucination"]["examples"][0]
    for key in ("kind", "detail", "reference", "hypothesis", "condition"):
        example[key] = evil
    one = run(evil, suite=results)
    events = [{**e, "name": evil} if e.get("name") == "align" else e for e in one.events]
    events += [{**e, "cause": evil} for e in events if e["event"] == "swap"]
    page = html_report.write([replace(one, events=events), run("second")], tmp_path).read_text()
    assert "<script" not in page and page.count("&lt;script&gt;") > 6
    timeline_plot.plot(events, tmp_path / "timeline.png", evil)


def test_a_run_that_measured_nothing_gets_its_timeline_only(tmp_path):
    bare = run("bare")
    bare.metrics = [m for m in bare.metrics if m["stage"] == "pretrain"]
    assert list(html_report.draw([bare], tmp_path)) == ["Course of bare"]
    page = html_report.write([bare], tmp_path).read_text()
    assert "dsasr evaluate" in page
    # Missing figures are listed, with the command that measures them.
    missing = page.partition("<h2>Not measured</h2>")[2]
    assert all(title in missing for title in html_report.MEASURED_BY)
    assert (
        "Not measured" not in html_report.write([run(suite=suite())], tmp_path / "all").read_text()
    )


def test_text_has_one_size_in_all_figures(tmp_path):
    text = html_report.write([run()], tmp_path).read_text()
    widths = [int(x) for x in re.findall(r'<img alt="[^"]*" width="(\d+)"', text)]
    pictures = [tmp_path / f"{n}.png" for n in ("timeline-first", "cka", "metrics", "joint")]
    sizes = [int.from_bytes(p.read_bytes()[16:20], "big") for p in pictures]
    assert widths[:4] == [96 * size // figures.DPI for size in sizes] and len(set(widths)) > 1


def test_many_runs_have_one_key_and_no_overlapping_names(tmp_path, monkeypatch):
    """Names over bars and of systems do not overlap, nor does the key overlap the figures."""
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.append(figure) or path)
    many = [run(f"paper-without-{i}") for i in range(6)]
    for draw in (figures.joint, figures.over_training, figures.against_time):
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


def row(name, kind, value, settings=None, **source) -> AllocationRow:
    """A row of allocation.jsonl."""
    estimate = Estimate(value, value, value, 2 * value, value)
    run = f"runs/{name.partition('/')[0]}"
    return AllocationRow(
        EncoderSource(name, kind, run=run, **source), nse=0.5, pai=estimate, csai=estimate,
        settings=settings or {},
    )  # fmt: skip


def values(pair) -> tuple[float, ...]:
    return tuple(row.pai.value for row in pair)


def test_before_and_after_joint_prefers_measured_checkpoints():
    before, after = run_data.before_and_after(run())
    assert before.encoder.stage == "ia_sft" and after.pai.value == -0.1

    measured = run(
        jobs=("first",),
        checkpoints=[
            row("first/encoder-40", "snapshot", 1.0),
            row("first/encoder-100", "snapshot", 2.0),
            row("first/step-210", "checkpoint", 3.0, stage="joint", snapshot="encoder-100"),
            row("other/encoder-100", "snapshot", 7.0),
            row("other/step-210", "checkpoint", 8.0, stage="joint", snapshot="encoder-100"),
            AllocationRow(EncoderSource("whisper", "pretrained", path="whisper"), nse=0.5),
        ],
    )
    assert values(run_data.before_and_after(measured)) == (2.0, 3.0)


def test_rows_of_a_later_stage_are_not_before_joint_training():
    data = run()
    data.metrics.append(online(230, "sft", "context", **probes(7.0, 0.7)))
    before, after = run_data.before_and_after(data)
    assert before.encoder.stage == "ia_sft" and after.encoder.stage == "joint"


def test_hours_are_those_of_all_steps_of_each_stage():
    data = run()
    assert run_data.audio_hours(data) == pytest.approx(360 * 2 * 100 / 3600)
    rates = {"audio_hours_per_hour": 36.0, "step_seconds": 1.0}
    data.metrics.append({"stage": "joint", "branch": "sft", "step": 50, "steps": 200, **rates})
    assert run_data.audio_hours(data) == pytest.approx(20 + 0.5)


def test_before_and_after_of_a_job_on_the_snapshots_of_another(tiny, tmp_path):
    rows = {
        "pretrain": [row("pretrain/encoder-40", "snapshot", 1.0, {"data": "test"}),
                     row("pretrain/encoder-100", "snapshot", 2.0, {"data": "test"}),
                     row("pretrain/encoder-100", "snapshot", 9.0, {"data": "other"})],
        "sft": [row("sft/step-210", "checkpoint", 3.0, {"data": "test"}, stage="joint",
                    snapshot="encoder-100")],
    }  # fmt: skip
    for branch, of_branch in rows.items():
        folder = tmp_path / "run" / branch
        folder.mkdir(parents=True)
        cfg = recipe.load(str(tiny), [f"run={tmp_path / 'run'}", f"branch={branch}"])
        (folder / "recipe.yaml").write_text(config.dump(cfg))
        logs = {n: [r for r in getattr(run(), n) if r.get("branch", branch) == branch]
                for n in ("metrics", "events")}  # fmt: skip
        for name, lines in (*logs.items(), ("allocation", [r.to_json() for r in of_branch])):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    sft = run_data.collect(tmp_path / "run" / "sft")
    assert values(run_data.before_and_after(sft)) == (2.0, 3.0)
    assert run_data.collect(tmp_path / "run" / "pretrain").publisher_rows == []
    both = run_data.collect(tmp_path / "run")
    assert values(run_data.before_and_after(both)) == (2.0, 3.0)
    assert both.jobs == ("pretrain", "sft") and len(both.checkpoints) == 4
    assert {s.branch for s in both.schedule.stages} == {"pretrain", "sft"}
    page = html_report.write([both], tmp_path / "report").read_text()
    assert "Course of run" in page and "Before and after" in page


def test_text_on_nonspeech_has_its_interval_or_says_why_not():
    hallucination = suite()["hallucination"]
    assert html_report._nonspeech_rate(hallucination) == "25.0"  # without an interval
    clips = {"rate": 25.0, "low": 3.2, "high": 61.72, "clips": 4, "clips_with_text": 2}
    hallucination["nonspeech"] = {"all": clips}
    assert html_report._nonspeech_rate(hallucination) == "25.0<small>3.2…61.7</small>"
    clips |= {"low": None, "high": None}
    assert html_report._nonspeech_rate(hallucination) == "25.0"
    clips |= {"rate": 0.0, "clips_with_text": 0}
    assert html_report._nonspeech_rate(hallucination) == "0<small>no text in 4 clips</small>"
    assert html_report._nonspeech_rate({"rows": [], "nonspeech": {}}) == "–"


def test_what_is_null_or_infinite_is_shown_as_not_measured(tmp_path, monkeypatch):
    """In the files of a run, also spelled NaN or Infinity."""
    data, report = run(), suite()
    report["conditions"]["clean"]["languages"]["zh"] = rated(math.inf) | {"unit": "char"}
    report["conditions"]["snr5"] |= dict.fromkeys(("rate", "low", "high"))
    data.metrics.append({**online(211, "sft", "joint", **probes(1.0, 0.1)), "nse": math.nan})
    data.metrics.append({**data.metrics[0], "steps": 120, "step": 120, "ctc": None})
    data.metrics.append({**data.metrics[3], "steps": 60, "cka": None})
    data.events.insert(2, {**data.events[1], "cka": None})
    estimate = {"value": 1.0, "low": None, "high": math.nan, "share": math.nan}
    source = {"name": "run/a", "run": "run", "kind": "snapshot"}
    row = {"encoder": source, "nse": None, "pai": estimate, "csai": estimate}
    for name, rows in (
        ("metrics.jsonl", data.metrics),
        ("events.jsonl", data.events),
        ("allocation.jsonl", [row]),
    ):
        (tmp_path / name).write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "report.json").write_text(json.dumps(report))
    stub = types.SimpleNamespace(schedule=schedule, store_folder=tmp_path / "snapshots")
    monkeypatch.setattr(run_data, "run_recipe", lambda folder: stub)
    collected = run_data.collect(tmp_path)
    assert len(collected.drift) == 1 and "nse" not in collected.metrics[-3]
    text = html_report.write([collected], tmp_path / "report").read_text()
    assert "<td>–</td>" in text and not re.search(
        r"\b(nan|inf|None)\b", text.split("<h2>Course")[0]
    )
    assert (tmp_path / "report" / "joint.png").is_file()
    timeline_plot.plot_run(tmp_path)


def test_an_estimate_that_is_not_detected_says_so(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.append(figure) or path)

    estimate = Estimate(0.4, 0.3, 0.5, 0.8, 0.4)
    none = Estimate(0.0, 0.0, 0.0, 0.8, 0.8, detection_limit=0.012)
    snapshot = row("first/encoder-100", "snapshot", 0.4)
    checkpoint = row("first/step-210", "checkpoint", 0.4, stage="joint", snapshot="encoder-100")
    rows = [
        replace(snapshot, pai=estimate, csai=estimate),
        replace(checkpoint, pai=estimate, csai=none),
    ]
    assert figures.joint([run(checkpoints=rows)], tmp_path / "x.png")
    assert figures.allocation([run(checkpoints=rows)], tmp_path / "x.png")
    csai = drawn[0].axes[2]
    assert [t.get_text() for t in csai.texts if t.get_text()] == ["none found (< 0.012)"]
    heights = [bar.get_height() for bar in csai.patches]
    assert heights[0] == 0.4 and math.isnan(heights[1])
    labels = [t.get_text() for t in drawn[1].axes[0].texts]
    assert labels == ["50%", "50%", "50%", "none found (< 0.012 nats a frame)"]


def test_an_allocation_file_of_another_version_is_refused(tmp_path, monkeypatch):
    for name, lines in (("metrics", run().metrics), ("allocation", [{"name": "x", "found": True}])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    stub = types.SimpleNamespace(schedule=schedule, store_folder=tmp_path / "snapshots")
    monkeypatch.setattr(run_data, "run_recipe", lambda folder: stub)
    with pytest.raises(UserError, match=r"allocation\.jsonl: .*found.*measure again"):
        run_data.collect(tmp_path)


def test_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="recipe"):
        run_data.named([tmp_path])


def test_the_figures_are_in_tensorboard_too(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    html_report.draw([run()], tmp_path / "report")
    add_images(tmp_path / "tensorboard", sorted((tmp_path / "report").glob("*.png")), 210)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"report/joint", "report/allocation", "report/cka"} <= set(events.Tags()["images"])
    assert events.Images("report/joint")[0].step == 210


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium")
def test_a_browser_renders_it(tmp_path):
    from PIL import Image

    page = html_report.write([run(suite=suite())], tmp_path / "report")
    shot = tmp_path / "shot.png"
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
               f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1100,3600",
               f"--screenshot={shot}", page.as_uri()]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    image = Image.open(shot).convert("RGB")
    assert image.size == (1100, 3600)
    colors = {color for _, color in image.getcolors(1 << 24)}
    # The figures' colors are on the page, and its background is white.
    for color in ("#3b6ea5", "#d08c2f", "#4f9d69", "#ffffff"):
        assert tuple(bytes.fromhex(color[1:])) in colors


def test_an_utterance_in_several_conditions_is_one_draw():
    def cells(conditions):
        return [
            {"lang": lang, "condition": c, "utterances": 50, "flagged": 5}
            for lang in ("en", "zh")
            for c in conditions
        ]

    once = html_report._share(cells(["snr0"]))
    assert once == html_report._share(cells(["snr0", "snr5", "snr10"]))
    low, high = (100 * x for x in wilson(10, 100))
    assert f"{low:.1f}…{high:.1f}" in once
