"""The table of `dsasr ls`."""

from __future__ import annotations

import io
import os

import pytest

from dsasr.reporting import runs_table
from dsasr.reporting.terminal_view import console_of


def rows(top) -> list[list[str]]:
    console = console_of(io.StringIO(), 200)
    console.print(runs_table.table(runs_table.find(top).jobs, top))
    return [line.split() for line in console.file.getvalue().splitlines()[1:]]


def test_a_line_a_job(logged_run, tmp_path):
    evaluated = {"event": "evaluated", "steps": 40, "stage": "align", "wer": 0.25, "cer": 0.1}
    logged_run("a/one", steps=40, ends="finished", events=[evaluated])
    logged_run("b/pretrain", branch="pretrain", steps=20, ends="stopped")
    logged_run("b/sft", branch="sft", steps=0)
    assert [row[:9] for row in rows(tmp_path)] == [
        ["a/one", "finished", "ctc", "40/50", "WER", "25.0%", "4:00", "1.33", "0"],
        ["b/pretrain", "stopped", "ctc", "20/40", "–", "2:00", "0.667", "0", "s"],
        ["b/sft", "failed", "align", "0/10", "–", "0:01", "0", "0", "s"],
    ]


def test_what_is_inside_a_run_or_hidden_is_not_looked_into(logged_run, tmp_path):
    logged_run("run")
    logged_run("run/code/old")
    logged_run(".trash/run")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert [row[0] for row in rows(tmp_path)] == ["run"]
    assert [row[0] for row in rows(tmp_path / "run")] == ["run"]


def test_bad_folders_have_a_line_each_and_hide_no_other(logged_run, tmp_path):
    logged_run("good")
    logged_run("torn")
    (tmp_path / "torn" / "recipe.yaml").write_text("stages: [")
    (tmp_path / "torn" / "lock.json").write_bytes(b"\xff{")
    (tmp_path / "torn" / "metrics.jsonl").write_bytes(b"\xff\xfe\n[]\n")
    (tmp_path / "fresh").mkdir()
    (tmp_path / "fresh" / "recipe.yaml").write_text("run: x\n")
    found = runs_table.find(tmp_path)
    assert [job.name for job in found.jobs] == ["good", "torn"]
    assert len(found.problems) == 3 and "has not trained yet" in found.problems[0]
    assert "torn/recipe.yaml" in found.problems[1] and "2 broken lines" in found.problems[2]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_folder_without_rights_is_named(logged_run, tmp_path):
    logged_run("shut").chmod(0)
    assert "shut" in runs_table.find(tmp_path).problems[0]


def test_a_huge_tree_is_not_walked_to_its_end(logged_run, tmp_path, monkeypatch):
    monkeypatch.setattr(runs_table, "MOST_FOLDERS", 3)
    for name in "abcdef":
        (tmp_path / name).mkdir()
    assert "over 3 folders" in runs_table.find(tmp_path).problems[0]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (119, "119 s"), (120, "2 min"), (7200, "2 h"),
                          (200_000, "2 days")],
)  # fmt: skip
def test_ago(seconds, text):
    assert runs_table.ago(seconds) == text
