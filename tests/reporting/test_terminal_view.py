"""The screen of `dsasr watch`."""

from __future__ import annotations

import io
import json

import pytest

from dsasr.reporting.run_state import Job
from dsasr.reporting.terminal_view import console_of, frame, sparkline
from dsasr.tracking.run_log import HYPOTHESES


def screen(*folders, width=100, height=0, run=None, ascii_only=False) -> str:
    console = console_of(io.StringIO(), width)
    jobs = [Job(folder, run or folder) for folder in folders]
    console.print(frame(jobs, width, height, ascii_only))
    return console.file.getvalue()


EVENTS = (
    {"event": "published", "seconds": 5.0, "snapshot": "encoder-7", "cause": "drift", "steps": 7,
     "publish_seconds": 0.1, "cka": 0.9},
    {"event": "bad_samples", "seconds": 6.0, "steps": 8, "empty_text": 3, "too_long": 1209},
    {"event": "evaluated", "seconds": 6.0, "stage": "align", "steps": 9, "wer": 0.3, "wer/en": 0.3,
     "cer/zh": 0.1, "wer/en/low": 0.2},
    {"event": "evaluated", "seconds": 7.0, "stage": "align", "steps": 10, "wer": 0.25,
     "wer/en": 0.25, "cer/zh": 0.2, "hallucination/flagged": 0.01},
)  # fmt: skip


def test_all_that_a_run_tells_is_on_the_screen(logged_run):
    folder = logged_run(events=EVENTS)
    drift = {"steps": 30, "stage": "drift", "cka": 0.93, "cka_threshold": 0.95, "seconds": 9.0}
    memory = {"steps": 31, "step": 31, "stage": "ctc", "seconds": 186.0, "memory_bytes": 2.5e9}
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(f"{json.dumps(drift)}\n{json.dumps(memory)}\n")
    (folder / HYPOTHESES).write_text('{"reference": "a b", "hypothesis": "a c"}\n')
    text = screen(folder)
    for shown in (
        "failed: ended before its schedule did", "3:06 trained", "31/40  77%", " 0/10   0%",
        "0.800 → 0.267 nats", "CKA 0.9300 < 0.95", "1 published, the last encoder-7",
        "WER en", "25.0%  (best 25.0% of 2)", "CER zh", "20.0%  (best 10.0% of 2)",
        "hallucinated 1.0%", "20.0 hours of audio an hour", "2.50 GB of the fullest rank",
        "1,212 samples: empty_text 3, too_long 1,209", "said  a b", "heard a c",
        "WARNING bad samples so far",
    ):  # fmt: skip
        assert shown in text, f"{shown}\n{text}"
    assert "wer/en/low" not in text and "\x1b" not in text


@pytest.mark.parametrize("width", [30, 60, 80, 150, 300])
@pytest.mark.parametrize("height", [0, 12, 24, 60])
def test_no_line_is_wider_than_the_terminal(logged_run, width, height):
    run = logged_run("run/pretrain", branch="pretrain", events=EVENTS).parent
    logged_run("run/sft", branch="sft", steps=10)
    text = screen(run / "pretrain", run / "sft", width=width, height=height, run=run)
    assert max(map(len, text.splitlines())) <= width
    assert "ctc" in text and "align" in text


def test_a_screen_that_fits_shows_fewer_events_where_it_is_low(logged_run):
    many = [{"event": "resumed", "checkpoint": f"step-{n}", "steps": n} for n in range(20)]
    folder = logged_run(events=many)
    high, low = screen(folder, height=40), screen(folder, height=12)
    assert high.count("resumed from") == 6 and low.count("resumed from") < 6
    assert len(low.splitlines()) <= 12 and "step-19" in low


def test_text_of_others_neither_moves_the_cursor_nor_is_markup(logged_run):
    evil = "\x1b[2J\x9b31m[red]x[/red] :smile:\u202eend\nnext"
    events = [
        {"event": evil, "steps": 1},
        {"event": "bad_validation_samples", "steps": 1, "first": evil, "torn": 1},
        {"event": "evaluated", "stage": evil, "steps": 2},
        {"event": "drift"}, {"event": "swap", "snapshot": 3}, {"event": None, "steps": {}},
    ]  # fmt: skip
    folder = logged_run(events=events)
    (folder / HYPOTHESES).write_text(json.dumps({"reference": evil, "hypothesis": [evil]}) + "\n")
    recipe = {"stages": [{"name": evil, "branch": "sft", "steps": 3}]}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    text = screen(folder, width=200)
    assert "\x1b" not in text and "\x9b" not in text and "\u202e" not in text
    assert "\\x1b[2J\\x9b31m[red]x[/red] :smile:end next" in text
    assert "\nnext" not in text


def test_a_terminal_without_unicode_gets_bars_of_ascii(logged_run):
    text = screen(logged_run(), ascii_only=True)
    assert "####" in text and "----" in text and "━" not in text and "▁" not in text


@pytest.mark.parametrize(
    ("values", "width", "log", "line"),
    [
        ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], 8, False, "▁▂▃▄▅▆▇█"),
        ([1.0, 1.0], 8, False, "▄▄"),
        ([1.0, 3.0, 5.0, 7.0], 2, False, "▁█"),
        ([1.0, 10.0, 100.0], 3, True, "▁▅█"),
        ([-1.0, 0.0, 1.0], 3, True, "▁▅█"),
    ],
)
def test_sparkline(values, width, log, line):
    assert sparkline(values, width, log=log) == line
