"""Datasets of which no sample is usable are refused before training, with the cause."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

from dsasr import recipe
from dsasr.build import Builder
from dsasr.training import first_samples
from dsasr.utils.errors import UserError

BAD = b"fLaC" + bytes(4000)


def flac(seconds: float) -> bytes:
    buffer = io.BytesIO()
    wave = np.random.default_rng(0).normal(0, 0.1, int(16000 * seconds)).astype(np.float32)
    soundfile.write(buffer, wave, 16000, format="FLAC")
    return buffer.getvalue()


def tar(path: Path, *members: tuple[str, bytes]) -> Path:
    with tarfile.open(path, "w") as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def meta(seconds: float, phonemes: str = "ba") -> bytes:
    values = {"text": "ba", "lang": "en", "speaker": "s", "duration": seconds}
    return json.dumps(values | {"phonemes": list(phonemes)}).encode()


@pytest.fixture
def check(tiny, monkeypatch, tmp_path):
    """``check(*overrides)``: of the tiny recipe, whose indexes are cached in the test's folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(*overrides: str) -> None:
        first_samples.check(Builder(recipe.load(str(tiny), list(overrides))))

    return run


def refusal(check, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        check(*overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_can_be_trained_on_passes(check):
    check()
    for branch in ("pretrain", "sft"):
        check(f"branch={branch}")


@pytest.mark.parametrize(
    ("limit", "says"),
    [
        ("max_seconds=0.2", "too_long"),
        ("frames=20", "(batch.frames)"),
        ("min_seconds=9", "(batch.min_seconds)"),
        ("max_chars=1", "(batch.max_chars)"),
        ("tokens=42", "42 tokens (batch.tokens)"),
    ],
)
def test_limits_that_leave_out_everything(check, limit, says):
    message = refusal(check, f"data.dataloader.batch.{limit}")
    assert message.startswith("data.train.tiny: no usable sample: all") and says in message


def test_damaged_recordings(check, tmp_path):
    bad = tar(tmp_path / "bad.tar", ("a.flac", BAD), ("a.json", meta(0.5)))
    message = refusal(check, f"data.train.tiny.shards={bad}")
    assert "data.train.tiny: no usable sample: all 1 were dropped (decode_error 1)" in message
    message = refusal(check, f"data.valid.valid.shards={bad}")
    assert message.startswith("data.valid.valid") and f"a in {bad}" in message
    good = tar(tmp_path / "good.tar", ("a.flac", flac(0.5)), ("a.json", meta(0.5)))
    check(f"data.train.tiny.shards=[{bad}, {good}]")


def test_shards_of_another_kind(check, tmp_path):
    foreign = tar(tmp_path / "x.tar", ("a.flac", flac(0.5)), ("a.txt", b"ba"))
    message = refusal(check, f"data.train.tiny.shards={foreign}")
    assert "missing_json 1" in message and "a json member of the same name" in message
    empty = tar(tmp_path / "y.tar", ("readme", b"nothing"))
    message = refusal(check, f"data.train.tiny.shards={empty}")
    assert "no audio with a json member of the same name" in message


def test_audio_too_short_for_its_units(check, tmp_path):
    short = tar(tmp_path / "x.tar", ("a.flac", flac(0.2)), ("a.json", meta(0.2, "ba" * 20)))
    message = refusal(check, f"data.train.tiny.shards={short}")
    assert "too_few_frames 1" in message and "CTC needs 40 for 40 units" in message
    # Neither validation nor the language model needs a frame for each.
    check(f"data.valid.valid.shards={short}")
    sft = ["branch=sft", "data.dataloader.batch.min_seconds=0.05"]
    check(f"data.train.tiny.shards={short}", *sft)


def test_transcripts_that_no_phonemizer_reads(check, tmp_path):
    (tmp_path / "words").write_text("zu z u\n")
    message = refusal(
        check, f"data.phonemizer={{kind: lexicon, lexicons: ['{tmp_path / 'words'}']}}"
    )
    assert "unknown_word" in message


def test_a_shard_that_cannot_be_read(check, tmp_path):
    remote = "http://127.0.0.1:9/x.tar"
    options = ["data.dataloader.source.attempts=1", f"data.train.tiny.shards={remote}"]
    assert "data.train.tiny: cannot read http://127.0.0.1:9/x" in refusal(check, *options)


def test_phonemes_made_one_way_and_read_another(check, tmp_path):
    """A few transcripts of symbols that both ways share would pass, and training find no others."""
    samples = [("ok.flac", flac(0.5)), ("ok.json", meta(0.5))]
    for i in range(9):
        samples += [(f"{i}.flac", flac(0.5)), (f"{i}.json", meta(0.5, "bɛ"))]
    mixed = tar(tmp_path / "x.tar", *samples)
    message = refusal(check, f"data.train.tiny.shards={mixed}")
    assert message.startswith("data.train.tiny: data.phonemizer.kind=stored and data.phonemes=")
    assert "9 of 10 have no labels (unknown_phoneme 9" in message and "'ɛ'" in message
    assert "--kind stored" in message
    check(f"data.train.tiny.shards={mixed}", "branch=sft")


def test_the_kind_that_fits_is_named(check, tmp_path):
    """The vocabulary is that of the shards' phonemes, the recipe has another phonemizer."""
    words = tmp_path / "words"
    words.write_text("ba z\nok b a\n")
    said = json.dumps({"text": "ba", "lang": "en", "duration": 0.5, "phonemes": ["b", "a"]})
    passes = json.dumps({"text": "ok", "lang": "en", "duration": 0.5, "phonemes": ["b", "a"]})
    samples = [("ok.flac", flac(0.5)), ("ok.json", passes.encode())]
    for i in range(5):
        samples += [(f"{i}.flac", flac(0.5)), (f"{i}.json", said.encode())]
    shard = tar(tmp_path / "x.tar", *samples)
    message = refusal(
        check,
        f"data.train.tiny.shards={shard}",
        f"data.phonemizer={{kind: lexicon, lexicons: ['{words}']}}",
    )
    assert "they fit data.phonemizer.kind=stored" in message
