"""`dsasr watch`, and `dsasr ls`."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_without_a_terminal_one_frame(command, logged_run):
    folder = logged_run(ends="finished")
    for words in ([], ["--once"]):
        done = command("watch", folder, *words)
        assert done.returncode == 0 and "finished" in done.stdout and "\x1b" not in done.stdout
        assert all(line == line.rstrip() for line in done.stdout.splitlines())


def test_a_folder_that_is_no_run_is_one_line(command, tmp_path):
    for folder, text in ((tmp_path, "is no run folder"), (tmp_path / "none", "does not exist")):
        done = command("watch", folder)
        assert done.returncode == 2 and text in done.stderr and done.stderr.count("\n") == 1
    assert command("watch", tmp_path, "--every", "0").returncode == 2


def test_in_a_terminal_it_follows_the_run_to_its_end(logged_run):
    folder = logged_run(steps=20, ends="stopped")
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "dsasr.cli", "watch", str(folder), "--every", "0.1"], cwd=ROOT,
        stdin=slave, stdout=slave, stderr=slave,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "90", "LINES": "30"},
    )  # fmt: skip
    os.close(slave)
    told = _until(master, "20/40")
    with open(folder / "metrics.jsonl", "a") as file:
        row = {"steps": 40, "step": 40, "stage": "ctc", "seconds": 240.0, "ctc": 0.1}
        file.write(json.dumps(row) + "\n")
    told += _until(master, "40/40")
    with open(folder / "events.jsonl", "a") as file:
        file.write('{"event": "finished", "seconds": 240.0, "steps": 40}\n')
    told += _until(master, "")
    assert "finished" in told and process.wait(20) == 0
    assert "\x1b[?1049h" in told  # the screen before it comes back at the end
    os.close(master)


def _until(master: int, text: str, seconds: float = 60.0) -> str:
    """What the terminal gets until it has got ``text``, or without one until its end."""
    told, end = "", time.monotonic() + seconds
    while not text or text not in told:
        assert time.monotonic() < end, told[-2000:]
        if select.select([master], [], [], 0.2)[0]:
            try:
                told += os.read(master, 65536).decode("utf-8", "replace")
            except OSError:  # the other side is closed
                break
    return told


def test_ls_prints_a_table_and_a_line_for_each_bad_folder(command, logged_run, tmp_path):
    logged_run("runs/a", ends="finished")
    logged_run("runs/b")
    (tmp_path / "runs" / "b" / "recipe.yaml").write_text("stages: [")
    done = command("ls", tmp_path / "runs")
    assert done.returncode == 0 and done.stderr == ""
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["run", "a", "b", "bad:"]
    done = command("ls", tmp_path / "runs", "--state", "finished")
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["run", "a", "bad:"]
    assert "no run in" in command("ls", tmp_path / "runs", "--state", "running").stdout


def test_ls_without_a_run_is_one_line(command, tmp_path):
    for folder, text in ((tmp_path, "holds no run"), (tmp_path / "none", "there is no folder")):
        done = command("ls", folder)
        assert done.returncode == 2 and text in done.stderr and done.stderr.count("\n") == 1
    assert "did you mean 'failed'" in command("ls", tmp_path, "--state", "faild").stderr


def test_a_run_keeps_transcripts_of_its_newest_evaluation(command, trained):
    rows = [json.loads(line) for line in (trained / "hypotheses.jsonl").read_text().splitlines()]
    assert rows and {row["stage"] for row in rows} == {"joint"}
    text = command("watch", trained).stdout
    assert f"said  {rows[0]['reference']}" in text and text.count("\nheard ") == len(rows)
