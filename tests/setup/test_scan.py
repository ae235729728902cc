"""What a pass over manifests finds, and what it refuses."""

from __future__ import annotations

import json

import pytest

from dsasr.setup.layouts import find_sources
from dsasr.setup.scan import scan, script_lang
from dsasr.setup.splits import assign_sets
from dsasr.utils.errors import UserError


@pytest.fixture
def look(tmp_path):
    def run(*paths, lang=""):
        place = tmp_path / "scratch"
        place.mkdir(exist_ok=True)
        return scan(find_sources(paths), lang, place / "utterances", place)

    return run


def refusal(look, *paths) -> str:
    with pytest.raises(UserError) as error:
        look(*paths)
    assert "\n" not in str(error.value)
    return str(error.value)


def sets_of(found) -> dict[str, tuple[str, int]]:
    sets, _ = assign_sets(found.sets, found.set_N, found.keys)
    return {one.name: (one.role, len(one.chosen)) for one in sets}


@pytest.mark.parametrize(
    ("layout", "splits", "expected"),
    [
        ("librispeech", {"train_clean_100": 12, "dev_clean": 3, "dev_other": 3, "test_clean": 3},
         {"train-clean-100": ("train", 12), "dev-clean": ("valid", 3), "dev-other": ("valid", 3),
          "test-clean": ("test", 3)}),
        ("aishell", {"train": 6, "dev": 2, "test": 2},
         {"train": ("train", 6), "dev": ("valid", 2), "test": ("test", 2)}),
        ("common_voice", {"train": 6, "dev": 2, "test": 2, "validated": 10},
         {"train": ("train", 6), "dev": ("valid", 2), "test": ("test", 2)}),
        ("audio_folder", {"train": 6, "validation": 2, "test": 2},
         {"train": ("train", 6), "validation": ("valid", 2), "test": ("test", 2)}),
        ("kaldi", {"train": 6, "dev": 2, "test": 2},
         {"train": ("train", 6), "dev": ("valid", 2), "test": ("test", 2)}),
    ],
)  # fmt: skip
def test_splits_of_every_layout_stay_apart(tmp_path, make, look, layout, splits, expected):
    folder = tmp_path / "corpus"
    folder.mkdir()
    getattr(make, layout)(folder, **splits)
    assert sets_of(look(folder)) == expected


def test_a_split_alone_gets_the_others_made(tmp_path, make, look):
    make.librispeech(tmp_path / "LibriSpeech", train_clean_100=30)
    found = look(tmp_path / "LibriSpeech" / "train-clean-100")
    assert {role for role, _ in sets_of(found).values()} == {"train", "valid", "test"}


def test_what_is_said_of_the_text(tmp_path, make, look):
    rows = [row | {"text": row["text"].upper()} for row in make.rows(4, speakers=2)]
    found = look(make.jsonl(tmp_path / "train.jsonl", rows))
    assert found.text.is_upper and found.text.main_lang == "en"
    assert found.text.form() == "script Latin, in capitals, without punctuation"
    rows = [row | {"text": "Hello, you 2!"} for row in make.rows(4)]
    found = look(make.jsonl(tmp_path / "b" / "train.jsonl", rows))
    assert found.text.form() == "script Latin, mixed case, punctuated, digits in 100%"


@pytest.mark.parametrize(
    ("text", "lang"),
    [
        ("hello", ""),
        ("今天", "zh"),
        ("きょう 今日", "ja"),
        ("오늘", "ko"),
        ("Grüße", ""),
        ("打开 wifi", "zh"),
    ],
)
def test_languages_that_a_script_tells(text, lang):
    assert script_lang(text) == lang


def test_the_identity_is_of_the_data_not_of_its_place(tmp_path, make, look):
    first = make.jsonl(tmp_path / "a" / "train.jsonl", make.rows(5))
    moved = make.jsonl(tmp_path / "b" / "train.jsonl", make.rows(5))
    moved.write_text("".join(reversed(moved.read_text().splitlines(keepends=True))))
    other = make.jsonl(tmp_path / "c" / "train.jsonl", make.rows(6))
    assert look(first).identity == look(moved).identity != look(other).identity


def test_copies_are_noticed(tmp_path, make, look):
    from dsasr.setup.report import copies

    rows = make.rows(4)
    rows.append(rows[0] | {"id": "again"})
    assert copies(look(make.jsonl(tmp_path / "train.jsonl", rows)).keys).startswith("1 utterances")


def test_names_with_spaces_and_line_breaks(tmp_path, make, look):
    folder = tmp_path / "my corpus"
    names = ["a b.wav", "line\nbreak.wav", "ü#.wav"]
    lines = []
    for number, name in enumerate(names):
        make.audio(folder / name, number)
        row = {"audio_filepath": name, "text": make.sentence(number), "duration": 0.6}
        lines.append(json.dumps(row))
    (folder / "manifest.json").write_text("\n".join(lines))
    found = look(folder)
    assert [entry.audio.name for entry in found.entries] == names
    assert [entry.id for entry in found.entries] == ["a b", "line_break", "ü#"]


def test_what_is_refused(tmp_path, make, look):
    rows = make.rows(3)
    path = make.jsonl(tmp_path / "a" / "train.jsonl", rows)
    (tmp_path / "a" / "audio" / "u001.wav").unlink()
    assert "1 of 3 audio files are missing" in refusal(look, path)
    path = make.jsonl(tmp_path / "b" / "train.jsonl", [rows[0], rows[1] | {"id": "u000"}])
    assert "two utterances with the id 'u000'" in refusal(look, path)
    path = make.jsonl(tmp_path / "c" / "train.jsonl", [rows[0] | {"id": "line\nbreak"}])
    assert "cannot be a key" in refusal(look, path)
    path = tmp_path / "d" / "train.json"
    make.audio(path.parent / "a.wav")
    path.write_text('{"audio_filepath": "a.wav", "duration": 1}')
    assert "no utterance with a transcript, only 1 without" in refusal(look, path)


def test_an_id_may_stand_in_two_sets(tmp_path, make, look):
    make.jsonl(tmp_path / "train.jsonl", make.rows(3))
    make.jsonl(tmp_path / "valid.jsonl", make.rows(3))
    assert len(look(tmp_path).entries) == 6
