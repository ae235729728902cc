"""The command itself: who tells a mistake."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from dsasr import train
from dsasr.utils.errors import UserError

TRAIN = Path(__file__).parent.parent / "dsasr" / "train.py"


@pytest.mark.launcher
def test_a_mistake_is_one_line_of_one_rank_and_exit_code_2(launch, tiny, tmp_path):
    wrong = f"run={tmp_path / 'run'}", "stages.pretrain.rate=3"
    done = launch(TRAIN, "--recipe", tiny, *wrong)
    assert done.returncode == 2, done.stdout[-3000:]
    told = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    assert len(told) == 1, done.stdout[-3000:]
    assert "'stages.pretrain.rate' (did you mean 'min_lr_ratio'" in told[0]
    assert "Traceback" not in done.stdout and not (tmp_path / "run").exists()


@pytest.mark.parametrize(("rank", "waits"), [("0", 0.0), ("1", 0.2)])
def test_rank_0_speaks_first_and_others_if_it_has_nothing_to_tell(monkeypatch, rank, waits):
    def mistaken():
        raise UserError("no GPU")

    monkeypatch.setattr(train, "main", mistaken)
    monkeypatch.setattr(train, "PATIENCE", 0.2)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(train.signal, "signal", lambda *_: None)  # this process is pytest's
    began = time.monotonic()
    with pytest.raises(UserError, match="no GPU"):
        train.main_once()
    assert waits <= time.monotonic() - began < waits + 0.15
