import json

import numpy as np
import pytest

pytest.importorskip("espeakng_loader")

import soundfile

from dsasr.data.text import espeak
from dsasr.data.text.espeak_phonemizer import EspeakPhonemizer
from dsasr.demo import speech
from dsasr.demo.corpus import CorpusConfig, make_corpus, sentences
from dsasr.utils.errors import UserError

SMALL = CorpusConfig(hours=0.01, valid=4, test=8, nonspeech=6, text=200, mixed=0.25, seed=3)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    out = tmp_path_factory.mktemp("corpus") / "c"
    make_corpus(SMALL, out, processes=2, progress=False)
    return out


def rows(folder, split):
    return [json.loads(line) for line in (folder / f"{split}.jsonl").open(encoding="utf-8")]


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_manifests_match_the_audio(corpus):
    phonemizer = EspeakPhonemizer()
    for split in ("train", "valid", "test", "nonspeech"):
        assert rows(corpus, split)
        for row in rows(corpus, split):
            assert list(row) == ["id", "audio", "text", "speaker", "lang", "duration", "phonemes"]
            wave, rate = soundfile.read(corpus / row["audio"], dtype="float32")
            assert rate == 16000 and wave.ndim == 1
            assert len(wave) / rate == pytest.approx(row["duration"], abs=1e-4)
            assert np.abs(wave).max() < 1
            assert row["phonemes"] == phonemizer.phonemes(row["text"], row["lang"])
            if split != "nonspeech":
                assert 0.5 < row["duration"] < 5
                assert 0.1 < np.abs(wave).max() < 0.85


def test_sizes_and_languages(corpus):
    total = sum(row["duration"] for row in rows(corpus, "train"))
    assert 36 <= total < 36 + 5
    assert len(rows(corpus, "valid")) == 4 and len(rows(corpus, "test")) == 8
    assert {row["lang"] for row in rows(corpus, "train")} == {"en", "zh", "zh-en"}
    summary = json.loads((corpus / "corpus.json").read_text())
    assert summary["splits"]["test"]["utterances"] == 8
    listed = {row["audio"] for s in summary["splits"] for row in rows(corpus, s)}
    assert {str(p.relative_to(corpus)) for p in corpus.rglob("*.flac")} == listed


def test_splits_share_neither_sentences_nor_voices(corpus):
    for key in ("text", "speaker"):
        values = [{row[key] for row in rows(corpus, s)} for s in ("train", "valid", "test")]
        assert not (values[0] & values[1] or values[0] & values[2] or values[1] & values[2])
    text = set((corpus / "text" / "lm.txt").read_text(encoding="utf-8").splitlines())
    held_out = {row["text"] for split in ("valid", "test") for row in rows(corpus, split)}
    assert len(text) > 150 and not text & held_out
    heldout = (corpus / "text" / "lm_heldout.txt").read_text(encoding="utf-8").splitlines()
    assert len(heldout) == 100 and not text & set(heldout)


def test_nonspeech_kinds(corpus):
    levels = {}
    for row in rows(corpus, "nonspeech"):
        assert row["text"] == "" and row["phonemes"] == [] and row["lang"] == "und"
        wave, _ = soundfile.read(corpus / row["audio"])
        levels.setdefault(row["speaker"], []).append(float(np.sqrt(np.mean(wave**2))))
    assert set(levels) == set(speech.NONSPEECH)
    assert max(levels["silence"]) < 2e-4 < 5e-3 < min(levels["white"] + levels["babble"])


def test_bytes_depend_on_the_config_alone(corpus, tmp_path):
    make_corpus(SMALL, tmp_path / "c", processes=1, progress=False)
    assert contents(tmp_path / "c") == contents(corpus)


def test_finished_corpus_is_left_alone(corpus):
    stamp = (corpus / "train.jsonl").stat().st_mtime_ns
    make_corpus(SMALL, corpus, progress=False)
    assert (corpus / "train.jsonl").stat().st_mtime_ns == stamp


def test_foreign_folder_is_refused(tmp_path):
    (tmp_path / "audio").mkdir()
    (tmp_path / "audio" / "thesis.wav").write_text("precious")
    with pytest.raises(UserError, match="something else"):
        make_corpus(SMALL, tmp_path, progress=False)
    assert (tmp_path / "audio" / "thesis.wav").exists()


def test_interrupted_corpus_is_made_anew(corpus, tmp_path, monkeypatch):
    out = tmp_path / "c"
    with monkeypatch.context() as patch:
        patch.setattr("dsasr.demo.corpus._write_nonspeech", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            make_corpus(SMALL, out, progress=False)
    assert not (out / "corpus.json").exists()
    (out / "audio" / "train" / "stale.flac").write_text("left behind")
    make_corpus(SMALL, out, progress=False)
    assert contents(out) == contents(corpus)


def test_one_language_alone():
    for share, lang in ((1.0, "en"), (0.0, "zh")):
        source = sentences(CorpusConfig(english=share), "train")
        assert {next(source)[0] for _ in range(50)} == {lang}


@pytest.mark.parametrize("bad", [{"hours": 0}, {"english": 1.5}, {"mixed": 0.9}, {"test": 0}])
def test_config_errors(bad):
    with pytest.raises(UserError):
        CorpusConfig(**bad)


def test_every_voice_exists_and_is_in_one_split():
    names = [name for voices in speech.VOICES.values() for name in voices]
    assert len(set(names)) == len(names)
    plain, rate = espeak.synthesize("one two", "en-us")
    for name in names:
        wave, _ = espeak.synthesize("one two", f"en-us+{name}")
        assert 0.3 < len(wave) / rate < 2
        # espeak-ng falls back to the plain voice where it does not know a variant.
        assert len(wave) != len(plain) or not np.array_equal(wave, plain), name


def test_speech_is_repeatable():
    style = speech.SpeakingStyle("f2", 0.5, 50, 50, 0.1, 0.1, 0.5, 7)
    first = speech.speak("播放 play", style)
    speech.speak("something else", speech.SpeakingStyle("m2", 0.1, 40, 60, 0.1, 0.1, 0.5, 8))
    assert np.array_equal(first, speech.speak("播放 play", style))
    assert first.dtype == np.float32 and np.abs(first).max() == pytest.approx(0.5, abs=1e-3)
    assert np.abs(first[:1500]).max() < 1e-3 and np.abs(first[-1500:]).max() < 1e-3


def test_speed_changes_the_duration():
    fast, slow = (speech.SpeakingStyle("m1", s, 50, 50, 0, 0, 0.5, 0) for s in (1.0, 0.0))
    text = "turn on the kitchen lights"
    assert len(speech.speak(text, slow)) > 1.1 * len(speech.speak(text, fast))
