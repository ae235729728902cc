"""The report's pictures and page from made-up runs, and what a browser shows of it."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
import subprocess
import types
from html.parser import HTMLParser

import pytest

from dsasr import config, recipe
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


def look(steps, branch, stage, **more):
    held = {"steps": steps, "branch": branch, "stage": f"allocation_{stage}"}
    held |= {"seconds": 2.0 * steps, "nse": 0.4 + steps / 1000, "effective_rank": 9.0}
    return held | more


def probes(pai, csai):
    out = {}
    for name, value in (("pai", pai), ("csai", csai)):
        out |= {name: value, f"{name}_low": value - 0.1, f"{name}_high": value + 0.1}
        out[f"{name}_share"] = value / 4
    return out


def run(name="first", **given) -> RunData:
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
        look(40, "pretrain", "pretrain", **probes(1.0, 0.1)),
        look(150, "pretrain", "pretrain", **probes(2.0, 0.2)),
        look(190, "sft", "ia_sft", nll_with_audio=0.4, nll_without_audio=2.0, **probes(2.0, 0.2)),
        look(210, "sft", "joint", nll_with_audio=2.3, nll_without_audio=2.0,
             cka_to_stage_start=0.98, **probes(-0.1, 0.3)),
    ]  # fmt: skip
    metrics += [
        {"steps": s, "branch": "sft", "stage": f"valid_{stage}", "seconds": 2.0 * s, "wer": w,
         "cer": w / 2, "hallucination/flagged": w / 10, "hallucination/characters_per_minute": 60}
        for s, stage, w in ((100, "ia_sft", 0.8), (210, "joint", 0.3))
    ]  # fmt: skip
    return RunData(name, events, metrics, schedule=schedule(), **given)


def rated(rate):
    counts = {"substitutions": 1, "deletions": 0, "insertions": 0, "units": 10, "utterances": 3}
    return {"rate": rate, "low": rate - 0.02, "high": rate + 0.03, **counts}


def trial() -> dict:
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
    """Tags that are open, text, and whatever a page would fetch."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.said, self.fetched = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        self.fetched += [v for k, v in attrs if k in ("src", "href") and v]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.said.append(data)


def test_the_page_is_whole_and_needs_no_network(tmp_path):
    page = html_report.write([run(trial=trial()), run("second")], tmp_path)
    text = page.read_text()
    held = Page(text)
    assert not held.open and held.fetched
    assert all(x.startswith("data:image/png;base64,") for x in held.fetched)
    assert not re.search(r"https?://", text)
    said = " ".join(" ".join(held.said).split())
    assert '<th colspan="2">errors, %</th>' in text  # en and 5 dB
    for wanted in ("10.0", "8.0…13.0", "50.0", "a <b> c", "Before and after", "Who resolves"):
        assert wanted in said
    # 50 characters in 120 s, 1 of 100, 9 of 100; 100 steps of 2 s at 360 h/h.
    assert "25.0" in said and "9.0" in said and "20.0" in said
    assert "en WER, clean" in said and "by dsasr evaluate … --suite --report: second." in said
    names = {p.name for p in tmp_path.glob("*.png")}
    assert names == {"timeline-first.png", "timeline-second.png", "cka.png", "metrics.png",
                     "joint.png", "allocation.png", "training.png"}  # fmt: skip
    for path in tmp_path.glob("*.png"):
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 5000


def test_a_run_that_measured_nothing_gets_its_timeline_only(tmp_path):
    bare = run("bare")
    bare.metrics = [m for m in bare.metrics if m["stage"] == "pretrain"]
    assert list(html_report.draw([bare], tmp_path)) == ["Course of bare"]
    page = html_report.write([bare], tmp_path).read_text()
    assert "dsasr evaluate" in page
    # What is not there is named, with what would make it.
    missing = page.partition("<h2>Not measured</h2>")[2]
    assert all(title in missing for title in html_report.MAKERS)
    assert (
        "Not measured" not in html_report.write([run(trial=trial())], tmp_path / "all").read_text()
    )


def test_letters_are_of_one_size_in_all_pictures(tmp_path):
    text = html_report.write([run()], tmp_path).read_text()
    widths = [int(x) for x in re.findall(r'<img alt="[^"]*" width="(\d+)"', text)]
    pictures = [tmp_path / f"{n}.png" for n in ("timeline-first", "cka", "metrics", "joint")]
    sizes = [int.from_bytes(p.read_bytes()[16:20], "big") for p in pictures]
    assert widths[:4] == [96 * size // figures.DPI for size in sizes] and len(set(widths)) > 1


def test_many_runs_have_one_key_and_no_overlapping_names(tmp_path, monkeypatch):
    """Names over bars and of systems do not run into each other, nor the key into the pictures."""
    kept = []
    monkeypatch.setattr(figures, "save", lambda figure, path: kept.append(figure) or path)
    many = [run(f"paper-without-{i}") for i in range(6)]
    for draw in (figures.joint, figures.over_training, figures.against_time):
        assert draw(many, tmp_path / "x.png")
    for figure in kept:
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
    assert len(kept) == 3 and len(kept[0].axes) == 3


def row(name, kind, value, **more):
    """Of dsasr probe."""
    gain = {"value": value, "low": value, "high": value, "share": 0.5}
    held = {"name": name, "run": f"runs/{name.partition('/')[0]}", "kind": kind, "nse": 0.5}
    return {**held, "pai": gain, "csai": gain, **more}


def test_before_and_after_joint_prefers_measured_checkpoints():
    before, after = run_data.before_and_after(run())
    assert before["stage"] == "allocation_ia_sft" and after["pai"] == -0.1

    measured = run(
        jobs=("first",),
        checkpoints=[
            row("first/encoder-40", "snapshot", 1.0),
            row("first/encoder-100", "snapshot", 2.0),
            row("first/step-210", "checkpoint", 3.0, stage="joint", encoder="encoder-100"),
            row("other/encoder-100", "snapshot", 7.0),
            row("other/step-210", "checkpoint", 8.0, stage="joint", encoder="encoder-100"),
            {k: v for k, v in row("whisper", "foreign", 9.0).items() if k != "run"},
        ],
    )
    before, after = run_data.before_and_after(measured)
    assert (before["pai"], after["pai"]) == (2.0, 3.0)


def test_looks_of_a_later_stage_are_not_before_joint_training():
    made = run()
    late = look(230, "sft", "context", **probes(7.0, 0.7))
    made.metrics.append(late)
    before, after = run_data.before_and_after(made)
    assert before["stage"] == "allocation_ia_sft" and after["stage"] == "allocation_joint"


def test_hours_are_those_of_all_steps_of_each_stage():
    made = run()
    assert run_data.audio_hours(made) == pytest.approx(360 * 2 * 100 / 3600)
    rates = {"audio_hours_per_hour": 36.0, "step_seconds": 1.0}
    made.metrics.append({"stage": "joint", "branch": "sft", "step": 50, "steps": 200, **rates})
    assert run_data.audio_hours(made) == pytest.approx(20 + 0.5)


def test_before_and_after_of_a_job_on_the_snapshots_of_another(tiny, tmp_path):
    held = {
        "pretrain": [row("pretrain/encoder-40", "snapshot", 1.0, measured={"data": "test"}),
                     row("pretrain/encoder-100", "snapshot", 2.0, measured={"data": "test"}),
                     row("pretrain/encoder-100", "snapshot", 9.0, measured={"data": "other"})],
        "sft": [row("sft/step-210", "checkpoint", 3.0, stage="joint", encoder="encoder-100",
                    measured={"data": "test"})],
    }  # fmt: skip
    for branch, rows in held.items():
        folder = tmp_path / "run" / branch
        folder.mkdir(parents=True)
        chosen = recipe.load(str(tiny), [f"run={tmp_path / 'run'}", f"branch={branch}"])
        (folder / "recipe.yaml").write_text(config.dump(chosen))
        own = {n: [r for r in getattr(run(), n) if r.get("branch", branch) == branch]
               for n in ("metrics", "events")}  # fmt: skip
        for name, lines in (*own.items(), ("allocation", rows)):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    before, after = run_data.before_and_after(run_data.collect(tmp_path / "run" / "sft"))
    assert (before["pai"], after["pai"]) == (2.0, 3.0)
    assert run_data.collect(tmp_path / "run" / "pretrain").taken == []
    both = run_data.collect(tmp_path / "run")
    before, after = run_data.before_and_after(both)
    assert (before["pai"], after["pai"]) == (2.0, 3.0)
    assert both.jobs == ("pretrain", "sft") and len(both.checkpoints) == 4
    assert {s.branch for s in both.schedule.stages} == {"pretrain", "sft"}
    page = html_report.write([both], tmp_path / "report").read_text()
    assert "Course of run" in page and "Before and after" in page


def test_text_on_nonspeech_has_its_interval_or_says_why_not():
    held = trial()["hallucination"]
    assert html_report._pace(held) == "25.0"  # written before there were intervals
    clips = {"rate": 25.0, "low": 3.2, "high": 61.72, "clips": 4, "clips_with_text": 2}
    held["nonspeech"] = {"all": clips}
    assert html_report._pace(held) == "25.0<small>3.2…61.7</small>"
    clips |= {"low": None, "high": None}
    assert html_report._pace(held) == "25.0"
    clips |= {"rate": 0.0, "clips_with_text": 0}
    assert html_report._pace(held) == "0<small>no text in 4 clips</small>"
    assert html_report._pace({"rows": [], "nonspeech": {}}) == "–"


def test_what_is_null_or_infinite_is_shown_as_not_measured(tmp_path, monkeypatch):
    """In the files of a run, also as older ones spell it: NaN, Infinity."""
    made, tried = run(), trial()
    tried["conditions"]["clean"]["languages"]["zh"] = rated(math.inf) | {"unit": "char"}
    tried["conditions"]["snr5"] |= dict.fromkeys(("rate", "low", "high"))
    made.metrics.append({**look(211, "sft", "joint", **probes(1.0, 0.1)), "nse": math.nan})
    made.metrics.append({**made.metrics[0], "steps": 120, "step": 120, "ctc": None})
    made.metrics.append({**made.metrics[3], "steps": 60, "cka": None})
    made.events.insert(2, {**made.events[1], "cka": None})
    gain = {"value": 1.0, "low": None, "high": math.nan, "share": math.nan}
    row = {"name": "run/a", "run": "run", "kind": "snapshot", "nse": None, "pai": gain}
    for name, rows in (
        ("metrics.jsonl", made.metrics),
        ("events.jsonl", made.events),
        ("allocation.jsonl", [{**row, "csai": gain}]),
    ):
        (tmp_path / name).write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "report.json").write_text(json.dumps(tried))
    stub = types.SimpleNamespace(schedule=schedule, store_folder=tmp_path / "snapshots")
    monkeypatch.setattr(run_data, "run_recipe", lambda folder: stub)
    found = run_data.collect(tmp_path)
    assert len(found.drift) == 1 and "nse" not in found.metrics[-3]
    text = html_report.write([found], tmp_path / "report").read_text()
    assert "<td>–</td>" in text and not re.search(
        r"\b(nan|inf|None)\b", text.split("<h2>Course")[0]
    )
    assert (tmp_path / "report" / "joint.png").is_file()
    timeline_plot.plot_run(tmp_path)


def test_an_estimate_that_is_not_to_be_told_from_none_says_so(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(figures, "save", lambda figure, path: kept.append(figure) or path)

    def row(name, kind, **more):
        gain = {"value": 0.4, "low": 0.3, "high": 0.5, "share": 0.5}
        none = {"value": 0.0, "low": 0.0, "high": 0.0, "share": 0.0, "found": False, "limit": 0.012}
        own = {"name": f"first/{name}", "run": "runs/first", "kind": kind, "nse": 0.5}
        return {**own, "pai": gain, "csai": none if kind == "checkpoint" else gain, **more}

    held = [
        row("encoder-100", "snapshot"),
        row("step-210", "checkpoint", stage="joint", encoder="encoder-100"),
    ]
    assert figures.joint([run(checkpoints=held)], tmp_path / "x.png")
    assert figures.allocation([run(checkpoints=held)], tmp_path / "x.png")
    csai = kept[0].axes[2]
    assert [t.get_text() for t in csai.texts if t.get_text()] == ["none found (< 0.012)"]
    heights = [bar.get_height() for bar in csai.patches]
    assert heights[0] == 0.4 and math.isnan(heights[1])
    told = [t.get_text() for t in kept[1].axes[0].texts]
    assert told == ["50%", "50%", "50%", "none found (< 0.012 nats a frame)"]


def test_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="recipe"):
        run_data.named([tmp_path])


def test_the_pictures_are_in_tensorboard_too(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    html_report.draw([run()], tmp_path / "report")
    add_images(tmp_path / "tensorboard", sorted((tmp_path / "report").glob("*.png")), 210)
    held = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"report/joint", "report/allocation", "report/cka"} <= set(held.Tags()["images"])
    assert held.Images("report/joint")[0].step == 210


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium")
def test_a_browser_shows_it(tmp_path):
    from PIL import Image

    page = html_report.write([run(trial=trial())], tmp_path / "report")
    shot = tmp_path / "shot.png"
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
               f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1100,3600",
               f"--screenshot={shot}", page.as_uri()]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    image = Image.open(shot).convert("RGB")
    assert image.size == (1100, 3600)
    colors = {color for _, color in image.getcolors(1 << 24)}
    # The pictures' own colors are on the page, and its background is white.
    for wanted in ("#3b6ea5", "#d08c2f", "#4f9d69", "#ffffff"):
        assert tuple(bytes.fromhex(wanted[1:])) in colors


def test_an_utterance_heard_in_many_conditions_is_one_draw():
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
