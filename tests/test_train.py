"""The training command: which rank prints a user's mistake."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from dsasr import train
from dsasr.utils.errors import UserError

TRAIN = Path(__file__).parent.parent / "dsasr" / "train.py"


@pytest.mark.launcher
def test_a_mistake_is_one_line_of_one_rank_and_exit_code_2(launch, tiny, tmp_path):
    overrides = f"run={tmp_path / 'run'}", "stages.pretrain.trian=3"
    done = launch(TRAIN, "--recipe", tiny, *overrides)
    assert done.returncode == 2, done.stdout[-3000:]
    errors = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stdout[-3000:]
    assert "'stages.pretrain.trian' (did you mean 'trains'" in errors[0]
    assert "Traceback" not in done.stdout and not (tmp_path / "run").exists()


@pytest.mark.parametrize(("rank", "waits"), [("0", 0.0), ("1", 0.2)])
def test_other_ranks_give_rank_0_time_to_print(monkeypatch, rank, waits):
    def raise_user_error():
        raise UserError("no GPU")

    monkeypatch.setattr(train, "main", raise_user_error)
    monkeypatch.setattr(train, "RANK_0_SECONDS", 0.2)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(train.signal, "signal", lambda *_: None)  # this process is pytest's
    began = time.monotonic()
    with pytest.raises(UserError, match="no GPU"):
        train.main_once()
    assert waits <= time.monotonic() - began < waits + 0.15
