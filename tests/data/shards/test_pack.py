"""Utterances in, shards out: what is written, what is refused, what a stop leaves behind."""

import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from dsasr.data.manifests.entry import ManifestEntry
from dsasr.data.manifests.registry import read_manifest
from dsasr.data.shards.build_index import build_index
from dsasr.data.shards.pack import PackConfig, pack, shard_size
from dsasr.data.shards.sample import read_sample
from dsasr.data.shards.verify import verify, verify_shard
from dsasr.data.shards.writer import read_dataset
from dsasr.utils.errors import UserError

RATE = 16_000
ROOT = Path(__file__).resolve().parents[3]


def write(path: Path, seconds: float = 0.2, seed: int = 0) -> np.ndarray:
    wave = (np.random.default_rng(seed).standard_normal(int(seconds * RATE)) * 3000).astype(
        np.int16
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wave, RATE)
    return wave


def corpus(folder: Path, count: int = 7) -> Path:
    lines = []
    for i in range(count):
        write(folder / "audio" / f"{i}.wav", 0.1 + 0.05 * i, i)
        row = {"id": f"u{i}", "audio": f"audio/{i}.wav", "text": f"text {i}"}
        lines.append(json.dumps(row | {"speaker": f"s{i % 2}", "lang": "en" if i % 3 else "zh"}))
    (folder / "m.jsonl").write_text("\n".join(lines))
    return folder / "m.jsonl"


def samples_of(out: Path) -> list:
    return [read_sample(t, e) for t in sorted(out.glob("*.tar")) for e in build_index(t)]


def content(folder: Path) -> dict[str, bytes]:
    """What a reader meets: temporary files start with a dot."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(".")}


def test_packing_keeps_audio_bytes_text_and_order(tmp_path):
    entries = read_manifest(corpus(tmp_path)).utterances
    dataset = pack(entries, tmp_path / "out", PackConfig(3, shuffle=False), 1)
    read = samples_of(tmp_path / "out")
    assert [s.key for s in read] == [u.id for u in entries]
    assert [s.audio for s in read] == [u.audio.read_bytes() for u in entries]
    assert [s.text for s in read] == [u.text for u in entries]
    assert [s["samples"] for s in dataset["shards"]] == [3, 3, 1]
    assert dataset["speakers"] == 2 and dataset["bad"] == dataset["repaired"] == 0
    seconds = sum(0.1 + 0.05 * i for i in range(7))
    assert dataset["hours"] == pytest.approx(seconds / 3600, abs=1e-4)
    assert {k: v["samples"] for k, v in dataset["langs"].items()} == {"en": 4, "zh": 3}
    assert read_dataset(tmp_path / "out")["samples"] == 7
    assert all(verify_shard(t).bad == () for t in (tmp_path / "out").glob("*.tar"))


def test_shuffled_packing_is_the_seeds_for_any_number_of_processes(tmp_path):
    entries = read_manifest(corpus(tmp_path)).utterances
    bytes_of = {}
    for name, seed, processes in (("a", 1, 1), ("b", 1, 2), ("c", 2, 1)):
        pack(entries, tmp_path / name, PackConfig(3, seed=seed), processes)
        bytes_of[name] = [p.read_bytes() for p in sorted((tmp_path / name).glob("*.tar"))]
    assert bytes_of["a"] == bytes_of["b"] != bytes_of["c"]
    assert sorted(s.key for s in samples_of(tmp_path / "c")) == [f"u{i}" for i in range(7)]


def test_a_second_run_writes_only_what_is_missing(tmp_path):
    entries = read_manifest(corpus(tmp_path)).utterances
    entries[4].audio.write_bytes(b"no audio")
    out, config = tmp_path / "out", PackConfig(2)
    first = pack(entries, out, config, 1)
    assert first["bad"] == 1
    listed = (out / "bad_samples.jsonl").read_text()
    assert json.loads(listed)["key"] == "u4" and json.loads(listed)["cause"] == "decode_error"
    before = content(out)
    (out / "000001.index.json").unlink()  # as if stopped between a tar and its index
    (out / "000002.index.json").write_text("{")
    stamps = {p.name: p.stat().st_mtime_ns for p in out.glob("*.tar")}
    time.sleep(0.02)
    assert pack(entries, out, config, 1) == first | {"written": 2}
    assert content(out) == before
    again = {p.name for p in out.glob("*.tar") if p.stat().st_mtime_ns != stamps[p.name]}
    assert again == {"000001.tar", "000002.tar"}


def test_killed_and_run_again_is_as_never_killed(tmp_path):
    source = corpus(tmp_path, 40)
    tool = [sys.executable, "-m", "dsasr.cli", "data", "make-shards", str(source)]
    options = ["--shard-size", "1", "--processes", "1", "--out"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(
        [*tool, *options, str(tmp_path / "out")], env=env, start_new_session=True
    )
    deadline = time.time() + 50
    while len(list((tmp_path / "out").glob("*.index.json"))) < 3 and time.time() < deadline:
        time.sleep(0.002)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    entries = read_manifest(source).utterances
    pack(entries, tmp_path / "out", PackConfig(1), 1)
    pack(entries, tmp_path / "whole", PackConfig(1), 1)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert len(samples_of(tmp_path / "out")) == 40


class Stopped(BaseException):
    """What no ``except Exception`` survives, as a kill."""


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_stopped_at_any_rename_and_run_again_is_as_never_stopped(tmp_path, monkeypatch, after):
    entries = read_manifest(corpus(tmp_path)).utterances
    entries[2].audio.write_bytes(b"no audio")
    claims = [ManifestEntry(u.id, u.audio, u.text, duration=0.01) for u in entries]
    config, replace, left = PackConfig(2), os.replace, 0
    dataset = pack(claims, tmp_path / "whole", config, 1)
    assert (dataset["bad"], dataset["repaired"], dataset["written"]) == (1, 5, 4)

    def stopping(source, target):
        nonlocal left
        left -= 1
        if left < 0 and not after:
            raise Stopped
        replace(source, target)
        if left < 0:
            raise Stopped

    for stop in range(100):
        out, left = tmp_path / f"out{stop}", stop
        monkeypatch.setattr(os, "replace", stopping)
        try:
            pack(claims, out, config, 1)
        except Stopped:
            monkeypatch.setattr(os, "replace", replace)
            for tar in out.glob("*.tar"):
                assert not build_index(tar).bad  # whole, though its index may be missing
            again = pack(claims, out, config, 1)
            assert again | {"written": 0} == dataset | {"written": 0}
            assert content(out) == content(tmp_path / "whole")
        else:
            break
    assert stop == 1 + 4 * 3 + 2  # the claim; tar, note and index of each; bad ones; dataset.json


def test_what_is_packed_is_skipped_at_once(tmp_path, monkeypatch):
    entries = read_manifest(corpus(tmp_path)).utterances
    entries[4].audio.write_bytes(b"no audio")
    out, config = tmp_path / "out", PackConfig(3)
    dataset = pack(entries, out, config, 1)
    assert (dataset["written"], dataset["bad"]) == (3, 1)

    def never(*_):
        raise AssertionError("nothing is to be written or looked into")

    with monkeypatch.context() as patch:
        patch.setattr("dsasr.data.shards.pack.load_index", never)
        patch.setattr(os, "replace", never)
        assert pack(entries, out, config, 1) == dataset | {"written": 0}
    for name in ("000001.tar", "000001.index.json"):
        (out / name).unlink()
        assert pack(entries, out, config, 1) == dataset | {"written": 1}
    data = (out / "000002.tar").read_bytes()
    (out / "000002.tar").write_bytes(data[:700])
    assert pack(entries, out, config, 1) == dataset | {"written": 1}
    assert (out / "000002.tar").read_bytes() == data


def test_other_audio_under_the_same_names_is_other_shards(tmp_path):
    entries = read_manifest(corpus(tmp_path)).utterances
    pack(entries, tmp_path / "out", PackConfig(), 1)
    write(entries[0].audio, 0.7)
    with pytest.raises(UserError, match="other shards"):
        pack(entries, tmp_path / "out", PackConfig(), 1)


def test_a_full_disk_is_one_line_and_leaves_nothing_torn(tmp_path, monkeypatch):
    entries = read_manifest(corpus(tmp_path)).utterances

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="cannot be written: No space left"):
        pack(entries, tmp_path / "out", PackConfig(), 1)
    assert list((tmp_path / "out").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        pack(entries, tmp_path / "file", PackConfig(), 1)


def test_processes_must_be_some(tmp_path):
    entries = read_manifest(corpus(tmp_path)).utterances
    for wrong in (0, -1):
        with pytest.raises(UserError, match="at least 1"):
            pack(entries, tmp_path / "out", PackConfig(), wrong)


def test_each_bad_recording_is_named_by_its_cause(tmp_path):
    wave = write(tmp_path / "good.wav")
    (tmp_path / "garbage.flac").write_bytes(bytes(range(256)) * 9)
    (tmp_path / "nothing.mp3").write_bytes(b"")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0, np.int16), RATE)
    hurt = np.where(np.arange(900) == 7, np.nan, 0.1).astype(np.float32)
    soundfile.write(tmp_path / "nan.wav", hurt, RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "half.ogg", np.tile(wave, 20), RATE)
    data = bytearray((tmp_path / "half.ogg").read_bytes())
    data[len(data) // 2 : len(data) // 2 + 3000] = bytes(3000)
    (tmp_path / "half.ogg").write_bytes(data)
    paths = sorted(p for p in tmp_path.iterdir())
    out = tmp_path / "out"
    copied = pack(
        [ManifestEntry(p.stem, p, "x") for p in paths], tmp_path / "kept", PackConfig(), 1
    )
    assert (copied["samples"], copied["bad"]) == (
        3,
        3,
    )  # headers alone tell nothing of half and nan
    dataset = pack(
        [ManifestEntry(p.stem, p, "x") for p in paths], out, PackConfig(encode="flac"), 1
    )
    bad = [json.loads(line) for line in (out / "bad_samples.jsonl").read_text().splitlines()]
    assert dataset["bad"] == len(bad) == 5
    assert {b["key"]: b["cause"] for b in bad} == {
        "garbage": "decode_error", "nothing": "decode_error", "empty": "empty_audio",
        "nan": "nan_audio", "half": "decode_error",
    }  # fmt: skip
    assert {b["shard"] for b in bad} == {"000000.tar"} and all(b["detail"] for b in bad)
    assert [s.key for s in samples_of(out)] == ["good"]
    _, causes = verify(sorted((tmp_path / "kept").glob("*.tar")), 1)
    assert causes == {"nan_audio": 1, "decode_error": 1}


def test_other_shards_are_not_overwritten(tmp_path):
    entries = read_manifest(corpus(tmp_path)).utterances
    out = tmp_path / "out"
    pack(entries, out, PackConfig(3), 1)
    for utterances, config in ((entries[1:], PackConfig(3)), (entries, PackConfig(4))):
        with pytest.raises(UserError, match="other shards"):
            pack(utterances, out, config, 1)
    (out / "packing.json").unlink()
    with pytest.raises(UserError, match="shards already"):
        pack(entries, out, PackConfig(3), 1)


def test_ids_that_give_one_key_stop_at_once(tmp_path):
    write(tmp_path / "a.wav")
    out = tmp_path / "out"
    pair = [ManifestEntry(k, tmp_path / "a.wav", "x") for k in ("a.b", "a_b")]
    for utterances, says in (
        (pair, "same key"),
        ([ManifestEntry("\n", tmp_path / "a.wav", "x")], "cannot be a key"),
    ):
        with pytest.raises(UserError, match=says):
            pack(utterances, out, PackConfig(), 1)
    assert not out.exists()
    with pytest.raises(UserError, match="not Unicode"):
        pack([ManifestEntry("a", tmp_path / "a.wav", "\ud800")], out, PackConfig(), 1)


def test_wrong_durations_are_repaired_and_counted(tmp_path):
    write(tmp_path / "a.wav", 0.5)
    claims = [ManifestEntry(f"u{d}", tmp_path / "a.wav", "x", duration=d) for d in (0.0, 0.52, 0.9)]
    dataset = pack(claims, tmp_path / "out", PackConfig(), 1)
    assert dataset["repaired"] == 1
    assert [s.duration for s in samples_of(tmp_path / "out")] == [0.5] * 3


def test_audio_much_shorter_than_its_manifest_says_is_left_out_by_name(tmp_path):
    write(tmp_path / "a.wav", 2.0)
    data = (tmp_path / "a.wav").read_bytes()
    (tmp_path / "cut.wav").write_bytes(data[: len(data) // 2])
    entries = [
        ManifestEntry("good", tmp_path / "a.wav", "x", duration=2.0),
        ManifestEntry("cut", tmp_path / "cut.wav", "x"),
        ManifestEntry("claimed", tmp_path / "a.wav", "x", duration=4.0),
        ManifestEntry("part", tmp_path / "a.wav", "x", start=1.0, end=3.0),
    ]
    out = tmp_path / "out"
    dataset = pack(entries, out, PackConfig(shuffle=False), 1)
    bad = [json.loads(line) for line in (out / "bad_samples.jsonl").read_text().splitlines()]
    assert dataset["samples"] == 1 and dataset["repaired"] == 0
    assert {b["key"]: b["cause"] for b in bad} == dict.fromkeys(
        ("cut", "claimed", "part"), "truncated_audio"
    )
    assert "4.000 s, the audio has 2.000 s" in bad[1]["detail"]


def test_other_formats_become_flac_and_unknown_ones_stop_nothing(tmp_path):
    write(tmp_path / "a.wav", 0.5)
    for form in ("AIFF", "AU"):
        wave, rate = soundfile.read(tmp_path / "a.wav", dtype="int16")
        soundfile.write(tmp_path / f"b.{form.lower()}", wave, rate, format=form)
    (tmp_path / "c.xyz").write_bytes(b"what is this")
    paths = [p for p in sorted(tmp_path.iterdir()) if p.is_file()]
    out = tmp_path / "out"
    entries = [ManifestEntry(p.suffix[1:], p, "x") for p in paths]
    assert pack(entries, out, PackConfig(shuffle=False), 1)["samples"] == 3
    assert {s.key: s.extension for s in samples_of(out)} == {
        "wav": "wav", "aiff": "flac", "au": "flac"
    }  # fmt: skip
    (bad,) = [json.loads(line) for line in (out / "bad_samples.jsonl").read_text().splitlines()]
    assert (bad["key"], bad["cause"]) == ("xyz", "unknown_format")


def test_what_a_killed_packer_left_is_removed(tmp_path):
    entries = read_manifest(corpus(tmp_path)).utterances
    out = tmp_path / "out"
    out.mkdir()
    (out / ".000000.tar.x7f.tmp").write_bytes(b"half")
    pack(entries, out, PackConfig(), 1)
    assert not list(out.glob(".*"))


def test_floats_at_integer_scale_are_not_clipped_in_silence(tmp_path):
    wave = np.random.default_rng(0).uniform(-9000, 9000, 8000)
    soundfile.write(tmp_path / "a.wav", wave, RATE, subtype="FLOAT")
    out = tmp_path / "out"
    pack([ManifestEntry("a", tmp_path / "a.wav", "x")], out, PackConfig(encode="flac"), 1)
    assert json.loads((out / "bad_samples.jsonl").read_text())["cause"] == "out_of_scale"


@pytest.mark.parametrize("subtype", ["PCM_16", "FLOAT", "DOUBLE", "PCM_24"])
def test_encoding_as_flac_keeps_the_samples(tmp_path, subtype):
    wave = np.arange(-32_768, 32_768, 5).astype(np.int16)
    exact = subtype == "PCM_16"
    soundfile.write(tmp_path / "a.wav", wave if exact else wave / 32_768, RATE, subtype=subtype)
    write(tmp_path / "b.flac", 0.3)
    both = [ManifestEntry(p, tmp_path / p, "x") for p in ("a.wav", "b.flac")]
    pack(both, tmp_path / "out", PackConfig(shuffle=False, encode="flac"), 1)
    a, b = samples_of(tmp_path / "out")
    assert (a.extension, b.audio) == ("flac", (tmp_path / "b.flac").read_bytes())
    assert np.array_equal(soundfile.read(io.BytesIO(a.audio), dtype="int16")[0], wave)


def test_shards_by_bytes(tmp_path):
    entries = read_manifest(corpus(tmp_path, 20)).utterances
    size = sum(u.audio.stat().st_size for u in entries)
    dataset = pack(entries, tmp_path / "out", PackConfig(shard_bytes=size // 4), 1)
    assert 4 <= len(dataset["shards"]) <= 5
    assert dataset["samples"] == 20
    assert shard_size("200MB") == (500, 200_000_000)
    assert shard_size("1.5gb") == (500, 1_500_000_000)
    assert shard_size("64") == (64, 0)
    for text in ("0", "-3", "2.5", "MB", "many", "nanMB", "infGB"):
        with pytest.raises(UserError, match="shard size"):
            shard_size(text)
    for bad in ({"shard_size": 0}, {"encode": "opus"}, {"shard_bytes": -1}):
        with pytest.raises(UserError):
            PackConfig(**bad)


def test_kaldi_segments_are_cut_exactly(tmp_path):
    wave = write(tmp_path / "long.wav", 2.0)
    for name, lines in (
        ("wav.scp", "rec long.wav\n"),
        ("text", "u1 one\nu2 two\nu3 three\nu4 four\n"),
        ("segments", "u1 rec 0.25 0.75\nu2 rec 1.5 -1\nu3 rec 1.9 2.2\nu4 rec 3 4\nu5 rec 0 1\n"),
    ):
        (tmp_path / name).write_text(lines)
    manifest = read_manifest(tmp_path)
    assert [key for _, _, key, _ in manifest.left_out] == ["u5"]
    out = tmp_path / "out"
    dataset = pack(manifest.utterances, out, PackConfig(shuffle=False), 1, manifest.left_out)
    assert (dataset["samples"], dataset["bad"]) == (3, 2)
    lines = [json.loads(line) for line in (out / "bad_samples.jsonl").read_text().splitlines()]
    assert [(b["cause"], b["key"]) for b in lines] == [
        ("missing_text", "u5"),
        ("empty_audio", "u4"),
    ]
    cuts = {"u1": wave[4000:12000], "u2": wave[24000:], "u3": wave[30400:]}
    for sample in samples_of(out):
        audio, rate = soundfile.read(io.BytesIO(sample.audio), dtype="int16")
        assert rate == RATE and sample.extension == "flac"
        assert np.array_equal(audio, cuts[sample.key])
        assert sample.duration == pytest.approx(len(audio) / RATE, abs=1e-4)


@pytest.mark.parametrize("name", ["en_digits", "en_read", "zh_words"])
def test_real_recordings_pack_and_verify_without_a_drop(tmp_path, recordings, name):
    manifests = sorted((recordings / name).glob("*.jsonl"))
    assert len(manifests) == 2
    for manifest in manifests:
        entries, out = read_manifest(manifest).utterances, tmp_path / manifest.stem
        dataset = pack(entries, out, PackConfig(200), 2)
        assert (dataset["samples"], dataset["bad"], dataset["repaired"]) == (len(entries), 0, 0)
        reports, causes = verify(sorted(out.glob("*.tar")), 2)
        assert not causes
        assert sum(v.samples for v in reports) == len(entries)
        assert {s.key: s.text for s in samples_of(out)} == {u.id: u.text for u in entries}
