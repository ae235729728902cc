"""Our shards are webdataset's, and webdataset's are ours: read and written by its own classes."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from dsasr.data.dataloader.bucketing import BatchConfig
from dsasr.data.dataloader.dataloader import DataLoaderConfig, DatasetConfig, StreamingDataLoader
from dsasr.data.shards.build_index import build_index, find_tars
from dsasr.data.shards.sample import read_sample
from dsasr.data.shards.storage import StorageConfig
from dsasr.data.shards.writer import PackedSample, shard_summary, write_dataset, write_shard

webdataset = pytest.importorskip("webdataset")

RATE = 16_000
KEYS = ("utt-0001", "folder/utt 2", "长" * 20, "x" * 90, "long/" * 30 + "y")


def encoded(seconds: float, form: str = "FLAC", seed: int = 0) -> bytes:
    wave = np.random.default_rng(seed).standard_normal(int(seconds * RATE)) * 0.1
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, RATE, format=form, subtype="PCM_16")
    return buffer.getvalue()


def values(number: int, **more) -> dict:
    said = {"text": f"你好 number {number}", "lang": "en", "speaker": f"s{number % 2}"}
    return {**said, "duration": 0.3 + number / 10, **more}


def samples(keys=KEYS) -> list[PackedSample]:
    return [
        PackedSample(key, "flac", encoded(0.3 + i / 10, seed=i), values(i, gender="f"))
        for i, key in enumerate(keys)
    ]


def test_webdataset_yields_the_samples_that_we_wrote(tmp_path: Path) -> None:
    written = samples()
    rows = []
    for number, part in enumerate((written[:2], written[2:])):
        path = tmp_path / f"{number:06d}.tar"
        rows.append(shard_summary(path, write_shard(path, part)))
    write_dataset(tmp_path, rows, 2)
    urls = str(tmp_path / "{000000..000001}.tar")
    got = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [s["__key__"] for s in got] == [s.key for s in written]
    for theirs, ours in zip(got, written, strict=True):
        members = {name for name in theirs if not name.startswith("__")}
        assert members == {"flac", "json"}
        assert theirs["flac"] == ours.audio and json.loads(theirs["json"]) == ours.values
    # And just what our own reader makes of them.
    for theirs, (tar, entry) in zip(got, _entries(tmp_path), strict=True):
        sample = read_sample(tar, entry)
        assert (sample.key, sample.audio) == (theirs["__key__"], theirs["flac"])
        said = json.loads(theirs["json"])
        assert (sample.text, sample.meta) == (said["text"], {"gender": "f"})


def _entries(folder: Path) -> list:
    return [(tar, entry) for tar in find_tars([folder]) for entry in build_index(tar)]


def test_the_same_samples_give_the_same_bytes_as_tarwriter(tmp_path: Path) -> None:
    """Not only the same content: the archives are equal byte for byte (short names, times of 0)."""
    written = samples(KEYS[:2])
    write_shard(tmp_path / "ours.tar", written)
    theirs = tmp_path / "theirs.tar"
    fixed = {"mtime": 0, "user": "dsasr", "group": "dsasr", "mode": 0o644}
    with webdataset.TarWriter(str(theirs), **fixed) as writer:
        for s in written:
            data = json.dumps(s.values, ensure_ascii=False).encode()
            writer.write({"__key__": s.key, "flac": s.audio, "json": data})
    assert theirs.read_bytes() == (tmp_path / "ours.tar").read_bytes()


def test_shards_of_shardwriter_are_read_without_an_index(tmp_path: Path) -> None:
    """As others write them: wav beside flac, json by webdataset's encoder, members of theirs."""
    pattern = str(tmp_path / "train-%04d.tar")
    expected = {}
    with webdataset.ShardWriter(pattern, maxcount=3, verbose=0) as writer:
        for number in range(8):
            form = ("flac", "wav")[number % 2]
            audio = encoded(0.3 + number / 10, form.upper(), number)
            said = values(number) if number % 3 else {"text": "no duration", "lang": "en"}
            key = f"a/b/{number:03d}"
            expected[key] = (audio, said["text"])
            # Members that are neither audio nor json do not concern us.
            extra = {"txt": "words", "cls": 3, "phones.npy": np.zeros(3)}
            writer.write({"__key__": key, form: audio, "json": said, **extra})
    assert not list(tmp_path.glob("*.json"))
    config = DataLoaderConfig(
        batch=BatchConfig(frames=300),
        num_workers=0,
        source=StorageConfig(cache=str(tmp_path / "cache")),
    )
    datasets = [DatasetConfig("d", str(tmp_path / "train-{0000..0002}.tar"))]
    with StreamingDataLoader(config, datasets=datasets, purpose="eval") as stream:
        batches = list(stream)
    got = {key: text for b in batches for key, text in zip(b.keys, b.texts, strict=True)}
    assert got == {key: text for key, (_, text) in expected.items()}
    assert not any(b.bad for b in batches)
    for tar, entry in _entries(tmp_path):
        assert read_sample(tar, entry).audio == expected[entry.key][0]
        assert entry.duration == pytest.approx(0.3 + int(entry.key[-3:]) / 10, abs=1e-3)


def test_a_compressed_tar_is_named_for_what_it_is(tmp_path: Path) -> None:
    write_shard(tmp_path / "x.tar", samples(KEYS[:1]))
    data = gzip.compress((tmp_path / "x.tar").read_bytes())
    (bad,) = build_index(data, "x.tar.gz").bad
    assert bad.cause == "truncated_tar" and "compressed" in bad.detail
