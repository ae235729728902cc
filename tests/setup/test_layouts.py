"""A corpus' sets are found where they lie, and what is ambiguous is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsasr.setup.layouts import find_sources, role_of
from dsasr.utils.errors import UserError


def found(*paths: Path, **options) -> list[tuple[str, str, str]]:
    sources = find_sources(paths, **options)
    return [(source.path.name, source.form.name, source.split) for source in sources]


def refusal(*paths: Path, **options) -> str:
    with pytest.raises(UserError) as error:
        find_sources(paths, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("train-clean-100", "train"), ("dev-other", "valid"), ("cuts_dev", "valid"),
        ("validation", "valid"), ("my_test_set", "test"), ("eval2000", ""), ("contest", ""),
        ("", ""),
    ],
)  # fmt: skip
def test_the_role_of_a_split_is_a_word_of_its_name(name, role):
    assert role_of(name) == role


def test_manifests_in_a_folder_are_splits_by_name(tmp_path, make):
    for name in ("train", "valid"):
        make.jsonl(tmp_path / f"{name}.jsonl", make.rows(2), with_audio=False)
    (tmp_path / "statistics.json").write_text('{"hours": 3}')  # no manifest
    assert found(tmp_path) == [("train.jsonl", "jsonl", "train"), ("valid.jsonl", "jsonl", "valid")]


def test_nemo_manifests(tmp_path, make):
    for name in ("train_manifest", "dev_manifest"):
        row = {"audio_filepath": "a.wav", "text": "x", "duration": 1.0}
        (tmp_path / f"{name}.json").write_text(json.dumps(row))
    assert found(tmp_path) == [
        ("dev_manifest.json", "nemo", "dev_manifest"),
        ("train_manifest.json", "nemo", "train_manifest"),
    ]


def test_common_voice_takes_its_own_splits_and_no_superset_of_them(tmp_path, make):
    make.common_voice(tmp_path, train=1, dev=1, test=1, validated=1, invalidated=1)
    assert [split for *_, split in found(tmp_path)] == ["train", "dev", "test"]
    for name in ("train", "dev", "test"):
        (tmp_path / f"{name}.tsv").unlink()
    assert found(tmp_path) == [("validated.tsv", "common-voice", "")]


def test_kaldi_folders_side_by_side(tmp_path, make):
    make.kaldi(tmp_path, train=1, test=1)
    assert found(tmp_path) == [("test", "kaldi", "test"), ("train", "kaldi", "train")]


def test_text_files_beside_recordings(tmp_path, make):
    folder = tmp_path / "in"
    make.audio(folder / "talks" / "one take.wav")
    (folder / "talks" / "one take.txt").write_text("hello")
    assert found(folder) == [("in", "pairs", "")]


def test_two_layouts_at_once(tmp_path, make):
    make.kaldi(tmp_path, train=1)
    make.jsonl(tmp_path / "train.jsonl", make.rows(1))
    message = refusal(tmp_path)
    assert "two layouts" in message and "Kaldi" in message and "JSONL" in message
    assert len(find_sources([tmp_path / "train.jsonl"])) == 1


def test_manifests_of_which_one_says_no_split(tmp_path, make):
    for name in ("train", "more"):
        make.jsonl(tmp_path / f"{name}.jsonl", make.rows(1))
    assert "more.jsonl" in refusal(tmp_path)
    assert len(find_sources([tmp_path / "train.jsonl", tmp_path / "more.jsonl"])) == 2


def test_what_is_no_corpus_says_what_is_read(tmp_path, make):
    assert "is empty" in refusal(tmp_path)
    assert "there is no" in refusal(tmp_path / "nowhere")
    (tmp_path / "notes.md").write_text("x")
    assert "no audio" in refusal(tmp_path) and "NeMo" in refusal(tmp_path)
    make.audio(tmp_path / "deep" / "a\nb.wav")
    message = refusal(tmp_path)
    assert "1 recordings without transcripts" in message


def test_a_corpus_named_twice(tmp_path, make):
    path = make.jsonl(tmp_path / "train.jsonl", make.rows(1))
    assert "twice" in refusal(path, path)


def test_a_kind_that_is_given_is_taken(tmp_path, make):
    path = make.jsonl(tmp_path / "odd.txt", make.rows(1))
    assert found(path, kind="jsonl") == [("odd.txt", "jsonl", "")]
    assert "unknown kind" in refusal(path, kind="nemoo")
