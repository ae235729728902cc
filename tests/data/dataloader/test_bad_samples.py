"""Bad data: every cause is counted and named, nothing else changes, too much of it ends a run."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from dsasr.data.audio.augment import AugmentConfig
from dsasr.data.dataloader.bad_samples import BadSampleLog
from dsasr.data.dataloader.bucketing import BatchConfig
from dsasr.data.dataloader.dataloader import DataLoaderConfig, DatasetConfig, StreamingDataLoader
from dsasr.data.dataloader.text_encoder import TextEncoder
from dsasr.data.shards.storage import StorageConfig
from dsasr.data.text.phoneme_vocab import PhonemeVocab
from dsasr.data.text.phonemizer import StoredPhonemes
from dsasr.utils.errors import UserError

RATE = 16_000
HOURS = 3 * 3600


def wave(seconds: float, seed: int = 0, rate: int = RATE) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(int(seconds * rate)) * 0.1).astype(np.float32)


def encoded(data: np.ndarray, form: str = "FLAC", rate: int = RATE, subtype="PCM_16") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, data, rate, format=form, subtype=subtype)
    return buffer.getvalue()


def said(seconds: float = 0.5, text: str = "ab", **more) -> bytes:
    values = {"text": text, "lang": "en", "speaker": "s", "duration": seconds}
    return json.dumps({**values, "phonemes": ["a", "b"], **more}).encode()


def good(number: int) -> list[tuple[str, bytes]]:
    """The members of a good sample: mono or stereo, at 8, 16 or 48 kHz, in one of three forms."""
    seconds, rate = 0.3 + 0.05 * (number % 9), (RATE, 8000, 48_000)[number % 3]
    data = wave(seconds, number, rate)
    if number % 4 == 3:
        data = np.stack([data, 0.5 * data], 1)
    form, subtype = (("FLAC", "PCM_16"), ("WAV", "FLOAT"), ("OGG", "VORBIS"))[number // 3 % 3]
    return [(form.lower(), encoded(data, form, rate, subtype)), ("json", said(seconds))]


def torn_flac() -> bytes:
    data = bytearray(encoded(wave(0.5)))
    data[200:4000] = bytes(3800)
    return bytes(data)


def not_finite() -> bytes:
    data = wave(0.5)
    data[100] = np.nan
    return encoded(data, "WAV", subtype="FLOAT")


def three_hours() -> bytes:
    """Of silence at 8 kHz: some hundred kilobytes that unpack to 172 MB."""
    return encoded(np.zeros(HOURS * 8000, np.int16), rate=8000)


# cause → members of a sample with that fault.
FAULTS = {
    "decode_error": lambda: [("flac", torn_flac()), ("json", said())],
    "empty_audio": lambda: [("wav", encoded(wave(0), "WAV")), ("json", said())],
    "too_long": lambda: [("flac", three_hours()), ("json", said(HOURS))],
    "nan_audio": lambda: [("wav", not_finite()), ("json", said())],
    "missing_json": lambda: [("flac", encoded(wave(0.5)))],
    "missing_audio": lambda: [("json", said())],
    "bad_json": lambda: [("flac", encoded(wave(0.5))), ("json", b'{"text": ')],
    "bad_utf8": lambda: [("flac", encoded(wave(0.5))), ("json", b'{"text": "\xff\xfe"}')],
    "empty_text": lambda: [("flac", encoded(wave(0.5))), ("json", said(text=" \n "))],
    "unknown_phoneme": lambda: [("flac", encoded(wave(0.5))), ("json", said(phonemes=["a", "q"]))],
    "missing_phonemes": lambda: [
        ("flac", encoded(wave(0.5))), ("json", said().replace(b"phonemes", b"others")),
    ],
    "too_short": lambda: [("flac", encoded(wave(0.02))), ("json", said(0.02))],
    "over_budget": lambda: [("flac", encoded(wave(6.5))), ("json", said(6.5))],
    "wrong_duration": lambda: [("flac", encoded(wave(2.5))), ("json", said(0.4))],
    "too_much_text": lambda: [("flac", encoded(wave(0.5))), ("json", said(text="ab " * 130_000))],
    "bad_name": lambda: [("flac", encoded(wave(0.5))), ("json", said(lang="en\x1b[2J"))],
    "no_duration": lambda: [("flac", b"none"), ("json", said(0.0))],
}  # fmt: skip
# What a fault may be called that is found in another way.
LYING_HOURS = [("too_long", lambda: [("flac", three_hours()), ("json", said(0.5))])]


def write(path: Path, samples: dict[str, list[tuple[str, bytes]]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, members in samples.items():
            for extension, data in members:
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def corpus(folder: Path, faults: dict[str, list[tuple[str, bytes]]]) -> Path:
    """Three shards of eight good samples; the faulty ones stand first in the second."""
    for shard in range(3):
        samples = {f"g{shard}-{i}": good(8 * shard + i) for i in range(8)}
        write(folder / f"{shard}.tar", (faults if shard == 1 else {}) | samples)
    return folder


def delivered(folder: Path, tmp_path: Path, workers: int = 0, **more) -> tuple[dict, list]:
    """key → the sample's features, text and labels; and what was bad. One augmented epoch."""
    config = DataLoaderConfig(
        batch=BatchConfig(frames=600, max_seconds=7.0),
        num_workers=workers,
        source=StorageConfig(cache=str(tmp_path / "cache" / folder.name)),
    )
    vocab = PhonemeVocab.build([["a", "b"]])
    arguments = {
        "datasets": [DatasetConfig("d", str(folder / "*.tar"))],
        "text": TextEncoder(phonemizer=StoredPhonemes(), vocab=vocab),
        "augment": AugmentConfig(noise_share=0.5, kinds=("vehicle", "music")),
        "epochs": 1,
    }
    rows, bad = {}, []
    with StreamingDataLoader(replace(config, **more), **arguments) as stream:
        for batch in stream:
            bad += batch.bad
            for i, key in enumerate(batch.keys):
                features = batch.features_BTF[i, : batch.feature_lengths_B[i]].clone()
                rows[key] = (features, batch.texts[i], batch.phonemes_BP[i].tolist())
    return rows, bad


@pytest.fixture(scope="module")
def healthy(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("healthy")
    rows, bad = delivered(corpus(folder / "c", {}), folder)
    assert len(rows) == 24 and not bad
    return rows


def same(rows: dict, want: dict) -> None:
    assert set(rows) == set(want)
    for key, (features, *labels) in rows.items():
        assert torch.equal(features, want[key][0]) and labels == list(want[key][1:]), key


@pytest.mark.parametrize(
    ("cause", "fault"),
    [*FAULTS.items(), *LYING_HOURS],
    ids=[*FAULTS, "three_hours_as_half_a_second"],
)
def test_every_cause_is_reported_and_changes_nothing_else(tmp_path, healthy, cause, fault) -> None:
    folder = corpus(tmp_path / "c", {"bad": fault()})
    rows, bad = delivered(folder, tmp_path)
    assert [(c, Path(shard).name, key) for c, shard, key, _ in bad] == [(cause, "1.tar", "bad")]
    same(rows, healthy)


def test_a_text_that_is_longer_than_its_index_says_is_bad(tmp_path, healthy) -> None:
    from dsasr.data.shards.build_index import build_index
    from dsasr.data.shards.index import index_path

    folder = corpus(tmp_path / "c", {"bad": [("flac", encoded(wave(0.5))), ("json", said())]})
    index = build_index(folder / "1.tar").dump()
    text = "ab " * 40_000
    corpus(folder, {"bad": [("flac", encoded(wave(0.5))), ("json", said(text=text))]})
    longer = json.loads(build_index(folder / "1.tar").dump())
    longer["chars"] = json.loads(index)["chars"]
    index_path(folder / "1.tar").write_text(json.dumps(longer))
    rows, bad = delivered(folder, tmp_path)
    assert [(c, key) for c, _, key, _ in bad] == [("too_much_text", "bad")]
    assert "120,000 characters, 2 by the index" in bad[0][3]
    same(rows, healthy)


def test_samples_too_short_for_ctc_are_dropped_in_training_alone(tmp_path) -> None:
    folder = tmp_path / "c"
    # 0.3 s are 28 frames, 7 of an encoder that keeps every fourth: 7 units need one more where two
    # neighbors are equal.
    units = {"fits": list("abababa"), "equal": list("abababb"), "many": list("abababab")}
    write(folder / "0.tar", {
        key: [("flac", encoded(wave(0.3))), ("json", said(0.3, phonemes=row))]
        for key, row in units.items()
    })  # fmt: skip
    options = {
        "datasets": [DatasetConfig("d", str(folder / "*.tar"))],
        "text": TextEncoder(phonemizer=StoredPhonemes(), vocab=PhonemeVocab.build([["a", "b"]])),
        "epochs": 1,
    }
    config = DataLoaderConfig(num_workers=0, source=StorageConfig(cache=str(tmp_path / "cache")))
    for lengths, kept in ((lambda frames: (frames + 3) // 4, {"fits"}), (None, set(units))):
        with StreamingDataLoader(config, **options, ctc_lengths=lengths) as stream:
            batches = list(stream)
        assert {key for batch in batches for key in batch.keys} == kept
        bad = {key: (cause, detail) for b in batches for cause, _, key, detail in b.bad}
        assert set(bad) == set(units) - kept
        assert all(cause == "too_few_frames" for cause, _ in bad.values())
    assert not bad


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        ({"max_seconds": 0.2}, "too_long 24.*at most 0.2 s .batch.max_seconds"),
        ({"frames": 20}, "over_budget 24.*at most 20 frames of 10 ms .batch.frames"),
        ({"min_seconds": 5.0}, "too_short 24.*at least 5 s .batch.min_seconds"),
    ],
)
def test_limits_that_leave_out_everything_are_named(tmp_path, batch, says) -> None:
    folder = corpus(tmp_path / "c", {})
    config = DataLoaderConfig(
        batch=BatchConfig(**batch),
        num_workers=0,
        source=StorageConfig(cache=str(tmp_path / "cache")),
    )
    with (
        StreamingDataLoader(config, datasets=[DatasetConfig("d", str(folder / "*.tar"))]) as stream,
        pytest.raises(UserError, match=f"dataset 'd' has no usable sample: all 24.*{says}"),
    ):
        for _ in range(9):
            next(stream)


@pytest.mark.parametrize("workers", [1, 2])
def test_all_causes_at_once_from_workers(tmp_path, healthy, workers) -> None:
    folder = corpus(tmp_path / "c", {f"bad-{c}": fault() for c, fault in FAULTS.items()})
    rows, bad = delivered(folder, tmp_path, workers)
    assert {key: c for c, _, key, _ in bad} == {f"bad-{c}": c for c in FAULTS}
    assert len(bad) == len(FAULTS)
    same(rows, healthy)


def test_a_tar_that_broke_after_it_was_indexed_loses_its_tail_by_name(tmp_path, healthy) -> None:
    folder = corpus(tmp_path / "c", {})
    delivered(folder, tmp_path)  # keeps the indexes
    whole = (folder / "1.tar").read_bytes()
    (folder / "1.tar").write_bytes(whole[: len(whole) // 2])
    rows, bad = delivered(folder, tmp_path)
    lost = set(healthy) - set(rows)
    assert 0 < len(lost) < 8 and all(key.startswith("g1-") for key in lost)
    assert {(c, key) for c, _, key, _ in bad} >= {("truncated_tar", "")}
    same(rows, {key: value for key, value in healthy.items() if key in rows})


def test_a_stale_index_is_not_read(tmp_path, healthy) -> None:
    """The index beside the tar names what the tar, of another size now, no longer holds."""
    from dsasr.data.shards.build_index import build_index
    from dsasr.data.shards.index import index_path

    folder = corpus(tmp_path / "c", {})
    index_path(folder / "1.tar").write_text(build_index(folder / "1.tar").dump())
    whole = (folder / "1.tar").read_bytes()
    (folder / "1.tar").write_bytes(whole[: len(whole) // 2])
    rows, bad = delivered(folder, tmp_path)
    lost = set(healthy) - set(rows)
    assert 0 < len(lost) < 8 and all(key.startswith("g1-") for key in lost)
    assert {cause for cause, *_ in bad} == {"truncated_tar", "stale_index"}
    same(rows, {key: value for key, value in healthy.items() if key in rows})


def test_bad_sample_log_counts_names_and_limits(tmp_path) -> None:
    path = tmp_path / "run" / "bad_samples.jsonl"
    log = BadSampleLog(path, {"decode_error": 1, "*": 2, "total": 3})
    log.add([("decode_error", "s.tar", "k1", "torn")], steps=4)
    log.check()
    log.add([("decode_error", "s.tar", "k2", "torn")], steps=5)
    with pytest.raises(UserError, match=r"2 samples.*'decode_error'.*limit of 1.*k2 in s\.tar"):
        log.check()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["key"] for line in lines] == ["k1", "k2"] and lines[0]["steps"] == 4
    other = BadSampleLog(path, {"*": 0}, rank=3)
    other.add([])
    assert not other.path.exists() and other.path.name == "bad_samples.rank3.jsonl"
    other.add([("nan_audio", "s.tar", "k", "")])
    assert "nan_audio" in other.excess() and other.path.exists()
    assert "more than the limit of 3" in log.excess({"a": 2, "b": 2})
    assert BadSampleLog(path).excess({"a": 10**6}) is None


def test_counts_and_lines_go_on_where_the_checkpoint_stood(tmp_path) -> None:
    path = tmp_path / "bad_samples.jsonl"
    logs = [BadSampleLog(path, {"total": 4}, rank=rank) for rank in range(2)]
    for steps in range(4):
        for log in logs:
            log.add([("nan_audio", "s.tar", f"k{steps}", "")], steps=steps)
    with open(path, "a") as file:
        file.write('{"cause": "nan_au')  # killed in the middle of a line
    # The checkpoint was of two steps on two ranks; one rank goes on.
    log = BadSampleLog(path, {"total": 4})
    log.resume({"nan_audio": 4}, 2)
    for file in (path, logs[1].path):
        assert [json.loads(line)["key"] for line in file.read_text().splitlines()] == ["k0", "k1"]
    log.check()
    log.add([("nan_audio", "s.tar", "k2", "")], steps=2)
    with pytest.raises(UserError, match="5 samples"):
        log.check()
    other = BadSampleLog(path, {}, rank=1)
    other.resume({"nan_audio": 4}, 2)
    assert other.counts == Counter()  # the sum is rank 0's to hold


def bad_recipe(tiny: Path, folder: Path) -> list[str]:
    """Overrides: the tiny corpus with a shard of two torn and one silent sample."""
    audio = encoded(wave(0.5))
    more = {"phonemes": ["b", "a"]}
    write(folder / "bad.tar", {
        "torn-1": [("flac", torn_flac()), ("json", said(**more))],
        "torn-2": [("flac", torn_flac()), ("json", said(**more))],
        "blank": [("flac", audio), ("json", said(text=" ", **more))],
        "good": [("flac", audio), ("json", said(**more))],
    })  # fmt: skip
    sets = json.dumps([str(tiny.parent / "train" / "*.tar"), str(folder / "bad.tar")])
    train = f"data.train=[{{name: tiny, shards: {sets}}}]"
    return [train, "branch=pretrain", "stages.pretrain.steps=12", "monitor.every=2"]


@pytest.mark.slow
@pytest.mark.launcher
def test_a_run_names_counts_and_goes_on_or_stops(tiny, start, tmp_path) -> None:
    overrides = bad_recipe(tiny, tmp_path)
    run = tmp_path / "run"
    job = start(f"run={run}", *overrides, "data.bad_limits={decode_error: 99}", world=1)
    assert job.wait() == [0], job.output[-3000:]
    folder = run / "pretrain"
    rows = [json.loads(x) for x in (folder / "bad_samples.jsonl").read_text().splitlines()]
    first = {row["key"]: row["cause"] for row in rows if row["epoch"] == 0}
    assert first == {"torn-1": "decode_error", "torn-2": "decode_error", "blank": "empty_text"}
    assert all(row["shard"].endswith("bad.tar") and row["stage"] == "pretrain" for row in rows)
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    totals = [line for line in lines if line["stage"] == "bad_samples"]
    causes = Counter(row["cause"] for row in rows)
    assert {k: totals[-1][k] for k in causes} == dict(causes)
    steps = [line for line in lines if line["stage"] == "pretrain"]
    assert sum(line["bad_samples"] for line in steps) == len(rows)
    limited = start(f"run={tmp_path / 'two'}", *overrides, "data.bad_limits={decode_error: 1}")
    assert limited.wait() == [2, 2], limited.output[-3000:]
    error = [x for x in limited.output.splitlines() if x.startswith("error:")]
    # No launcher ended rank 1 with rank 0 here.
    assert error and "decode_error" in error[0] and "limit of 1" in error[0]
