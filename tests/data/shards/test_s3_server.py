"""s3:// against moto's server: uploads, listings and credentials as boto3's clients make them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile

from dsasr.data.dataloader.bucketing import BatchConfig
from dsasr.data.dataloader.dataloader import DataLoaderConfig, DatasetConfig, StreamingDataLoader
from dsasr.data.shards.index_cache import load_or_build_index
from dsasr.data.shards.storage import (
    ShardMissing,
    ShardReadError,
    ShardStorage,
    ShardTruncated,
    StorageConfig,
)
from dsasr.data.shards.writer import PackedSample, shard_summary, write_dataset, write_shard
from dsasr.utils.errors import UserError

pytest.importorskip("s3fs")
moto = pytest.importorskip("moto.server")
boto3 = pytest.importorskip("boto3")


@pytest.fixture(scope="module")
def endpoint():
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def client(endpoint, monkeypatch, tmp_path):
    """A client of an empty bucket; without credentials of this machine."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    one = boto3.client("s3")
    one.create_bucket(Bucket="bucket")
    yield one
    for item in one.list_objects_v2(Bucket="bucket").get("Contents", []):
        one.delete_object(Bucket="bucket", Key=item["Key"])
    one.delete_bucket(Bucket="bucket")


def storage(tmp_path, **given) -> ShardStorage:
    options = {"cache": str(tmp_path / "cache"), "backoff": 0.01, "timeout": 5.0, "attempts": 2}
    return ShardStorage(StorageConfig(**options | given))


def speech_samples(seed: int, count: int) -> list[PackedSample]:
    samples = []
    for i in range(count):
        wave = np.random.default_rng(10 * seed + i).standard_normal(6000 + 900 * i) * 0.1
        buffer = io.BytesIO()
        soundfile.write(buffer, wave, 16_000, format="FLAC", subtype="PCM_16")
        said = {"text": "x", "lang": "en", "speaker": "s", "duration": len(wave) / 16_000}
        samples.append(PackedSample(f"{seed}-{i}", "flac", buffer.getvalue(), said))
    return samples


def dataset(folder: Path, client, name: str) -> list:
    """Shards in a folder, and uploaded."""
    rows = []
    for number in range(3):
        path = folder / f"{number:06d}.tar"
        folder.mkdir(exist_ok=True)
        rows.append(shard_summary(path, write_shard(path, speech_samples(number, 4))))
    write_dataset(folder, rows, 1)
    for path in folder.iterdir():
        client.upload_file(str(path), "bucket", f"{name}/{path.name}")
    return rows


def test_ranges_wholes_and_what_is_not_there(client, tmp_path):
    body = bytes(i * 7 % 251 for i in range(50_000))
    client.put_object(Bucket="bucket", Key="x.bin", Body=body)
    read = storage(tmp_path)
    assert read.read("s3://bucket/x.bin", 100, 50) == body[100:150]
    assert read.read_two("s3://bucket/x.bin", (10, 20), (500, 7)) == (body[10:30], body[500:507])
    assert read.read_file("s3://bucket/x.bin") == body
    assert read.size("s3://bucket/x.bin") == len(body)
    for url in ("s3://bucket/none", "s3://nobucket/x"):
        with pytest.raises(ShardMissing):
            read.read_file(url)
        assert read.size(url) is None
    for offset in (len(body) - 5, len(body) + 5):
        with pytest.raises(ShardTruncated):
            read.read("s3://bucket/x.bin", offset, 10)
    with pytest.raises(ShardReadError, match="no tar"):
        storage(tmp_path, cache_gb=1.0).read("s3://bucket/x.bin", 7, 9)


def test_a_dataset_that_was_uploaded_is_the_one_on_disk(client, tmp_path):
    rows = dataset(tmp_path / "local", client, "set")
    keys = {}
    for shards in (
        str(tmp_path / "local"),
        "s3://bucket/set/",
        "s3://bucket/set/{000000..000002}.tar",
        "s3://bucket/set/*.tar",
    ):
        config = DataLoaderConfig(
            batch=BatchConfig(frames=300), num_workers=1,
            source=StorageConfig(cache=str(tmp_path / "cache"), backoff=0.01, timeout=5.0),
        )  # fmt: skip
        with StreamingDataLoader(config, datasets=[DatasetConfig("d", shards)], epochs=1) as stream:
            keys[shards] = sorted(key for batch in stream for key in batch.keys)
    first, *others = keys.values()
    assert len(first) == 12 and all(other == first for other in others)
    assert sum(row["samples"] for row in rows) == 12
    with pytest.raises(UserError, match=r"has no dataset\.json"):
        storage(tmp_path).resolve("s3://bucket/elsewhere/")
    with pytest.raises(UserError, match="no shard matches"):
        storage(tmp_path).resolve("s3://bucket/elsewhere/*.tar")
    with pytest.raises(UserError, match="lists no files"):
        storage(tmp_path).resolve("http://[::1]/set/*.tar")
    signed = "http://[::1]/x.tar?a=*"
    assert storage(tmp_path).resolve(signed).shards == [signed]


def test_an_object_that_was_replaced_does_not_keep_its_index(client, tmp_path):
    dataset(tmp_path / "local", client, "set")
    other = tmp_path / "other.tar"
    write_shard(other, speech_samples(9, 7))
    client.upload_file(str(other), "bucket", "set/000000.tar")  # without its index
    index = load_or_build_index(storage(tmp_path), "s3://bucket/set/000000.tar")
    assert len(index) == 7 and [bad.cause for bad in index.bad] == ["stale_index"]
    good = load_or_build_index(storage(tmp_path), "s3://bucket/set/000001.tar")
    assert len(good) == 4 and not good.bad


def test_credentials_are_those_of_the_environment(client, tmp_path, monkeypatch):
    client.put_object(Bucket="bucket", Key="x.json", Body=b"{}")
    assert storage(tmp_path).read_file("s3://bucket/x.json") == b"{}"
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(
        ShardReadError, match=r"cannot read s3://bucket/x\.json.*(redentials|denied)"
    ):
        storage(tmp_path).read_file("s3://bucket/x.json")
