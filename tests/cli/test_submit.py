"""`dsasr submit`: its plan, and what it gives sbatch."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from dsasr import recipe
from dsasr.cli import submit
from dsasr.utils.errors import UserError


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


@pytest.fixture
def sbatch(tmp_path, monkeypatch):
    """``sbatch("exit 1")``: a script in sbatch's place."""

    def make(script: str) -> None:
        fake = tmp_path / "fake" / "sbatch"
        fake.parent.mkdir(exist_ok=True)
        fake.write_text(f"#!/bin/bash\n{script}\n")
        fake.chmod(0o755)
        monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")

    return make


@pytest.mark.parametrize("job", ["train", "async"])
def test_a_dry_run_shows_the_job_and_what_is_missing(job, tmp_path, monkeypatch, capsys, sbatch):
    monkeypatch.chdir(tmp_path)  # the recipe's files are not here
    words = [job, "--recipe", "nim-2.3b", f"run={tmp_path / 'run'}", "slurm.size.nodes=8"]
    assert submit.main([*words, "--dry-run"]) == 0
    shown, missing = capsys.readouterr().out.split("\nbefore it can be submitted:\n")
    assert "8 × 8 GPUs" in shown and "  sbatch --job-name=dsasr" in shown and "--nodes=8" in shown
    lines = missing.splitlines()
    starts = ["data.cmvn: there is no data/cmvn.json; make it with", "data.phonemes: there is no",
              "model.llm.path", "data.train.all.shards", "data.train.short.shards",
              "data.valid.valid.shards"]  # fmt: skip
    assert len(lines) == len(starts), missing
    assert all(line.strip().startswith(start) for line, start in zip(lines, starts, strict=True))
    sbatch('touch "$RUN.asked"')
    with pytest.raises(UserError, match=r"there is no data/cmvn\.json"):
        submit.main(words)
    assert not (tmp_path / "run.asked").exists() and not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


def test_what_sbatch_refuses_leaves_nothing_behind(tiny, tmp_path, sbatch):
    run = tmp_path / "a" / "run"
    words = ["train", "--recipe", str(tiny), f"run={run}", "--no-check"]
    sbatch('[ -s "$RECIPE" ] && exit 3')
    assert submit.main(words) == 3
    assert not (tmp_path / "a").exists()
    (run / "logs").mkdir(parents=True)
    (run / "submitted.yaml").write_text("of a job that waits")
    assert submit.main(words) == 3
    assert [path.name for path in sorted(run.iterdir())] == ["logs", "submitted.yaml"]
    assert (run / "submitted.yaml").read_text() == "of a job that waits"
    sbatch('[ -s "$RECIPE" ]')
    assert submit.main(words) == 0
    assert recipe.load(str(run / "submitted.yaml")).run == str(run)


def test_a_finished_run_is_not_submitted_again(tiny, trained, sbatch, capsys):
    sbatch("exit 0")
    words = ["train", "--recipe", str(tiny), f"run={trained}"]
    last = recipe.load(str(tiny)).stages[-1]
    more = f"stages.{last.name}.steps={2 * last.steps}"
    with pytest.raises(UserError, match="is finished: give another run=FOLDER") as error:
        submit.main(words)
    assert str(error.value).endswith(f"go on with this one: {more} allow_changed=true")
    assert submit.main([*words, "--dry-run"]) == 0
    assert f"  run={trained} is finished" in capsys.readouterr().out
    assert submit.main([*words, more, "allow_changed=true", "--dry-run"]) == 0
    assert "before it can be submitted" not in capsys.readouterr().out
    assert not (trained / "submitted.yaml").exists()
