"""Shards of others are recognized, split by whole tars and left where they are."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import pytest

from dsasr.data.shards.storage import ShardStorage
from dsasr.setup.layouts import find_sources
from dsasr.setup.shard_corpus import read_shard_corpus
from dsasr.setup.shard_sets import SHARDS, fields_of
from dsasr.utils.errors import UserError


def tar(path: Path, make, count: int, first: int = 0, kind: str = "wenet") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    sound = make.audio(path.parent / "sound.wav", 1).read_bytes()
    os.unlink(path.parent / "sound.wav")
    with tarfile.open(path, "w") as file:
        for n in range(first, first + count):
            text = make.sentence(n)
            labels = {"wenet": ("txt", text.encode()),
                      "emilia": ("json", json.dumps({"text": text, "language": "de", "speaker": "a",
                                                     "duration": 0.6}).encode())}[kind]  # fmt: skip
            for ending, data in (("wav", sound), labels):
                member = tarfile.TarInfo(f"k{n:04d}.{ending}")
                member.size = len(data)
                file.addfile(member, io.BytesIO(data))
    return path


def test_where_labels_stand(tmp_path, make):
    assert fields_of(tar(tmp_path / "a.tar", make, 2)).text == ".txt"
    found = fields_of(tar(tmp_path / "b.tar", make, 2, kind="emilia"))
    assert (found.text, found.lang, found.speaker) == ("text", "language", "speaker")


def test_a_folder_of_tars_is_split_by_whole_tars_and_nothing_is_written(tmp_path, make):
    folder = tmp_path / "wenet shards"
    for number in range(12):
        tar(folder / f"{number:03d}.tar", make, 4, 4 * number)
    before = sorted(p.name for p in folder.iterdir())
    (source,) = find_sources([folder])
    assert source.form is SHARDS
    found = read_shard_corpus([source], lang="de")
    assert {one.role: len(one.lengths) for one in found.sets} == {
        "train": 40,
        "valid": 4,
        "test": 4,
    }
    assert sorted(p.name for p in folder.iterdir()) == before
    assert found.text.langs == {"de": 48} and "whole tars" in " ".join(found.notes)
    named = [ShardStorage().resolve(one.shards).shards for one in found.sets]
    assert sorted(Path(p).name for paths in named for p in paths) == before
    assert found.sets[0].entry["fields"] == {"text": ".txt", "default_lang": "de"}
    again = read_shard_corpus([source], lang="de")
    assert [one.shards for one in again.sets] == [one.shards for one in found.sets]


def test_folders_by_split_stay_whole(tmp_path, make):
    for name in ("train", "dev", "test"):
        tar(tmp_path / name / "0.tar", make, 3, kind="emilia")
    found = read_shard_corpus(find_sources([tmp_path]), "")
    assert [(one.name, one.role, one.shards) for one in found.sets] == [
        (name, role, f"{tmp_path / name}/*.tar")
        for name, role in (("dev", "valid"), ("test", "test"), ("train", "train"))
    ]
    assert found.text.main_lang == "de"


def test_too_few_tars(tmp_path, make):
    tar(tmp_path / "in" / "a.tar", make, 10)
    with pytest.raises(UserError, match="too few to take valid and test"):
        read_shard_corpus(find_sources([tmp_path / "in"]), "")


def test_a_list_of_shards(tmp_path, make):
    paths = [tar(tmp_path / "x" / f"{n}.tar", make, 4, 4 * n) for n in range(6)]
    (tmp_path / "data.list").write_text("".join(f"{path}\n" for path in paths))
    found = read_shard_corpus(find_sources([tmp_path / "data.list"]), "en")
    assert sum(len(one.lengths) for one in found.sets) == 24
