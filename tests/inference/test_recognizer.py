"""Files to text: order, batches, confidence, formats; decoding is replaced by a stand-in."""

from __future__ import annotations

import io
import json
import math
import re
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

from dsasr.data.audio.features import Cmvn, FbankConfig
from dsasr.data.audio.frontends import FbankFrontEnd
from dsasr.data.speech_statistics import SpeechStatistics
from dsasr.evaluation.ctc_scoring import CtcScore
from dsasr.evaluation.decode import DecodeConfig, Hypothesis
from dsasr.inference import recognizer as recognizer_module
from dsasr.inference.loading import limited
from dsasr.inference.recognizer import Recognizer
from dsasr.inference.segmentation import SegmentationConfig
from dsasr.inference.segments import NoSpeechConfig, tokens_of
from dsasr.inference.subtitles import _time
from dsasr.inference.transcript import Token
from dsasr.utils.errors import UserError

ROOT = Path(__file__).parents[2]


class Letters:
    """A tokenizer of one letter a token; tokens 0 and 1 together are one character."""

    end_id = 99

    def decode(self, ids) -> str:
        text = "".join("\N{REPLACEMENT CHARACTER}" if i == 0 else chr(i) for i in ids)
        return text.replace("\N{REPLACEMENT CHARACTER}\x01", "é")


@pytest.fixture
def batches(monkeypatch) -> list[int]:
    """Sizes of the decoded batches; the text of a segment is its length in seconds."""
    sizes: list[int] = []

    def decode(_model, batch, tokenizer, _config, **_options):
        sizes.append(len(batch))
        hypotheses = []
        for key, seconds in zip(batch.keys, batch.durations, strict=True):
            ids = tuple(ord(c) for c in f"{seconds:.1f}")
            entropies = (*(0.1 * i for i in range(len(ids))), 0.0)
            hypotheses.append([Hypothesis(key, ids, tokenizer.decode(ids), -1.0, entropies)])
        return hypotheses

    monkeypatch.setattr("dsasr.inference.recognizer.decode_nbest", decode)
    return sizes


@pytest.fixture
def recognizer() -> Recognizer:
    front_end = FbankFrontEnd(FbankConfig(), Cmvn(torch.zeros(80), torch.ones(80)))
    segmentation = SegmentationConfig(max_seconds=6)
    model = SimpleNamespace(hint=lambda lang: "")  # no language in its prompt
    return Recognizer(model, Letters(), front_end, segmentation, DecodeConfig(), batch_seconds=12)


def loud(seconds: float) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.1, int(16000 * seconds)).astype(np.float32)


def write(path: Path, *parts: float) -> Path:
    """Write speech of ``parts`` seconds, each followed by a second of silence."""
    pause = np.zeros(16000, np.float32)
    wave = np.concatenate([x for s in parts for x in (loud(s), pause)])
    soundfile.write(path, wave, 16000)
    return path


def test_files_come_in_order_and_short_ones_are_decoded_together(recognizer, batches, tmp_path):
    paths = [write(tmp_path / f"{i}.wav", *parts) for i, parts in enumerate(
        [(1.0,), (2.0, 3.0, 5.0), (0.5,), (4.0,)])]  # fmt: skip
    progress: list[float] = []
    transcriptions = list(recognizer.transcribe_all(paths, progress.append))
    assert [Path(t.path).name for t in transcriptions] == ["0.wav", "1.wav", "2.wav", "3.wav"]
    texts = [t.text.split() for t in transcriptions]
    assert [len(words) for words in texts] == [1, 3, 1, 1]
    assert sum(batches) == 6 and max(batches) > 1
    for transcription in transcriptions:
        for before, after in pairwise(transcription.segments):
            assert before.end <= after.start
    assert 17 < sum(progress) < 25


def test_each_file_may_have_its_own_language(recognizer, batches, monkeypatch, tmp_path):
    known = {"": "", "en": "EN", "zh": "ZH"}

    def hint(lang: str) -> str:
        if lang not in known:
            raise UserError(f"the model was not trained with {lang}")
        return known[lang]

    recognizer = replace(recognizer, model=SimpleNamespace(hint=hint))
    seen, decode = [], recognizer_module.decode_nbest

    def look(model, batch, *arguments, **options):
        seen.append((batch.langs, batch.hints))
        return decode(model, batch, *arguments, **options)

    monkeypatch.setattr(recognizer_module, "decode_nbest", look)
    langs = ["zh", "", "de", "en"]
    paths = [write(tmp_path / f"{i}.wav", 1.0) for i in range(4)]
    by_name, failed = dict(zip(map(str, paths), langs, strict=True)), []
    found = list(
        recognizer.transcribe_all(
            paths, on_error=lambda name, error: failed.append((name, str(error))),
            lang=by_name.__getitem__,
        )
    )  # fmt: skip
    assert seen == [(("zh", "", "en"), ("ZH", "", "EN"))]
    assert failed == [(str(paths[2]), "the model was not trained with de")]
    assert [t.segments[0].language for t in found] == ["zh", "", "en"]
    with pytest.raises(UserError, match="with de"):
        recognizer.transcribe(paths[0], lang="de")
    assert recognizer.transcribe(paths[0], lang="en").segments[0].language == "en"


def test_a_list_of_recordings_is_decoded_together(recognizer, batches, tmp_path):
    path = write(tmp_path / "a.wav", 1.0)
    found = recognizer.transcribe([path, path.read_bytes(), torch.zeros(8000)])
    assert [t.text for t in found] == ["1.2", "1.2", ""] and batches[0] == 2
    assert recognizer.transcribe([]) == []
    with pytest.raises(UserError, match="a dict is no recording: give a path"):
        recognizer.transcribe({"path": path})


def test_confidence_and_times(recognizer, batches, tmp_path):
    (segment,) = recognizer.transcribe(write(tmp_path / "a.wav", 2.0)).segments
    assert segment.start == 0.0 and segment.end == pytest.approx(2.2, abs=0.02)
    expected = [Token(c, round(math.exp(-0.1 * i), 4)) for i, c in enumerate("2.2")]
    assert list(segment.tokens) == expected
    mean = (sum(math.exp(-0.1 * i) for i in range(3)) + 1) / 4
    assert segment.confidence == pytest.approx(mean, abs=1e-4)
    assert segment.finished and not segment.no_speech


def test_quiet_or_uncertain_is_probably_no_speech(recognizer, batches, monkeypatch, tmp_path):
    faint = np.concatenate([loud(1.0) * 0.012, np.zeros(16000, np.float32)])
    (segment,) = recognizer.transcribe(faint).segments
    assert segment.no_speech and segment.text  # left out of the transcription's text only
    assert recognizer.transcribe(faint).text == ""
    assert recognizer.transcribe(loud(2.0) * 0.012).segments == ()  # a steady hiss
    uncertain = Hypothesis("0", (65, 66), "AB", -9.0, (3.0, 3.0, 3.0))
    monkeypatch.setattr("dsasr.inference.recognizer.decode_nbest", lambda *_, **__: [[uncertain]])
    assert recognizer.transcribe(write(tmp_path / "a.wav", 1.0)).segments[0].no_speech


@pytest.mark.parametrize(
    ("margin", "entropy", "none"),
    [
        (None, 0.8, False), (None, 1.0, True),  # exp(−1) < 0.4
        (-0.5, 1.0, False), (-0.5, 2.0, True),  # exp(−2) < 0.15
        (-2.9, 0.1, False), (-3.1, 0.1, True),
    ],
)  # fmt: skip
def test_what_the_ctc_head_did_not_hear_is_no_speech(margin, entropy, none):
    score = None if margin is None else CtcScore(-9.0, 2 * margin, 2)
    hypothesis = Hypothesis("0", (65,), "A", -1.0, (entropy,), ctc_score=score)
    rule = NoSpeechConfig()
    assert rule.holds(hypothesis, loudness=-20.0, seconds=1.0) is none
    assert rule.holds(hypothesis, loudness=-60.0, seconds=1.0)
    assert rule.holds(replace(hypothesis, text=" "), loudness=-20.0, seconds=1.0)


def test_less_than_any_word_takes_is_probably_no_speech(recognizer, batches, tmp_path):
    for samples, speaks in ((1, False), (800, False), (4000, True)):
        soundfile.write(tmp_path / "a.wav", loud(samples / 16_000), 16_000, subtype="FLOAT")
        assert bool(recognizer.transcribe(tmp_path / "a.wav").text) is speaks


def test_a_character_of_two_tokens_belongs_to_the_second(recognizer):
    hypothesis = Hypothesis("0", (65, 0, 1, 66), "AéB", -1.0, (0.0, 0.0, 0.0, 0.0, 0.0))
    assert [t.text for t in tokens_of(hypothesis, Letters())] == ["A", "", "é", "B"]


def test_subtitles(recognizer, batches, tmp_path):
    srt = recognizer.transcribe(write(tmp_path / "a.wav", 2.0, 3.0)).to_srt()
    first, second = srt.split("\n\n")
    assert re.fullmatch(r"1\n00:00:00,000 --> 00:00:02,0[01]0\n2\.2", first)
    assert second.startswith("2\n00:00:03,0")
    assert _time(3725.0415, ",") == "01:02:05,042"
    assert _time(59.9996, ".") == "00:01:00.000"


def test_a_bad_file_raises_or_is_left_out(recognizer, batches, tmp_path):
    good, bad = write(tmp_path / "a.wav", 1.0), tmp_path / "b.wav"
    bad.write_bytes(b"no audio")
    with pytest.raises(UserError, match=r"b\.wav cannot be read"):
        list(recognizer.transcribe_all([good, bad]))
    failures: list[str] = []
    transcriptions = list(recognizer.transcribe_all(
        [good, bad, good], on_error=lambda path, _: failures.append(path)))  # fmt: skip
    assert len(transcriptions) == 2 and all(t.text for t in transcriptions)
    assert failures == [str(bad)]
    silent = tmp_path / "c.wav"
    soundfile.write(silent, np.zeros(16000), 16000)
    assert recognizer.transcribe(silent).segments == ()


@pytest.fixture
def transcribe(recognizer, batches, monkeypatch, command):
    """``transcribe(*arguments)``: exit code and output of ``dsasr transcribe`` with this model."""
    monkeypatch.setattr(Recognizer, "from_pretrained", lambda _folder, _device=None: recognizer)

    def run(*arguments) -> tuple[int, str]:
        done = command("transcribe", "model", *arguments)
        return done.returncode, done.stdout

    return run


def test_the_command_reads_files_folders_and_standard_input(transcribe, tmp_path, monkeypatch):
    folder = tmp_path / "talks"
    (folder / "deep").mkdir(parents=True)
    write(folder / "b.flac", 1.0)
    write(folder / "deep" / "a.wav", 2.0)
    (folder / "notes.txt").write_text("no audio")
    code, printed = transcribe(folder, "--quiet")
    names = [line.split("\t")[0][-6:] for line in printed.splitlines()]
    assert code == 0 and names == ["b.flac", "/a.wav"]
    monkeypatch.setattr(
        sys, "stdin", io.TextIOWrapper(io.BytesIO((folder / "b.flac").read_bytes()))
    )
    code, printed = transcribe("-", "--quiet", "--format", "jsonl")
    assert code == 0 and json.loads(printed)["path"] == "-"
    assert json.loads(printed)["segments"][0]["tokens"][0]["confidence"] == 1.0
    out = tmp_path / "out"
    into = (folder, folder / "b.flac", "--format", "srt", "--out", out)
    assert transcribe(*into)[0] == 0
    places = {str(p.relative_to(out)) for p in out.rglob("*.srt")}
    assert places == {"b.srt", "deep/a.srt"}
    assert transcribe(*into)[0] == 2 and transcribe(*into, "--overwrite")[0] == 0
    assert transcribe(folder, "--format", "srt")[0] == 2
    assert transcribe(tmp_path / "nothing.wav")[0] == 2
    bad = tmp_path / "bad.wav"
    bad.write_bytes(b"no")
    code, printed = transcribe(bad, folder / "b.flac", "--quiet")
    assert code == 1 and "b.flac" in printed and "bad.wav" not in printed
    code, printed = transcribe(folder / "b.flac", "--quiet", "--format", "vtt")
    assert code == 0 and printed.startswith("WEBVTT\n\n00:00:00.000 --> 00:00:01.0")
    code, printed = transcribe(folder / "b.flac", "--quiet", "--nbest", 3)
    assert re.fullmatch(r"0\.00\t1\.2[01]\t1\t0\.000\t1\.2\n", printed)
    assert transcribe(folder / "b.flac", "--vad", "silero")[0] == 2  # it is not installed


def test_the_command_takes_the_models_beam_and_names_what_was_cut(
    recognizer, monkeypatch, command, tmp_path
):
    widths = []

    def decode(_model, batch, tokenizer, config, **_options):
        widths.append(config.beam)
        return [
            [Hypothesis(key, (65,), "A", -1.0, (0.0,), finished=seconds < 3)]
            for key, seconds in zip(batch.keys, batch.durations, strict=True)
        ]

    monkeypatch.setattr("dsasr.inference.recognizer.decode_nbest", decode)
    wide = replace(recognizer, decode=DecodeConfig(beam=7))
    monkeypatch.setattr(Recognizer, "from_pretrained", lambda _folder, _device=None: wide)
    audio = write(tmp_path / "a.wav", 2.0, 4.0, 5.0)
    done = command("transcribe", "model", audio, "--quiet", "--format", "jsonl")
    assert done.returncode == 0 and set(widths) == {7}
    row = json.loads(done.stdout)
    assert row["finished"] is False
    assert [s["finished"] for s in row["segments"]] == [True, False, False]
    assert row["doubtful"] == 2 and row["segments"][1]["doubt"] == ["cut"]
    assert "in doubt: 2 of 3 segments" in done.stderr
    assert f"2 cut (cut off at the token limit): {audio}, 2." in done.stderr
    widths.clear()
    short = write(tmp_path / "b.wav", 1.0)
    done = command("transcribe", "model", short, "--quiet", "--beam", 2)
    assert set(widths) == {2} and "cut" not in done.stderr
    assert command("transcribe", "model", short, "--beam", -1).returncode == 2


def test_what_was_transcribed_is_given_though_a_later_file_is_bad(recognizer, batches, tmp_path):
    """Empty, silent, cut off, NaN or no audio: named one by one, and the others unharmed."""
    good = write(tmp_path / "good.wav", 1.0)
    whole = good.read_bytes()
    files = {"empty.wav": b"", "text.wav": b"this is text", "cut.wav": whole[:30_000]}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    soundfile.write(tmp_path / "none.wav", np.zeros(0), 16_000)
    soundfile.write(tmp_path / "nan.wav", np.full(16_000, np.nan), 16_000, subtype="FLOAT")
    soundfile.write(tmp_path / "one.wav", np.ones(1) * 0.5, 16_000)
    names = ["good.wav", *files, "none.wav", "nan.wav", "one.wav", "good.wav"]
    errors: dict[str, str] = {}

    def on_error(path: str, error: UserError) -> None:
        errors[Path(path).name] = str(error)

    found = list(recognizer.transcribe_all([tmp_path / n for n in names], on_error=on_error))
    assert [Path(t.path).name for t in found] == ["good.wav", "cut.wav", "one.wav", "good.wav"]
    assert [bool(t.text) for t in found] == [True, True, False, True]
    assert found[1].warnings[0].startswith("truncated_audio") and not found[0].warnings
    assert set(errors) == {"empty.wav", "text.wav", "none.wav", "nan.wav"}
    assert "no samples" in errors["none.wav"] and "not finite" in errors["nan.wav"]


def test_words_by_their_share_where_the_head_cannot_say(recognizer, batches):
    words = recognizer.transcribe(np.concatenate([loud(2.0), np.zeros(16000)])).segments[0].words
    (word,) = words
    assert (word.text, word.start, word.confidence) == ("2.2", 0.0, None)
    assert word.end == pytest.approx(2.0, abs=0.011)


def test_the_token_limit_follows_the_duration():
    speech = SpeechStatistics(9, (1.0,) * 6, (0.1,) * 6, (1.0, 2.0, 3.0, 4.0, 5.0, 6.0))
    cfg = limited(DecodeConfig(max_tokens=48), speech)
    assert [cfg.token_limit(s) for s in (1.0, 100.0)] == [12 + 8, 1200 + 8]
    assert limited(DecodeConfig(max_tokens=48), SpeechStatistics()).token_limit(100.0) == 48
