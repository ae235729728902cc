"""The survey of the datasets before training, and what it tells a user."""

from __future__ import annotations

import pytest

from dsasr import recipe
from dsasr.build import Builder
from dsasr.training import sample_survey, survey_text


@pytest.fixture
def surveyed(tiny, monkeypatch, tmp_path):
    """``surveyed(*overrides)``: (builder, surveys) of the tiny recipe."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(*overrides: str):
        builder = Builder(recipe.load(str(tiny), list(overrides)))
        return builder, sample_survey.survey(builder)

    return run


def told(builder, surveys) -> str:
    return "\n".join(survey_text.warnings(builder, surveys))


def test_every_set_of_each_branch(surveyed):
    builder, surveys = surveyed()
    found = {(s.reading.kind, s.reading.branch): s for s in surveys}
    assert list(found) == [
        ("train", "pretrain"), ("train", "sft"), ("valid", "pretrain"), ("valid", "sft")
    ]  # fmt: skip
    train, valid = found["train", "pretrain"], found["valid", "sft"]
    assert (train.utterances, train.indexed, train.exact) == (52, 52, True)
    assert train.hours == pytest.approx(train.seconds.sum() / 3600)
    assert len(train.samples) == train.read >= 45 and len(valid.samples) == 8
    assert train.langs == {"en": 52} and not train.left_out
    assert train.samples[0].units and not train.samples[0].tokens
    again = found["train", "sft"].samples[0]  # the sound is heard once
    assert again.tokens and not again.units and again.audio is train.samples[0].audio
    seconds, tokens = sample_survey.utterance(surveys)
    assert 0.4 < seconds < 0.9 and tokens > 1
    hours = survey_text.hours_of_mixtures(builder, surveys)
    assert set(hours) == {"pretrain", "align", "ia_sft", "joint"}
    assert told(builder, surveys) == "" and not survey_text.faults(surveys)


def test_languages_that_no_prompt_names(surveyed):
    over = ["model.prompt=play {lang} <speech>", "model.languages={zh: gu, de: do}"]
    told_once = (
        "no prompt names the language of 52 of 52 utterances (en 52): model.languages has zh, de"
    )
    assert told(*surveyed(*over)).endswith(told_once)
    assert told(*surveyed(over[0], "model.languages={en: gu}")) == ""


def test_the_screen(surveyed):
    text = survey_text.lines(*surveyed())
    assert text[0].split()[0] == "DATA" and text[1].split()[:4] == ["train", "tiny", "52", "0.01"]
    assert max(map(len, text)) <= 100
    forms = [line.split()[0] for line in text[text.index("TEXT") + 2 :]]
    assert forms == ["phonemes", "tokens"]
    (phonemes,) = [line for line in text if "encoder frames:" in line]
    assert phonemes.split(":")[1].split()[0] in "bdfg"


def test_some_shards_of_many(surveyed, monkeypatch):
    monkeypatch.setattr(sample_survey, "SHARDS", 2)
    _, surveys = surveyed("branch=pretrain")
    train = surveys[0]
    assert train.indexed == 32 and train.utterances == 52 and train.exact  # by dataset.json
    assert train.hours == pytest.approx(52 * train.seconds.mean() / 3600)


def test_limits_that_leave_out_many(surveyed):
    builder, surveys = surveyed("data.dataloader.batch.max_seconds=0.5")
    train = surveys[0]
    assert train.left_out["too_long"] == (train.seconds > 0.5).sum() > 5
    assert (
        "0.5 s (batch.max_seconds)): cut them, or change max_seconds of data.dataloader.batch"
        in (told(builder, surveys))
    )
    assert all(sample.seconds <= 0.5 for sample in train.samples)


def test_labels_that_do_not_fit(surveyed, tiny, tmp_path):
    (tmp_path / "words").write_text("ba b a\ndo d o\n")
    lexicon = f"data.phonemizer={{kind: lexicon, lexicons: ['{tmp_path / 'words'}']}}"
    builder, surveys = surveyed(lexicon)
    train = surveys[0]
    assert {cause for cause, *_ in train.dropped} == {"unknown_word"}
    assert "samples dropped as unknown_word" in told(builder, surveys)
    (fault,) = survey_text.faults(surveys)
    assert fault.startswith("data.train.tiny") and "(unknown_word" in fault
    sft = surveys[1]  # which needs no phonemes
    assert len(sft.samples) == sft.read


def test_a_language_model_and_capitals(surveyed):
    builder, surveys = surveyed("branch=sft", "data.text.case=upper")
    line = told(builder, surveys)
    assert "the tokenizer does not know" in line or "data.text.case=lower" in line


def test_utterances_in_training_and_validation(surveyed, tiny):
    builder, surveys = surveyed(
        "branch=pretrain", f"data.valid.valid.shards={tiny.parent / 'train'}"
    )
    assert "data.valid.valid shares 52 utterances with data.train.tiny" in told(builder, surveys)


def test_quiet_and_clipped_recordings(surveyed):
    builder, surveys = surveyed("branch=pretrain")
    row = surveys[0]
    quiet = sample_survey.AudioMeasures(level=-60.0, clipped=0.01, snr=20.0)
    row.samples = [sample_survey.replace(s, audio=quiet) for s in row.samples]
    assert "very quiet, -60 dB" in told(builder, [row]) and "are clipped" in told(builder, [row])
