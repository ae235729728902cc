"""Small corpora in the layouts that people have, and tiny models to train on them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

RATE = 16_000
WORDS = ("ba", "do", "fi", "gu", "ke", "lo", "mi", "nu")


def audio(path: Path, number: int = 1, seconds: float = 0.6) -> Path:
    """Noise of its own for each number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    wave = np.random.default_rng(number).standard_normal(int(seconds * RATE)) * 3000
    soundfile.write(path, wave.astype(np.int16), RATE, format=path.suffix[1:].upper())
    return path


def sentence(number: int) -> str:
    """A sentence of its own for each number."""
    return " ".join(WORDS[(number // 8**place) % 8] for place in range(3, -1, -1))


def rows(count: int, speakers: int = 1, first: int = 0) -> list[dict]:
    """Rows of a JSONL manifest, without audio."""
    return [
        {"id": f"u{n:03d}", "audio": f"audio/u{n:03d}.wav", "text": sentence(n),
         "speaker": f"s{n % speakers}" if speakers else "", "lang": "en"}
        for n in range(first, first + count)
    ]  # fmt: skip


def jsonl(path: Path, lines: list[dict], with_audio: bool = True) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    for number, line in enumerate(lines if with_audio else ()):
        name = line.get("audio") or line.get("audio_filepath")
        audio(path.parent / name, number)
    return path


def librispeech(folder: Path, **splits: int) -> Path:
    """``train_clean_100=12``: so many utterances of three speakers in that split."""
    for place, (name, count) in enumerate(splits.items()):
        for speaker in range(3):
            chapter = f"{100 + 10 * place + speaker}-1"
            here = folder / name.replace("_", "-") / chapter.replace("-", "/")
            lines = []
            for n in range(count // 3):
                key = f"{chapter}-{n:04d}"
                audio(here / f"{key}.flac", 1000 * place + 100 * speaker + n)
                lines.append(f"{key} {sentence(64 * place + 20 * speaker + n).upper()}\n")
            (here / f"{chapter}.trans.txt").write_text("".join(lines))
    return folder


def aishell(folder: Path, **splits: int) -> Path:
    lines = []
    for place, (name, count) in enumerate(splits.items()):
        for n in range(count):
            key = f"BAC009S{place:03d}{n % 3}W{n:04d}"
            audio(folder / "wav" / name / f"S{place:03d}{n % 3}" / f"{key}.wav", 100 * place + n)
            lines.append(f"{key} 今天 天气 {chr(0x4E00 + n)}\n")
    (folder / "transcript").mkdir()
    (folder / "transcript" / "aishell_transcript_v0.8.txt").write_text("".join(lines))
    return folder


def common_voice(folder: Path, **splits: int) -> Path:
    for place, (name, count) in enumerate(splits.items()):
        with open(folder / f"{name}.tsv", "w", encoding="utf-8") as file:
            file.write("client_id\tpath\tsentence\tlocale\n")
            for n in range(count):
                audio(folder / "clips" / f"{name}{n}.mp3", 100 * place + n)
                file.write(f"c{place}{n % 4}\t{name}{n}.mp3\t{sentence(80 * place + n)}.\ten\n")
    return folder


def audio_folder(folder: Path, **splits: int) -> Path:
    for place, (name, count) in enumerate(splits.items()):
        lines = [["file_name", "transcription", "speaker_id"]]
        for n in range(count):
            audio(folder / name / f"{n}.wav", 100 * place + n)
            lines.append([f"{n}.wav", sentence(80 * place + n), f"{name}{n % 4}"])
        with open(folder / name / "metadata.csv", "w", newline="") as file:
            csv.writer(file).writerows(lines)
    return folder


def kaldi(folder: Path, **splits: int) -> Path:
    for place, (name, count) in enumerate(splits.items()):
        here = folder / name
        here.mkdir(parents=True)
        keys = [f"{name}{n}" for n in range(count)]
        for n, key in enumerate(keys):
            audio(here / f"{key}.wav", 100 * place + n)
        tables = {"wav.scp": "{0}.wav", "text": "{1}", "utt2spk": "{2}"}
        for table, form in tables.items():
            lines = [
                f"{key} {form.format(key, sentence(80 * place + n), f'{name}{n % 4}')}\n"
                for n, key in enumerate(keys)
            ]
            (here / table).write_text("".join(lines))
    return folder


@pytest.fixture(scope="session")
def make():
    """The functions above: ``make.kaldi(folder, train=3)`` …"""
    functions = (
        audio,
        sentence,
        rows,
        jsonl,
        librispeech,
        aishell,
        common_voice,
        audio_folder,
        kaldi,
    )
    return SimpleNamespace(**{function.__name__: function for function in functions})


@pytest.fixture(scope="session")
def models(tmp_path_factory, small_whisper) -> dict[str, str]:
    """Folders of a Whisper encoder with random weights, and of a small language model."""
    from dsasr.data.text.train_tokenizer import train_tokenizer
    from dsasr.demo.small_lm import SmallLmConfig, make_small_lm

    folder = tmp_path_factory.mktemp("models")
    (folder / "text").write_text("\n".join(map(sentence, range(400))))
    train_tokenizer([folder / "text"], folder / "tokenizer", size=300)
    shape = SmallLmConfig(
        hidden=16, layers=1, heads=2, kv_heads=1, head_dim=8, ffn=32, steps=2, batch=8
    )
    make_small_lm([folder / "text"], folder / "tokenizer", folder / "lm", shape, progress=False)
    return {"encoder": str(small_whisper), "llm": str(folder / "lm")}
