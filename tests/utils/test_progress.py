"""The progress bar on a terminal and in a log."""

from __future__ import annotations

import ast
import io
from pathlib import Path

import pytest
import tqdm.std

from dsasr.utils import progress
from dsasr.utils.progress import Bar

ROOT = Path(__file__).parents[2]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that ``clock(3)`` advances by 3 seconds, for tqdm too."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(tqdm.std, "time", lambda: now[0])

    def tick(seconds: float) -> None:
        now[0] += seconds

    return tick


def test_a_log_gets_a_line_every_twenty_seconds_and_the_last(clock):
    log = io.StringIO()
    for _ in Bar(range(450), desc="model", unit="step", file=log):
        clock(0.1)
    lines = log.getvalue().splitlines()
    assert "\r" not in log.getvalue() and len(lines) == 3
    assert all(line.startswith("model: ") for line in lines)
    assert "450/450" in lines[-1] and "100%" in lines[-1]


def test_what_is_written_between_does_not_hurry_a_log(clock):
    log = io.StringIO()
    with Bar(total=100, unit="trial", file=log) as bar:
        for _ in range(100):
            clock(0.5)
            bar.set_postfix_str("fits")
            bar.update()
            Bar.write("text", file=log)
    lines = [line for line in log.getvalue().splitlines() if line != "text"]
    assert "\r" not in log.getvalue() and len(lines) == 3
    assert all(line.endswith("fits]") for line in lines)


@pytest.mark.parametrize("options", [{"disable": True}, {"delay": 30}, {"leave": False}])
def test_a_short_one_may_stay_silent(clock, options):
    log = io.StringIO()
    for _ in Bar(range(10), file=log, **options):
        clock(1)
    assert log.getvalue() == ""


def test_on_a_terminal_it_is_tqdm(clock):
    terminal = Terminal()
    for _ in Bar(range(10), desc="model", file=terminal):
        clock(1)
    shown = terminal.getvalue().split("\r")
    assert len(shown) > 9 and shown[-1].endswith("\n") and "10/10" in shown[-1]


@pytest.mark.parametrize(
    ("options", "done", "line"),
    [
        ({"total": 14_400.0, "unit": "s", "desc": "train"}, 3573.9821999999986,
         "train:  25%|##4       | 59:33/4:00:00 [00:10<00:30, 357 s/s]"),
        ({"total": 1400, "unit": "utt"}, 1234,
         " 88%|########8 | 1,234/1,400 [00:10<00:01, 123 utt/s]"),
        ({"total": 5, "unit": "kill"}, 0, "  0%|          | 0/5 [00:10<?, ? kill/s]"),
        ({"total": 5, "unit": "kill"}, 2, " 40%|####      | 2/5 [00:10<00:15, 5 s/kill]"),
        ({"desc": "probe", "unit": "trial"}, 12, "probe: 12 trial [00:10, 1.2 trial/s]"),
        ({"desc": "export", "unit": "B", "unit_scale": True}, 123_456_789,
         "export: 123MB [00:10, 12.3MB/s]"),
    ],
)  # fmt: skip
def test_numbers_have_units_and_few_digits(clock, options, done, line):
    bar = Bar(file=io.StringIO(), smoothing=0, **options)
    clock(10)
    bar.n = done
    assert str(bar) == line


def test_every_bar_is_this_one():
    for path in [*(ROOT / "dsasr").rglob("*.py"), *(ROOT / "tools").rglob("*.py")]:
        if path == Path(progress.__file__):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert "tqdm" not in names, f"{path.relative_to(ROOT)}: use dsasr.utils.progress.Bar"
