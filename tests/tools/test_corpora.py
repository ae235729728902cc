"""From the archives of public corpora to a score: the scripts on miniatures of the corpora."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

ROOT = Path(__file__).parents[2]
RATE = 16_000


def speak(path: Path, seed: int) -> None:
    rng, time = np.random.default_rng(seed), np.arange(RATE) / RATE
    wave = 0.2 * np.sin(2 * np.pi * (200 + 50 * seed) * time) + 0.01 * rng.standard_normal(RATE)
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wave, RATE)


def archive(path: Path, folder: Path, name: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as file:
        file.add(folder / name, name)


@pytest.fixture
def script(tmp_path):
    """``script(name, *arguments)``: runs it, without installing anything and without a network."""
    shim = tmp_path / "bin" / "dsasr"
    shim.parent.mkdir()
    shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m dsasr.cli "$@"\n')
    shim.chmod(0o755)
    env = {
        **os.environ, "PATH": f"{shim.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT),
        "DSASR_INSTALL": "no", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip

    def run(name: str, *arguments) -> subprocess.CompletedProcess:
        command = ["bash", str(ROOT / "tools" / name), *map(str, arguments)]
        return subprocess.run(
            command, env=env, cwd=tmp_path, text=True, timeout=500,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    return run


def samples(shards: Path) -> dict[str, int]:
    """Utterances of each split."""
    found = shards.glob("*/dataset.json")
    return {path.parent.name: json.loads(path.read_text())["samples"] for path in found}


@pytest.fixture
def librispeech(tmp_path) -> Path:
    """Archives of three splits, of two speakers each, and one whose split --short leaves out."""
    said = ["HE WENT ON", "THE SEA WAS CALM", "NO ONE SPOKE AGAIN"]
    for number, (split, count) in enumerate(
        {"train-clean-100": 8, "dev-clean": 2, "test-clean": 3, "test-other": 2}.items()
    ):
        for speaker in (10 + number, 20 + number):
            chapter = tmp_path / "made" / "LibriSpeech" / split / str(speaker) / "7"
            keys = [f"{speaker}-7-{i:04d}" for i in range(count)]
            for i, key in enumerate(keys):
                speak(chapter / f"{key}.flac", speaker + i)
            lines = [f"{key} {said[i % 3]}\n" for i, key in enumerate(keys)]
            (chapter / f"{speaker}-7.trans.txt").write_text("".join(lines))
        name = f"LibriSpeech/{split}"
        archive(tmp_path / "downloads" / f"{split}.tar.gz", tmp_path / "made", name)
    return tmp_path / "downloads"


@pytest.fixture
def aishell(tmp_path) -> Path:
    """The archive of three speakers' archives, one of each split, and one more."""
    made, lines = tmp_path / "made", []
    speakers = {"S0002": "train", "S0003": "train", "S0724": "dev", "S0764": "test"}
    for number, (speaker, split) in enumerate(speakers.items()):
        for i in range(8 if split == "train" else 3):
            key = f"BAC009{speaker}W{i:04d}"
            speak(made / "wav" / split / speaker / f"{key}.wav", number + i)
            lines.append(f"{key} {'而 对 楼市 成交'[: 5 + i % 3]}\n")
        tree = made / "data_aishell" / "wav" / f"{speaker}.tar.gz"
        archive(tree, made / "wav", f"{split}/{speaker}")
    table = made / "data_aishell" / "transcript" / "aishell_transcript_v0.8.txt"
    table.parent.mkdir()
    table.write_text("".join(lines), encoding="utf-8")
    archive(tmp_path / "downloads" / "data_aishell.tgz", made, "data_aishell")
    return tmp_path / "downloads"


@pytest.mark.slow
@pytest.mark.launcher
def test_librispeech(script, librispeech, tmp_path):
    out = tmp_path / "out"
    done = script("librispeech.sh", librispeech, out, "--short", "seed=3")
    assert done.returncode == 0, done.stdout[-3000:]
    assert samples(out / "shards") == {"train-clean-100": 16, "dev-clean": 4, "test-clean": 6}
    assert not list((out / "unpacked").glob("*"))
    score = done.stdout.split("== scores")[1].strip().splitlines()[-1]
    assert score.startswith("test-clean") and "6 clips: WER" in score
    assert "seed: 3" in (out / "run" / "recipe.yaml").read_text()
    again = script("librispeech.sh", librispeech, out, "--short", "seed=3")
    assert again.returncode == 0, again.stdout[-3000:]
    assert "is trained already" in again.stdout and "unpacking" not in again.stdout
    assert again.stdout.strip().splitlines()[-1] == score


@pytest.mark.slow
@pytest.mark.launcher
def test_aishell(script, aishell, tmp_path):
    out = tmp_path / "out"
    done = script("aishell.sh", aishell, out, "--short")
    assert done.returncode == 0, done.stdout[-3000:]
    assert samples(out / "shards") == {"train": 8, "dev": 3, "test": 3}  # three speakers
    assert not (out / "unpacked").exists() and not (out / "data_aishell").exists()
    score = done.stdout.strip().splitlines()[-1]
    assert score.startswith("test ") and "3 clips: " in score and "CER" in score


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("librispeech.sh", ("empty",), "has no train data: download train-"),
        ("aishell.sh", ("empty",), "has no data_aishell.tgz: download it"),
        ("aishell.sh", ("nowhere",), "there is no folder"),
        ("aishell.sh", (), "usage: bash tools/aishell.sh"),
        ("librispeech.sh", ("empty", "out", "third"), "one folder too many"),
        ("librispeech.sh", ("empty", "--fast"), "unknown option --fast"),
    ],
)
def test_what_is_missing_is_one_line(script, tmp_path, name, arguments, message):
    (tmp_path / "empty").mkdir()
    done = script(name, *arguments, *(["out"] if len(arguments) == 1 else []))
    assert done.returncode == 2
    assert message in next(x for x in done.stdout.splitlines() if x.startswith("error: "))
