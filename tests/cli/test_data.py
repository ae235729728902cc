"""The data tools as a user starts them: what they print, exit codes, one line for a mistake."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from dsasr.data.audio.features import Cmvn, FbankConfig, decode, fbank
from dsasr.data.shards.index import build_index, find_tars, read_sample
from dsasr.data.shards.writer import (
    PackedSample,
    read_dataset,
    shard_summary,
    write_dataset,
    write_shard,
)
from dsasr.data.text.phonemes import PhonemeVocab

RATE = 16_000
ROOT = Path(__file__).resolve().parents[2]


def tool(name: str, *args, check: int = 0) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools" / name), *map(str, args)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == check, done.stderr
    return done


def refused(name: str, *args) -> str:
    """The one line that a mistake ends in."""
    done = tool(name, *args, check=2)
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert not done.stdout
    return done.stderr


def manifest(folder: Path, name: str, count: int = 7) -> Path:
    rng, lines = np.random.default_rng(count), []
    (folder / name).mkdir(parents=True)
    for i in range(count):
        wave = (rng.standard_normal(2000 + 800 * i) * 3000).astype(np.int16)
        soundfile.write(folder / name / f"{i}.flac", wave, RATE)
        row = {"id": f"{name}-{i}", "audio": f"{name}/{i}.flac", "text": f"text {i}", "lang": "en"}
        lines.append(json.dumps(row | {"phonemes": ["t", f"ə{i % 3}"]}))
    (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder / f"{name}.jsonl"


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """``train`` of 7 samples in 3 shards and ``test`` of 2 in one, packed by one call."""
    folder = tmp_path_factory.mktemp("packed")
    sources = manifest(folder, "train"), manifest(folder, "test", 2)
    options = ("--out-root", folder / "shards", "--shard-size", 3)
    first = tool("make_shards.py", *sources, *options).stdout.splitlines()
    assert [line.split(", ")[0] for line in first] == [
        f"{folder}/shards/train: 7 samples in 3 shards",
        f"{folder}/shards/test: 2 samples in 1 shards",
    ]
    stamps = [p.stat().st_mtime_ns for p in sorted((folder / "shards").rglob("*"))]
    again = tool("make_shards.py", *sources, *options).stdout.splitlines()
    assert all("is packed already: " in line for line in again) and len(again) == 2
    assert [p.stat().st_mtime_ns for p in sorted((folder / "shards").rglob("*"))] == stamps
    return folder / "shards"


def test_packing_tells_what_it_left_out(tmp_path):
    source = manifest(tmp_path, "a", 3)
    (tmp_path / "a" / "1.flac").write_bytes(b"no audio")
    told = tool("make_shards.py", source, "--out", tmp_path / "out").stdout
    assert "2 samples in 1 shards" in told
    assert f"1 left out, see {tmp_path}/out/bad_samples.jsonl" in told
    bad = json.loads((tmp_path / "out" / "bad_samples.jsonl").read_text())
    assert (bad["cause"], bad["key"], bad["detail"]) == (
        "decode_error", "a-1", "Format not recognized.",
    )  # fmt: skip


def test_packing_refuses_mistakes(tmp_path, packed):
    a, b = manifest(tmp_path / "one", "a", 1), manifest(tmp_path / "two", "a", 1)
    out = tmp_path / "out"
    assert "there is no" in refused("make_shards.py", tmp_path / "gone", "--out", out)
    assert "--out-root" in refused("make_shards.py", a, b, "--out", out)
    assert "two sources are called 'a'" in refused("make_shards.py", a, b, "--out-root", out)
    assert "other shards" in refused("make_shards.py", a, "--out", packed / "train")
    assert "shard size" in refused("make_shards.py", a, "--out", out, "--shard-size", "big")
    assert "at least 1" in refused("make_shards.py", a, "--out", out, "--processes", 0)
    assert "unknown manifest kind" in refused("make_shards.py", a, "--out", out, "--kind", "csv")
    assert "seed" in refused("make_shards.py", a, "--out", out, "--seed", -1)
    assert "usage" in tool("make_shards.py", a, check=2).stderr


def test_tools_that_need_no_torch_import_none():
    for modules in ("shards.manifests, shards.pack", "text.phonemes, shards.index, shards.writer"):
        code = "; ".join(f"import dsasr.data.{name}" for name in modules.split(", "))
        code += "; import sys; sys.exit('torch' in sys.modules)"
        subprocess.run([sys.executable, "-c", code], check=True)


def test_verifying(packed):
    told = json.loads(tool("verify_shards.py", packed / "train", packed / "test", "--json").stdout)
    assert (told["good"], told["bad"], told["causes"]) == (9, [], {})
    assert told["hours"] == pytest.approx(
        sum(read_dataset(packed / name)["hours"] for name in ("train", "test")), abs=1e-4
    )
    text = tool("verify_shards.py", packed / "train").stdout
    assert text.startswith("3 shards, 7 good samples") and text.endswith("bad: none\n")


def encoded(seconds: float, form: str = "FLAC") -> bytes:
    buffer = io.BytesIO()
    wave = np.random.default_rng(0).standard_normal(int(seconds * RATE)) * 0.1
    soundfile.write(buffer, wave, RATE, format=form)
    return buffer.getvalue()


def test_verifying_finds_each_planted_fault(tmp_path):
    def sample(key, audio=None, text="x", seconds=0.5):
        values = {"text": text, "lang": "en", "speaker": "s", "duration": seconds}
        return PackedSample(key, "flac", encoded(0.5) if audio is None else audio, values)

    hurt = bytearray(encoded(2.0))
    hurt[len(hurt) // 2] ^= 0xFF
    contents = {
        "a": [sample("good"), sample("broken", bytes(hurt), seconds=2.0), sample("mute", text=" ")],
        "b": [
            sample("liar", seconds=9.0),
            sample("noise", b"\0" * 999),
            sample("empty", encoded(0, "WAV")),
        ],
        "c": [sample("one"), sample("two"), sample("three")],
        "d": [sample("lost")],
        "e": [sample("unlisted")],
    }
    rows = []
    for name, samples in contents.items():
        tar = tmp_path / f"{name}.tar"
        rows.append(shard_summary(tar, write_shard(tar, samples)))
    write_dataset(tmp_path, rows[:4], 1)
    (tmp_path / "d.tar").unlink()
    data = (tmp_path / "c.tar").read_bytes()
    (tmp_path / "c.tar").write_bytes(data[: build_index(data).entry(1).audio_offset + 9])
    done = tool("verify_shards.py", tmp_path, "--json", check=1)
    told = json.loads(done.stdout)
    assert {(b["shard"], b["key"], b["cause"]) for b in told["bad"]} == {
        ("a.tar", "broken", "decode_error"), ("a.tar", "mute", "empty_text"),
        ("b.tar", "liar", "wrong_duration"), ("b.tar", "noise", "decode_error"),
        ("b.tar", "empty", "empty_audio"), ("c.tar", "", "truncated_tar"),
        ("c.tar", "", "missing_samples"), ("c.tar", "", "bad_index"),
        ("d.tar", "", "missing_shard"), ("e.tar", "", "unlisted_shard"),
    }  # fmt: skip
    assert told["good"] == 3  # good, one, unlisted
    assert sum(told["causes"].values()) == len(told["bad"])
    text = tool("verify_shards.py", tmp_path, check=1).stdout.splitlines()
    assert any(line.startswith("b.tar\tliar\twrong_duration\t") for line in text)
    assert "bad: " in text[-1] and "decode_error 2" in text[-1]


def test_verifying_refuses_mistakes(tmp_path):
    assert "no .tar" in refused("verify_shards.py", tmp_path)


def test_cmvn_is_that_of_all_frames(tmp_path, packed):
    told = tool("cmvn.py", packed / "train", "--out", tmp_path / "c.json", "--processes", 2).stdout
    cfg = FbankConfig()
    frames = torch.cat([
        fbank(decode(read_sample(tar, entry).audio), cfg)
        for tar in find_tars([packed / "train"]) for entry in build_index(tar)
    ]).double()  # fmt: skip
    assert f"{len(frames)} frames of 3 shards" in told
    made = Cmvn.load(tmp_path / "c.json")
    assert torch.allclose(made.mean_F, frames.mean(0), rtol=1e-12)
    assert torch.allclose(made.std_F, frames.std(0, correction=0), rtol=1e-9)
    serial = ("--out", tmp_path / "d.json", "--processes", 1)
    tool("cmvn.py", packed / "train", *serial)
    assert (tmp_path / "c.json").read_bytes() == (tmp_path / "d.json").read_bytes()


def test_cmvn_refuses_mistakes(tmp_path, packed):
    out = tmp_path / "c.json"
    assert "cannot be written" in refused("cmvn.py", packed / "test", "--out", tmp_path)
    (tmp_path / "x.tar").write_bytes(b"no tar")
    assert "truncated_tar 1" in refused("cmvn.py", tmp_path / "x.tar", "--out", out)
    assert not out.exists()


def test_phonemes_are_those_of_the_shards(tmp_path, packed):
    told = tool("make_phonemes.py", packed / "train", "--out", tmp_path / "p.json").stdout
    assert told == f"{tmp_path}/p.json: 5 symbols, blank included\n"
    assert PhonemeVocab.load(tmp_path / "p.json").symbols[1:] == ("t", "ə0", "ə1", "ə2")


def test_phonemes_by_a_lexicon_count_what_it_lacks(tmp_path, packed):
    (tmp_path / "lexicon").write_text("TEXT T EH1 K S T\n")
    options = ("--kind", "lexicon", "--lexicon", tmp_path / "lexicon", "--out", tmp_path / "p.json")
    samples = [PackedSample(k, "flac", b"x", {"text": k, "lang": "en", "duration": 1.0})
               for k in ("text", "missing")]  # fmt: skip
    write_shard(tmp_path / "x.tar", samples)
    told = tool("make_phonemes.py", tmp_path / "x.tar", *options).stdout
    assert "1 samples left out: unknown word 'missing' 1" in told
    assert set(PhonemeVocab.load(tmp_path / "p.json").symbols[1:]) >= {"T", "K", "S"}


def test_phonemes_refuse_mistakes(tmp_path):
    write_shard(
        tmp_path / "x.tar", [PackedSample("a", "flac", b"x", {"text": "hi", "duration": 1.0})]
    )
    out = ("--out", tmp_path / "p.json")
    assert "no stored phonemes 1" in refused("make_phonemes.py", tmp_path / "x.tar", *out)
    assert "needs lexicons" in refused(
        "make_phonemes.py", tmp_path / "x.tar", *out, "--kind", "lexicon"
    )
    assert "use stored, espeak, lexicon or characters" in refused(
        "make_phonemes.py", tmp_path / "x.tar", *out, "--kind", "guess"
    )
    assert not (tmp_path / "p.json").exists()
