"""`dsasr init` as a user has it: one line for a mistake, and two commands to a trained run."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import soundfile


def test_mistakes_end_in_one_line(tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in (["nowhere", "--llm", "x"], [tmp_path, "--dry-run"], [tmp_path]):
        done = command("init", *words)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.launcher
def test_two_commands_to_a_trained_run(tmp_path, tiny, small_whisper, monkeypatch, command):
    """With the language model of the `tiny` recipe and a random Whisper encoder."""
    monkeypatch.chdir(tmp_path)
    rows = []
    for number in range(30):
        wave = np.random.default_rng(number).standard_normal(16_000) * 2000
        soundfile.write(tmp_path / f"{number}.wav", wave.astype(np.int16), 16_000)
        text = " ".join(("ba", "do", "fi", "gu")[(number >> 2 * i) & 3] for i in range(3))
        rows.append({"audio_filepath": f"{number}.wav", "text": text, "duration": 1.0})
    (tmp_path / "manifest.json").write_text("\n".join(map(json.dumps, rows)))
    done = command(
        "init",
        "manifest.json",
        "--llm",
        tiny.parent / "lm",
        "--encoder",
        small_whisper,
        "--lang",
        "en",
    )
    assert done.returncode == 0, done.stderr
    words = next(
        line for line in done.stdout.splitlines() if line.startswith("dsasr train")
    ).split()
    done = subprocess.run(
        [sys.executable, "-m", "dsasr.cli", *words[1:]],
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    lines = [json.loads(x) for x in (tmp_path / "runs/mine-try/metrics.jsonl").open()]
    assert any("wer" in line for line in lines)
