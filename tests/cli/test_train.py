"""`dsasr train`: what it prints of a run; the launcher's own tests are in tests/launch."""

from __future__ import annotations

import pytest


@pytest.mark.launcher
def test_a_run_is_trained_without_the_launchers_chatter(training):
    folder, output = training
    assert '"event": "finished"' in (folder / "events.jsonl").read_text().splitlines()[-1]
    assert "pretrain" in output and "[INFO]" not in output and "last lines" not in output


def test_a_recipe_is_checked_without_ranks(command, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")  # train.py sets it
    recipe = "--recipe", tiny, f"run={tmp_path / 'run'}"
    done = command("train", *recipe, "--check")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert lines[0].endswith("steps: pretrain 20, align 4, ia_sft 14, joint 4")
    titles = {line.split()[0]: number for number, line in enumerate(lines) if line[:2].isupper()}
    assert list(titles) == ["DATA", "SAMPLES", "TEXT", "PROMPT", "LLM", "PLAN"]
    prompt = " ".join(line.strip() for line in lines[titles["PROMPT"] : titles["LLM"]])
    assert prompt.startswith("PROMPT  11 tokens: [<|im_start|>][system\\nYou are a Multilingual")
    assert "[user\\nTranscribe the speech into text ] <speech>" in prompt
    assert "a transcript ends with [<|im_end|>]" in prompt
    assert lines[-1] == "the recipe and its files are in order"
    assert len(lines) < 45 and max(map(len, lines[1:-5])) <= 100
    done = command("train", *recipe, "data.cmvn=missing.json", "--check")
    assert done.returncode == 2 and "make it with `dsasr data cmvn`" in done.stderr
    assert not (tmp_path / "run").exists()
    reads_ctc = "branch=sft", "model.adaptor={kind: ctc}", "data.phonemes=''"
    done = command("train", *recipe, *reads_ctc, "--check")
    assert done.returncode == 2 and "data.phonemes is not given: make it with" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    done = command("train", *recipe, "model.adaptor={kind: qformer, heads: 3}", "--check")
    assert done.returncode == 2 and "heads=3 does not divide" in done.stderr


def test_mistakes_end_before_a_rank_is_started(command, tmp_path):
    done = command("train", "--recipe", "demo", "--hostfile", tmp_path / "hosts")
    assert done.returncode == 2 and "there is no hostfile" in done.stderr
    assert command("train").returncode == 2
