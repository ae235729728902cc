"""`dsasr report` of a trained run."""

from __future__ import annotations

import pytest


@pytest.mark.launcher
def test_report_of_a_run(trained, tmp_path, command):
    done = command("report", trained, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "index.html").read_text()
    assert "Course of run" in page and "<h3>Stages</h3>" in page
    assert command("report", tmp_path).returncode == 2
