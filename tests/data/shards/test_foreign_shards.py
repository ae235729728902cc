"""Shards that other tools made, and tars that are not what their index says."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

from dsasr.data.dataloader.dataloader import DataLoaderConfig, DatasetConfig, StreamingDataLoader
from dsasr.data.dataloader.sampler import BatchSampler
from dsasr.data.dataloader.window_plan import DatasetPart, PlanConfig
from dsasr.data.shards.build_index import build_index, read_texts
from dsasr.data.shards.index import index_path, load_index
from dsasr.data.shards.index_cache import load_or_build_index
from dsasr.data.shards.sample import OWN_FIELDS, SampleFields
from dsasr.data.shards.storage import ShardStorage, StorageConfig
from dsasr.data.shards.verify import verify_shard
from dsasr.data.shards.writer import read_dataset
from dsasr.utils.errors import UserError

RATE = 16_000
WENET = SampleFields(text=".txt", default_lang="zh")
EMILIA = SampleFields(lang="language")


def audio(form: str, seconds: float = 0.5) -> bytes:
    wave = np.random.default_rng(3).standard_normal(int(seconds * RATE)) * 0.1
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, RATE, format=form)
    return buffer.getvalue()


def tar_of(path: Path, *members: tuple[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def wenet(path: Path, *keys: str) -> Path:
    members = []
    for key in keys:
        members += [(f"{key}.txt", f"你好 {key}\n".encode()), (f"{key}.wav", audio("WAV"))]
    return tar_of(path, *members)


def emilia(path: Path, *keys: str) -> Path:
    members = []
    for key in keys:
        said = {"id": key, "text": " Hello", "duration": 0.5, "speaker": "p1", "language": "en"}
        said |= {"dnsmos": 3.3}
        members += [(f"{key}.mp3", audio("MP3")), (f"{key}.json", json.dumps(said).encode())]
    return tar_of(path, *members)


def storage(tmp_path: Path) -> ShardStorage:
    return ShardStorage(StorageConfig(cache=str(tmp_path / "cache")))


def loaded(shards: Path, tmp_path: Path, fields: SampleFields | None = None) -> list[tuple]:
    config = DataLoaderConfig(num_workers=0, source=StorageConfig(cache=str(tmp_path / "cache")))
    datasets = [DatasetConfig("d", str(shards), fields=fields)]
    with StreamingDataLoader(config, datasets=datasets, purpose="eval") as loader:
        rows = [
            row
            for batch in loader
            for row in zip(batch.keys, batch.texts, batch.langs, batch.speakers, strict=True)
        ]
    return sorted(rows)


def test_text_and_wav(tmp_path):
    tar = wenet(tmp_path / "s" / "0.tar", "a", "b")
    index = build_index(tar, fields=WENET)
    assert not index.bad and index.keys == ["a", "b"] and index.durations.tolist() == [0.5, 0.5]
    assert {bad.cause for bad in build_index(tar).bad} == {"missing_json"}
    rows = [("a", "你好 a", "zh", ""), ("b", "你好 b", "zh", "")]
    assert loaded(tar, tmp_path, WENET) == rows
    flac = tar_of(tmp_path / "f.tar", ("x.flac", audio("FLAC")), ("x.txt", b"\xef\xbb\xbfHI\r\n"))
    assert loaded(flac, tmp_path, SampleFields(text=".txt")) == [("x", "HI", "", "")]


def test_json_with_other_keys(tmp_path):
    tar = emilia(tmp_path / "0.tar", "a")
    assert loaded(tar, tmp_path, EMILIA) == [("a", "Hello", "en", "p1")]
    (sample,) = [s for s in read_texts(tar)]
    assert sample.lang == ""  # as our own shards would have it
    transcribed = SampleFields(text="transcript", speaker="spk", duration="dur", lang="l")
    said = {"transcript": "x", "spk": 7, "dur": 0.5, "text": "another", "extra": 1}
    tar = tar_of(tmp_path / "1.tar", ("k.wav", audio("WAV")), ("k.json", json.dumps(said).encode()))
    assert loaded(tar, tmp_path, transcribed) == [("k", "x", "", "7")]


def test_the_command_indexes_them_once_for_all(tmp_path, command):
    folder = tmp_path / "shards"
    wenet(folder / "0.tar", "a", "b")
    wenet(folder / "1.tar", "c")
    (folder / "._0.tar").write_bytes(b"mac")
    assert command("data", "index", folder).returncode == 2  # no json: --fields says what there is
    done = command("data", "index", folder, "--fields", "text=.txt", "default_lang=zh")
    assert done.returncode == 0 and "2 shards, 3 samples" in done.stdout
    assert load_index(index_path(folder / "0.tar")).fields == WENET
    assert read_dataset(folder)["langs"] == {"zh": {"samples": 3, "hours": 0.0004}}
    assert [row[0] for row in loaded(folder, tmp_path)] == ["a", "b", "c"]  # without fields
    assert [s.text for s in read_texts(folder / "1.tar")] == ["你好 c"]
    assert verify_shard(folder / "0.tar").bad == ()
    assert command("data", "index", folder).returncode == 0  # again: with the fields it has
    for words, says in (
        (["--fields", "txt=x"], "use text, lang"), (["--fields", "text=.wav"], "as an ending"),
    ):  # fmt: skip
        done = command("data", "index", folder, *words)
        assert done.returncode == 2 and says in done.stderr


def test_fields_of_the_recipe_come_before_those_of_an_index(tmp_path):
    tar = emilia(tmp_path / "0.tar", "a")
    index_path(tar).write_text(build_index(tar).dump())
    store = storage(tmp_path)
    assert load_or_build_index(store, str(tar)).fields == OWN_FIELDS
    store.resolve(str(tar), EMILIA)
    assert [entry.lang for entry in load_or_build_index(store, str(tar))] == ["en"]


def test_a_tar_that_was_replaced_does_not_keep_its_index(tmp_path):
    tar = emilia(tmp_path / "0.tar", "a", "b")
    index_path(tar).write_text(build_index(tar).dump())
    assert len(load_or_build_index(storage(tmp_path), str(tar))) == 2
    emilia(tar, "a", "b", "c")
    index = load_or_build_index(storage(tmp_path), str(tar))
    assert index.keys == ["a", "b", "c"] and [b.cause for b in index.bad] == ["stale_index"]
    assert "dsasr data index" in index.bad[0].detail
    old = json.loads(index_path(tar).read_text())
    del old["tar_size"]  # as before sizes were kept
    index_path(tar).write_text(json.dumps(old))
    assert len(load_or_build_index(storage(tmp_path), str(tar))) == 2


@pytest.mark.parametrize("padding", [0, 512, 3 << 20])
def test_tars_one_after_another_are_read_to_the_last(tmp_path, padding):
    parts = [emilia(tmp_path / f"{key}.tar", key).read_bytes() for key in "abc"]
    tar = tmp_path / "all.tar"
    tar.write_bytes(bytes(padding).join(parts))
    index = build_index(tar, fields=EMILIA)
    assert index.keys == ["a", "b", "c"] and not index.bad
    assert [s.key for s in read_texts(tar)] == ["a", "b", "c"]
    assert len(loaded(tar, tmp_path, EMILIA)) == 3
    tar.write_bytes(parts[0] + b"rubbish" * 100)
    assert [bad.cause for bad in build_index(tar).bad] == ["truncated_tar"]


def test_what_macos_adds_is_no_sample(tmp_path):
    said = json.dumps({"text": "x", "duration": 0.5}).encode()
    tar = tar_of(
        tmp_path / "0.tar", ("._a.wav", b"mac"), ("a.wav", audio("WAV")), ("a.json", said),
        ("b/._a.json", b"mac"), ("__MACOSX/b.wav", b"mac"),
    )  # fmt: skip
    index = build_index(tar)
    assert index.keys == ["a"] and not index.bad
    (tmp_path / "._0.tar").write_bytes(b"mac")
    assert len(ShardStorage().resolve(str(tmp_path / "*.tar")).shards) == 1


def sampler(part: DatasetPart, state: dict | None = None) -> BatchSampler:
    return BatchSampler([part], PlanConfig(), lambda shard: None, state=state)


def test_shards_packed_again_under_their_names_do_not_resume(tmp_path):
    tar = emilia(tmp_path / "0.tar", "a")

    def part(sizes=True) -> DatasetPart:
        found = ShardStorage().resolve(str(tar))
        return DatasetPart("d", found.shards, sizes=found.sizes if sizes else None)

    state = sampler(part()).state()
    sampler(part(), state)
    sampler(part(sizes=False), state)  # a copy that says nothing, as a remote one
    old = json.loads(json.dumps(state))
    del old["identity"]["contents"]
    sampler(part(), old)  # a checkpoint of before
    emilia(tar, "a", "b", "c")
    with pytest.raises(UserError, match="packed again under the same names"):
        sampler(part(), state)
