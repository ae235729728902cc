"""The report's figures and page of synthetic runs, and how a browser renders it."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import shutil
import subprocess
import types
from html.parser import HTMLParser

import pytest

from dsasr.evaluation.results import Result, Results
from dsasr.reporting import figures, html_report, run_data
from dsasr.tracking import timeline_plot
from dsasr.tracking.tensorboard import add_images


class Page(HTMLParser):
    """Open tags, text, and the resources that a page fetches."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.text, self.fetched, self.attributes = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        self.attributes += [f"{k}={v}" for k, v in attrs if k not in ("src", "content")]
        self.fetched += [v for k, v in attrs if k in ("src", "href") and v]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_whole_and_needs_no_network(made, tmp_path):
    page = html_report.write([made.run(suite=made.suite()), made.run("second")], tmp_path)
    text = page.read_text()
    parsed = Page(text)
    assert not parsed.open and parsed.fetched
    assert all(x.startswith(("data:image/png;base64,", "#")) for x in parsed.fetched)
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
                     "joint.png", "allocation.png", "training.png", "health.png"}  # fmt: skip
    for path in tmp_path.glob("*.png"):
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 5000


def test_a_run_that_measured_nothing_gets_the_figures_of_its_training(made, tmp_path):
    bare = made.run("bare")
    bare.metrics = [m for m in bare.metrics if m["stage"] == "pretrain"]
    drawn = ["Course of bare", "Gradients, speed, memory"]
    assert list(html_report.draw([bare], tmp_path)) == drawn
    page = html_report.write([bare], tmp_path).read_text()
    assert "dsasr evaluate" in page
    # Missing figures are listed, with the command that measures them.
    missing = page.partition("<h3>Not measured</h3>")[2]
    assert all(title in missing for title in html_report.MEASURED_BY)
    full = html_report.write([made.run(suite=made.suite())], tmp_path / "all").read_text()
    assert "Not measured" not in full


def test_whatever_comes_from_a_run_is_escaped(made, tmp_path):
    evil = "<script>alert(1)</script>\"' onload=x {{ 7 * 7 }} $\\q$"
    row = Result(evil, "clean", evil, f"red {evil}", f"green {evil}", 2.0, 0.1, False, evil)
    report = made.suite() | {"data": evil, "evaluated": {"checkpoint": evil, "left_out": {evil: 1}}}
    report["hallucination"]["examples"][0] |= {"key": evil, "hypothesis": evil, "detail": evil}
    run = made.run(
        evil, suite=report, transcripts=Results([row]), recipes={evil: f"x: {evil}"},
        environments={evil: {"machine": evil, "versions": {evil: evil}}},
    )  # fmt: skip
    run.recipes = {evil: f"# {evil}"}
    text = html_report.write([run], tmp_path).read_text()
    parsed = Page(text)
    assert text.count("<script>") == 1 and not parsed.open
    assert "alert(1)" in " ".join(parsed.text) and "49" not in " ".join(parsed.text)
    assert not [a for a in parsed.attributes if a.startswith("onload")]


def test_the_worst_transcripts_are_shown_with_their_sound(made, tmp_path):
    rows = [Result("a/1", "clean", "en", "red green", "red grin", 2.0, 0.1, True, "ann"),
            Result("a/2", "clean", "en", "red green", "red", 2.0, 0.1, False)]  # fmt: skip
    run = made.run(suite=made.suite(), transcripts=Results(rows), clips={"a/1": b"fLaC\0"})
    text = html_report.write([run], tmp_path).read_text()
    assert '<span class="replaced"><b>green</b><i>grin</i></span>' in text
    assert '<span class="missing"><b>green</b><i></i></span>' in text
    sounds = [x for x in Page(text).fetched if x.startswith("data:audio")]
    assert sounds == ["data:audio/flac;base64," + base64.b64encode(b"fLaC\0").decode()]
    shown = " ".join(" ".join(Page(text).text).split())
    assert "1 error in 2 units · a/1 · en · ann · 2.0 s" in shown
    assert "cut by the token limit" in shown


def test_the_page_allows_its_own_script_and_no_other_source(made, tmp_path):
    text = html_report.write([made.run()], tmp_path).read_text()
    [policy] = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    [script] = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'") and f"script-src 'sha256-{digest}'" in policy


def test_text_has_one_size_in_all_figures(made, tmp_path):
    text = html_report.write([made.run()], tmp_path).read_text()
    widths = [int(x) for x in re.findall(r'<img alt="[^"]*" width="(\d+)"', text)]
    pictures = [tmp_path / f"{n}.png" for n in ("timeline-first", "training", "health", "cka")]
    sizes = [int.from_bytes(p.read_bytes()[16:20], "big") for p in pictures]
    assert widths[:4] == [96 * size // figures.DPI for size in sizes] and len(set(widths)) > 1


def test_what_is_null_or_infinite_is_shown_as_not_measured(made, tmp_path, monkeypatch):
    """In the files of a run, also spelled NaN or Infinity."""
    data, report = made.run(), made.suite()
    report["conditions"]["clean"]["languages"]["zh"] = made.rated(math.inf) | {"unit": "char"}
    report["conditions"]["snr5"] |= dict.fromkeys(("rate", "low", "high"))
    data.metrics.append(
        {**made.online(211, "sft", "joint", **made.probes(1.0, 0.1)), "nse": math.nan}
    )
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
    (tmp_path / "recipe.yaml").write_text("seed: 1")
    stub = types.SimpleNamespace(schedule=made.schedule, store_folder=tmp_path / "snapshots")
    monkeypatch.setattr(run_data, "run_recipe", lambda folder: stub)
    collected = run_data.collect(tmp_path)
    assert len(collected.drift) == 1 and "nse" not in collected.metrics[-3]
    text = html_report.write([collected], tmp_path / "report").read_text()
    shown = re.sub(r"<(figcaption|script)>.*?</\1>", "", text, flags=re.DOTALL)
    assert "<td>–</td>" in shown and not re.search(r"\b(nan|inf|None)\b", shown)
    assert (tmp_path / "report" / "joint.png").is_file()
    timeline_plot.plot_run(tmp_path)


def test_the_figures_are_in_tensorboard_too(made, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    html_report.draw([made.run()], tmp_path / "report")
    add_images(tmp_path / "tensorboard", sorted((tmp_path / "report").glob("*.png")), 210)
    events = EventAccumulator(str(tmp_path / "tensorboard" / "report")).Reload()
    assert {"report/joint", "report/allocation", "report/cka"} <= set(events.Tags()["images"])
    assert events.Images("report/joint")[0].step == 210


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium")
def test_a_browser_renders_it(made, tmp_path):
    from PIL import Image

    page = html_report.write([made.run(suite=made.suite())], tmp_path / "report")
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
