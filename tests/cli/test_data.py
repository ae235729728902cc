"""`dsasr data …`: what the commands print, their exit codes, one line for a mistake."""

import errno
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from dsasr.data.audio.decoding import decode
from dsasr.data.audio.features import Cmvn, FbankConfig, fbank
from dsasr.data.shards.build_index import build_index, find_tars
from dsasr.data.shards.sample import read_sample
from dsasr.data.shards.writer import (
    PackedSample,
    read_dataset,
    shard_summary,
    write_dataset,
    write_shard,
)
from dsasr.data.text import espeak
from dsasr.data.text.phoneme_vocab import PhonemeVocab

RATE = 16_000


@pytest.fixture(scope="module")
def data(command):
    """``data("verify", …, check=0)``: what ``dsasr data verify …`` prints when it ends with 0."""

    def run(*words, check: int = 0) -> str:
        done = command("data", *words)
        assert done.returncode == check, done.stderr
        return done.stdout

    return run


@pytest.fixture(scope="module")
def refused(command):
    """``refused("verify", …)``: the one line that a mistake ends in."""

    def run(*words) -> str:
        done = command("data", *words)
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
        assert not done.stdout
        return done.stderr

    return run


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
def packed(tmp_path_factory, data) -> Path:
    """``train`` of 7 samples in 3 shards and ``test`` of 2 in one, packed by one call."""
    folder = tmp_path_factory.mktemp("packed")
    sources = manifest(folder, "train"), manifest(folder, "test", 2)
    options = ("--out-root", folder / "shards", "--shard-size", 3)
    first = data("make-shards", *sources, *options).splitlines()
    assert [line.split(", ")[0] for line in first] == [
        f"{folder}/shards/train: 7 samples in 3 shards",
        f"{folder}/shards/test: 2 samples in 1 shards",
    ]
    stamps = [p.stat().st_mtime_ns for p in sorted((folder / "shards").rglob("*"))]
    again = data("make-shards", *sources, *options).splitlines()
    assert all("is packed already: " in line for line in again) and len(again) == 2
    assert [p.stat().st_mtime_ns for p in sorted((folder / "shards").rglob("*"))] == stamps
    return folder / "shards"


def test_packing_prints_what_it_left_out(tmp_path, data):
    source = manifest(tmp_path, "a", 3)
    (tmp_path / "a" / "1.flac").write_bytes(b"no audio")
    printed = data("make-shards", source, "--out", tmp_path / "out")
    assert "2 samples in 1 shards" in printed
    assert f"1 left out, see {tmp_path}/out/bad_samples.jsonl" in printed
    bad = json.loads((tmp_path / "out" / "bad_samples.jsonl").read_text())
    assert (bad["cause"], bad["key"]) == ("decode_error", "a-1")
    assert bad["detail"].startswith("Format not")  # libsndfile's words


def test_packing_refuses_mistakes(tmp_path, packed, command, refused):
    a, b = manifest(tmp_path / "one", "a", 1), manifest(tmp_path / "two", "a", 1)
    out = tmp_path / "out"
    assert "there is no" in refused("make-shards", tmp_path / "gone", "--out", out)
    assert "--out-root" in refused("make-shards", a, b, "--out", out)
    assert "two sources are called 'a'" in refused("make-shards", a, b, "--out-root", out)
    assert "other shards" in refused("make-shards", a, "--out", packed / "train")
    assert "shard size" in refused("make-shards", a, "--out", out, "--shard-size", "big")
    assert "at least 1" in refused("make-shards", a, "--out", out, "--processes", 0)
    assert "unknown manifest kind" in refused("make-shards", a, "--out", out, "--kind", "csv")
    assert "seed" in refused("make-shards", a, "--out", out, "--seed", -1)
    usage = command("data", "make-shards", a)
    assert usage.returncode == 2 and "one of the arguments --out --out-root" in usage.stderr


@pytest.mark.parametrize("words", ["--help", "data cmvn --help", "data make-shards"])
def test_no_torch_is_imported(tmp_path, data, words):
    """A packed corpus is packed again: only what writes tars (webdataset) imports torch."""
    words = words.split()
    if words[-1] == "make-shards":
        sources = [str(manifest(tmp_path, "a", 2)), "--out", str(tmp_path / "out")]
        data("make-shards", *sources)
        words += sources
    code = (
        "import sys\n"
        "from dsasr.cli.main import main\n"
        "try:\n"
        "    code = main(sys.argv[1:])\n"
        "except SystemExit as end:\n"
        "    code = end.code\n"
        "sys.exit('torch was imported' if 'torch' in sys.modules else code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_verifying(packed, data):
    result = json.loads(data("verify", packed / "train", packed / "test", "--json"))
    assert (result["good"], result["bad"], result["causes"]) == (9, [], {})
    assert result["hours"] == pytest.approx(
        sum(read_dataset(packed / name)["hours"] for name in ("train", "test")), abs=1e-4
    )
    text = data("verify", packed / "train")
    assert text.startswith("3 shards, 7 good samples") and text.endswith("bad: none\n")


def encoded(seconds: float, form: str = "FLAC") -> bytes:
    buffer = io.BytesIO()
    wave = np.random.default_rng(0).standard_normal(int(seconds * RATE)) * 0.1
    soundfile.write(buffer, wave, RATE, format=form)
    return buffer.getvalue()


def test_verifying_finds_each_planted_fault(tmp_path, data):
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
    content = (tmp_path / "c.tar").read_bytes()
    (tmp_path / "c.tar").write_bytes(content[: build_index(content).entry(1).audio_offset + 9])
    result = json.loads(data("verify", tmp_path, "--json", check=1))
    assert {(b["shard"], b["key"], b["cause"]) for b in result["bad"]} == {
        ("a.tar", "broken", "decode_error"), ("a.tar", "mute", "empty_text"),
        ("b.tar", "liar", "wrong_duration"), ("b.tar", "noise", "decode_error"),
        ("b.tar", "empty", "empty_audio"), ("c.tar", "", "truncated_tar"),
        ("c.tar", "", "missing_samples"), ("c.tar", "", "bad_index"),
        ("d.tar", "", "missing_shard"), ("e.tar", "", "unlisted_shard"),
    }  # fmt: skip
    assert result["good"] == 3  # good, one, unlisted
    assert sum(result["causes"].values()) == len(result["bad"])
    text = data("verify", tmp_path, check=1).splitlines()
    assert any(line.startswith("b.tar\tliar\twrong_duration\t") for line in text)
    assert "bad: " in text[-1] and "decode_error 2" in text[-1]


def test_verifying_refuses_mistakes(tmp_path, refused):
    assert "no .tar" in refused("verify", tmp_path)


def test_cmvn_is_that_of_all_frames(tmp_path, packed, data):
    printed = data("cmvn", packed / "train", "--out", tmp_path / "c.json", "--processes", 2)
    cfg = FbankConfig()
    frames = torch.cat([
        fbank(decode(read_sample(tar, entry).audio), cfg)
        for tar in find_tars([packed / "train"]) for entry in build_index(tar)
    ]).double()  # fmt: skip
    assert f"{len(frames)} frames of 3 shards" in printed
    cmvn = Cmvn.load(tmp_path / "c.json")
    assert torch.allclose(cmvn.mean_F, frames.mean(0), rtol=1e-12)
    assert torch.allclose(cmvn.std_F, frames.std(0, correction=0), rtol=1e-9)
    serial = ("--out", tmp_path / "d.json", "--processes", 1)
    data("cmvn", packed / "train", *serial)
    assert (tmp_path / "c.json").read_bytes() == (tmp_path / "d.json").read_bytes()


def test_cmvn_refuses_mistakes(tmp_path, packed, refused):
    out = tmp_path / "c.json"
    assert "cannot be written" in refused("cmvn", packed / "test", "--out", tmp_path)
    (tmp_path / "x.tar").write_bytes(b"no tar")
    assert "truncated_tar 1" in refused("cmvn", tmp_path / "x.tar", "--out", out)
    assert not out.exists()


def test_phonemes_are_those_of_the_shards(tmp_path, packed, data):
    printed = data("phonemes", packed / "train", "--out", tmp_path / "p.json")
    assert printed == f"{tmp_path}/p.json: 5 symbols, blank included\n"
    assert PhonemeVocab.load(tmp_path / "p.json").symbols[1:] == ("t", "ə0", "ə1", "ə2")


def test_phonemes_by_a_lexicon_count_what_it_lacks(tmp_path, packed, data):
    (tmp_path / "lexicon").write_text("TEXT T EH1 K S T\n")
    options = ("--kind", "lexicon", "--lexicon", tmp_path / "lexicon", "--out", tmp_path / "p.json")
    samples = [PackedSample(k, "flac", b"x", {"text": k, "lang": "en", "duration": 1.0})
               for k in ("text", "missing")]  # fmt: skip
    write_shard(tmp_path / "x.tar", samples)
    printed = data("phonemes", tmp_path / "x.tar", *options)
    assert "1 samples left out: unknown word 'missing' 1" in printed
    assert set(PhonemeVocab.load(tmp_path / "p.json").symbols[1:]) >= {"T", "K", "S"}


@pytest.mark.skipif(not espeak.available(), reason="espeakng-loader not installed")
def test_phonemes_by_espeak_name_the_languages_it_lacks(tmp_path, data):
    texts = {"a": ("GIVE IT UP", "en"), "b": ("ich", "de"), "c": ("up", "english")}
    samples = [PackedSample(k, "flac", b"x", {"text": t, "lang": lang, "duration": 1.0})
               for k, (t, lang) in texts.items()]  # fmt: skip
    write_shard(tmp_path / "x.tar", samples)
    out = tmp_path / "p.json"
    printed = data("phonemes", tmp_path / "x.tar", "--out", out, "--kind", "espeak")
    assert "1 samples of language 'english'" in printed and printed.count("samples of") == 1
    assert set(PhonemeVocab.load(out).symbols[1:]) == set("ɡ ɪ v ɾ ʌ p ç".split())  # noqa: SIM905


def test_phonemes_refuse_mistakes(tmp_path, refused):
    samples = [PackedSample("a", "flac", b"x", {"text": "hi", "duration": 1.0})]
    write_shard(tmp_path / "x.tar", samples)
    out = ("--out", tmp_path / "p.json")
    assert "no stored phonemes 1" in refused("phonemes", tmp_path / "x.tar", *out)
    assert "needs lexicons" in refused("phonemes", tmp_path / "x.tar", *out, "--kind", "lexicon")
    assert "use stored, espeak, lexicon, characters or tokens" in refused(
        "phonemes", tmp_path / "x.tar", *out, "--kind", "guess"
    )
    assert not (tmp_path / "p.json").exists()


def test_tars_that_cannot_be_read_are_one_line(tmp_path, command):
    (tmp_path / "x.tar").mkdir()
    out = tmp_path / "out.json"
    for words in (
        ("cmvn", tmp_path, "--out", out),
        ("phonemes", tmp_path, "--out", out, "--kind", "characters"),
        ("index", tmp_path),
    ):
        done = command("data", *words)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert "x.tar cannot be" in done.stderr
    assert "unreadable" in command("data", "verify", tmp_path).stdout
    assert not out.exists()


def test_a_full_disk_is_one_line(tmp_path, command, monkeypatch):
    values = {"text": "hello", "lang": "en", "speaker": "s", "duration": 1.0}
    write_shard(tmp_path / "x.tar", [PackedSample("a", "flac", encoded(1.0), values)])
    (tmp_path / "t.txt").write_text("hello there\n" * 50)

    def full(*_: object):
        raise OSError(errno.ENOSPC, "No space left on device", "out.json")

    for name in ("data.audio.features", "data.text.phoneme_vocab", "data.text.train_tokenizer"):
        monkeypatch.setattr(f"dsasr.{name}.atomic_write", full)
    out = tmp_path / "out.json"
    for words in (
        ("cmvn", tmp_path, "--out", out),
        ("phonemes", tmp_path, "--out", out, "--kind", "characters"),
        ("tokenizer", tmp_path / "t.txt", "--out", tmp_path / "t", "--size", "400"),
    ):
        done = command("data", *words)
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1] == "failed: out.json: No space left on device"
