"""`dsasr submit`: its plan, and what it gives sbatch."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from dsasr import recipe


def test_it_prints_its_plan_and_submits(tiny, tmp_path, command, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fake = tmp_path / "bin" / "sbatch"
    fake.parent.mkdir()
    fake.write_text('#!/bin/bash\necho "$RECIPE $RUN $CODE $*" > "$RUN/asked"\n')
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    run = tmp_path / "run"
    words = ["submit", "train", "--recipe", tiny, f"run={run}", "seed=7"]
    words += ["slurm.size={nodes: 2, gpus: 0, ranks: 1}"]
    done = command(*words, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "2 × 1 CPU ranks" in done.stdout and "--nodes=2" in done.stdout
    assert "ia_sft  14 steps" in done.stdout and not run.exists()
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    done = command(*words)
    assert done.returncode == 0, done.stderr
    saved, folder, code, *options = (run / "asked").read_text().split()
    assert folder == str(run) and recipe.load(saved).seed == 7
    assert (Path(code) / "dsasr" / "train.py").is_file() and Path(options[-1]).is_file()
    assert "hf_secret" not in done.stdout + Path(saved).read_text()
    assert command("submit", "eval", "--recipe", tiny).returncode == 2
    monkeypatch.setenv("PATH", "/nowhere")
    assert "there is no sbatch" in command(*words).stderr


def test_credentials_in_a_recipe_are_refused(tiny, tmp_path, command):
    words = ["submit", "train", "--recipe", tiny, f"run={tmp_path / 'run'}", "--no-check"]
    done = command(*words, "data.train.0.shards=https://me:S3CRET@h/x.tar", "--dry-run")
    assert done.returncode == 2 and "${NAME}" in done.stderr
    assert "S3CRET" not in done.stdout + done.stderr and not (tmp_path / "run").exists()
    done = command(*words, "data.train.0.shards='https://me:${PASS}@h/x.tar'", "--dry-run")
    assert done.returncode == 0, done.stderr
