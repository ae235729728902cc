"""The stream: real shards, real workers, real kills; what is wrong with a sample is told."""

from __future__ import annotations

import io
import itertools
import json
import os
import signal
import tarfile
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import soundfile
import torch

from dsasr.data.audio.augment import AugmentConfig
from dsasr.data.audio.features import Cmvn, FbankConfig
from dsasr.data.audio.frontends import FbankFrontEnd
from dsasr.data.dataloader.bucketing import BatchConfig
from dsasr.data.dataloader.dataloader import (
    DataLoaderConfig,
    DatasetConfig,
    StreamingDataLoader,
    build_dataset_parts,
)
from dsasr.data.dataloader.text_encoder import TextEncoder
from dsasr.data.shards.sample import Sample
from dsasr.data.shards.storage import StorageConfig
from dsasr.data.text.normalization import TextConfig
from dsasr.testing.dataloader_fuzz import digest
from dsasr.utils.errors import UserError

RATE = 16_000


def wave(seconds: float, seed: int = 0, rate: int = RATE) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(int(seconds * rate)) * 0.1).astype(np.float32)


def encoded(data: np.ndarray, kind: str = "WAV", rate: int = RATE) -> bytes:
    buffer = io.BytesIO()
    subtype = "PCM_16" if kind in ("WAV", "FLAC") else None
    soundfile.write(buffer, data, rate, format=kind, subtype=subtype)
    return buffer.getvalue()


def write_tar(path: Path, samples: list[dict]) -> None:
    """Samples: key, audio bytes, kind, and what goes into the json (``meta``: raw bytes)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for sample in samples:
            sample = dict(sample)
            key, audio = sample.pop("key"), sample.pop("audio")
            kind, meta = sample.pop("kind", "wav"), sample.pop("meta", None)
            fields = {"text": f"text of {key}", "lang": "en", "speaker": "s1", **sample}
            meta = json.dumps(fields).encode() if meta is None else meta
            for extension, data in ((kind, audio), ("json", meta)):
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def plain_corpus(folder: Path, sizes: list[int], lang: str = "en", seed: int = 0) -> list[str]:
    rng, keys = np.random.default_rng(seed), []
    for number, size in enumerate(sizes):
        samples = []
        for _ in range(size):
            seconds = float(rng.uniform(0.2, 1.0))
            keys.append(f"{lang}{len(keys):03d}")
            audio = encoded(wave(seconds, len(keys)))
            samples.append({"key": keys[-1], "audio": audio, "duration": seconds, "lang": lang})
        write_tar(folder / f"{lang}-{number:02d}.tar", samples)
    return keys


@pytest.fixture
def config(tmp_path) -> DataLoaderConfig:
    return DataLoaderConfig(
        batch=BatchConfig(frames=400, min_seconds=0.0),
        num_workers=0,
        window=2,
        window_samples=1,
        source=StorageConfig(cache=str(tmp_path / "cache")),
    )


def collect(config, folder, **kwargs) -> list:
    datasets = [DatasetConfig("d", str(folder / "*.tar"))]
    with StreamingDataLoader(config, datasets=datasets, **{"purpose": "eval", **kwargs}) as stream:
        return list(stream)


def test_an_epoch_holds_every_sample_and_padding_is_zero(tmp_path, config) -> None:
    keys = plain_corpus(tmp_path / "c", [5, 1, 0, 7])
    batches = collect(config, tmp_path / "c")
    assert Counter(k for b in batches for k in b.keys) == Counter(keys)
    for batch in batches:
        assert batch.features_BTF.dtype == torch.float32 and batch.features_BTF.shape[2] == 80
        assert batch.features_BTF.shape[0] * batch.features_BTF.shape[1] <= 400
        assert batch.feature_lengths_B.max() == batch.features_BTF.shape[1]
        for row, length in zip(batch.features_BTF, batch.feature_lengths_B, strict=True):
            assert not row[length:].any() and row[:length].any()
        assert batch.texts == tuple(f"text of {k}" for k in batch.keys)
        assert set(batch.langs) == {"en"} and set(batch.speakers) == {"s1"}
        assert {"decode_s", "feature_s", "bytes", "wait_s", "queue"} <= set(batch.stats)
        json.dumps(batch.state)
        assert batch.phonemes_BP.shape == (len(batch), 0) and not batch.phoneme_lengths_B.any()


def test_which_prompts_name_a_language_is_drawn_by_sample_and_epoch(tmp_path, config) -> None:
    plain_corpus(tmp_path / "c", [20, 20], "en")
    plain_corpus(tmp_path / "c", [10], "de")
    plain_corpus(tmp_path / "c", [10], "")
    text = TextEncoder(languages=("en", "zh"), language_share=0.5)

    def hints(**options) -> dict:
        batches = collect(config, tmp_path / "c", text=text, **options)
        return {(b.epoch, k): h for b in batches for k, h in zip(b.keys, b.hints, strict=True)}

    found = hints(purpose="train", epochs=4)
    of_en = {place: hint for place, hint in found.items() if place[1].startswith("en")}
    assert {h for place, h in found.items() if place not in of_en} == {""}
    assert set(of_en.values()) == {"", "en"}
    assert 55 < list(of_en.values()).count("en") < 105  # of 160: four deviations from the half
    epochs = [[of_en[epoch, f"en{i:03d}"] for i in range(40)] for epoch in range(4)]
    assert all(a != b for a, b in itertools.pairwise(epochs))
    # Neither the batches nor the audio's changes have a part in it, nor has the number of ranks.
    other = replace(config, batch=BatchConfig(frames=150, min_seconds=0.0))
    batches = []
    for rank in range(2):
        datasets = [DatasetConfig("d", str(tmp_path / "c" / "*.tar"))]
        options = {"purpose": "train", "epochs": 4, "augment": AugmentConfig(), "text": text}
        with StreamingDataLoader(other, datasets=datasets, rank=rank, world=2, **options) as stream:
            batches += list(stream)
    again = {(b.epoch, k): h for b in batches for k, h in zip(b.keys, b.hints, strict=True)}
    assert again == found
    assert set(hints(purpose="eval").values()) == {""}


@pytest.mark.parametrize("augment", [None, AugmentConfig(noise_share=0.5)])
def test_workers_change_nothing(tmp_path, config, augment) -> None:
    plain_corpus(tmp_path / "c", [6, 6, 6])
    runs = [
        collect(
            replace(config, num_workers=n),
            tmp_path / "c",
            purpose="train",
            epochs=2,
            augment=augment,
        )
        for n in (0, 1, 2)
    ]
    marks = [[digest(b) for b in run] for run in runs]
    assert marks[0] == marks[1] == marks[2]
    assert [b.state for b in runs[0]] == [b.state for b in runs[2]]
    halves: list[dict] = [{}, {}]
    for batch in runs[0]:
        halves[batch.epoch].update(zip(batch.keys, batch.durations, strict=True))
    assert set(halves[0]) == set(halves[1])
    assert (halves[0] == halves[1]) == (augment is None)


def test_batches_are_the_consumers_own(tmp_path, config) -> None:
    plain_corpus(tmp_path / "c", [12])
    batches = collect(replace(config, num_workers=1, prefetch=1), tmp_path / "c")
    fresh = collect(config, tmp_path / "c")
    assert [digest(b) for b in batches] == [digest(b) for b in fresh]


def test_finite_streams_pad_the_last_step_with_empty_batches(tmp_path, config) -> None:
    keys = plain_corpus(tmp_path / "c", [5, 4])
    ranks = [collect(config, tmp_path / "c", rank=r, world=4) for r in range(4)]
    assert len({len(batches) for batches in ranks}) == 1
    assert Counter(k for bs in ranks for b in bs for k in b.keys) == Counter(keys)
    empty = [b for bs in ranks for b in bs[-1:] if not len(b)]
    assert sum(not len(b) for bs in ranks for b in bs) == len(empty) > 0
    for batch in empty:
        assert batch.features_BTF.shape == (0, 0, 80) and batch.tokens_BU.shape[0] == 0
        assert batch.padding_share == 0 and batch.audio_seconds == 0


def test_a_killed_worker_is_replaced_mid_stream(tmp_path, config) -> None:
    plain_corpus(tmp_path / "c", [10, 10])
    want = [digest(b) for b in collect(config, tmp_path / "c", purpose="train", epochs=1)]
    got = []
    datasets = [DatasetConfig("d", str(tmp_path / "c" / "*.tar"))]
    with StreamingDataLoader(replace(config, num_workers=2), datasets=datasets, epochs=1) as stream:
        for number, batch in enumerate(stream):
            got.append(digest(batch))
            if number in (0, 3):
                for pid in stream.pool.pids():
                    with suppress(ProcessLookupError):  # killed before, and not yet missed
                        os.kill(pid, signal.SIGKILL)
    assert got == want


def test_memory_stays_flat(tmp_path, config) -> None:
    """A worker's and the consumer's, over epochs of audio that is augmented in every way."""
    plain_corpus(tmp_path / "c", [20, 20])
    augment = AugmentConfig(noise_share=0.5)
    datasets = [DatasetConfig("d", str(tmp_path / "c" / "*.tar"))]
    with StreamingDataLoader(
        replace(config, num_workers=1), datasets=datasets, augment=augment
    ) as stream:
        processes = [psutil.Process(pid) for pid in (os.getpid(), *stream.pool.pids())]
        memory = []
        for number, _ in zip(range(601), stream, strict=False):
            if number % 200 == 0:
                memory.append([p.memory_info().rss for p in processes])
    growth = [(last - early) / 2**20 for early, last in zip(memory[1], memory[3], strict=True)]
    assert max(growth) < 8, f"MiB over 400 batches: {growth}"


def test_close_leaves_no_process(tmp_path, config) -> None:
    plain_corpus(tmp_path / "c", [10])
    stream = StreamingDataLoader(
        replace(config, num_workers=2), datasets=[DatasetConfig("d", str(tmp_path / "c" / "*.tar"))]
    )
    next(stream)
    pids = stream.pool.pids()
    stream.close()
    stream.close()
    assert not any(psutil.pid_exists(pid) for pid in pids)
    with pytest.raises(StopIteration):
        next(stream)


def test_a_batch_that_lost_all_its_samples_is_empty_and_tells(tmp_path, config) -> None:
    write_tar(
        tmp_path / "c" / "x-00.tar",
        [{"key": f"k{i}", "audio": b"nonsense", "duration": 0.5} for i in range(4)],
    )
    batches = collect(config, tmp_path / "c")
    assert [len(b) for b in batches] == [0] * len(batches)
    assert sorted(key for b in batches for _, _, key, _ in b.bad) == ["k0", "k1", "k2", "k3"]


def test_over_long_and_too_short_are_left_out_by_the_plan(tmp_path, config) -> None:
    samples = [
        {"key": f"k{i}", "audio": encoded(wave(s)), "duration": s}
        for i, s in enumerate((0.05, 0.5, 2.5, 6.0))
    ]
    write_tar(tmp_path / "c" / "x-00.tar", samples)
    batch = replace(config.batch, min_seconds=0.1, max_seconds=5.0, frames=200)
    batches = collect(replace(config, batch=batch), tmp_path / "c")
    assert [k for b in batches for k in b.keys] == ["k1"]
    causes = {key: cause for b in batches for cause, _, key, _ in b.bad}
    assert causes == {"k0": "too_short", "k2": "over_budget", "k3": "too_long"}


class CharTokenizer:
    """One token for each character."""

    pad_id, end_id = 7, 1

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]


def test_tokens_end_with_the_end_and_are_padded_with_pad(tmp_path, config) -> None:
    plain_corpus(tmp_path / "c", [4])
    text = TextEncoder(tokenizer=CharTokenizer())
    for batch in collect(config, tmp_path / "c", text=text):
        for row, length, said in zip(
            batch.tokens_BU, batch.token_lengths_B, batch.texts, strict=True
        ):
            assert row[:length].tolist() == [ord(c) for c in said] + [1]
            assert (row[length:] == 7).all()


def test_samples_without_text_are_kept_if_asked_for(tmp_path, config) -> None:
    samples = [
        {"key": key, "audio": encoded(wave(0.5)), "duration": 0.5, "text": text}
        for key, text in (("mute", ""), ("said", "hi"))
    ]
    write_tar(tmp_path / "n" / "n-00.tar", samples)
    drop = TextEncoder(tokenizer=CharTokenizer())
    batches = collect(config, tmp_path / "n", text=drop)
    assert [k for b in batches for k in b.keys] == ["said"]
    assert [bad[0] for b in batches for bad in b.bad] == ["empty_text"]
    keep = TextEncoder(TextConfig(empty="keep"), tokenizer=CharTokenizer())
    rows = {
        key: row[:length].tolist()
        for b in collect(config, tmp_path / "n", text=keep)
        for key, row, length in zip(b.keys, b.tokens_BU, b.token_lengths_B, strict=True)
    }
    assert rows == {"mute": [1], "said": [ord("h"), ord("i"), 1]}


def test_a_leading_space_is_tokenized_with_the_first_word() -> None:
    def sample(text: str) -> Sample:
        return Sample("k", "s", b"", "flac", text, "en", "", 1.0, None, None, {})

    encoder = TextEncoder(TextConfig(empty="keep", leading_space=True), tokenizer=CharTokenizer())
    assert encoder.encode(sample("hi")) == ("hi", [], [ord(" "), ord("h"), ord("i"), 1])
    assert encoder.encode(sample(""))[2] == [1]


def test_noise_shards_change_the_features(tmp_path, config) -> None:
    plain_corpus(tmp_path / "c", [6])
    plain_corpus(tmp_path / "n", [3], "noise", seed=9)
    augment = AugmentConfig(speeds=(1.0,), noise_share=1.0, silence=0.0, kinds=("recorded",))
    arguments = {"purpose": "train", "epochs": 1}
    with pytest.raises(UserError, match=r"dataloader\.noise"):
        collect(config, tmp_path / "c", augment=augment, **arguments)
    noisy = replace(config, noise=str(tmp_path / "n" / "*.tar"))
    runs = [
        collect(replace(noisy, num_workers=n), tmp_path / "c", augment=augment, **arguments)
        for n in (0, 1)
    ]
    assert [digest(b) for b in runs[0]] == [digest(b) for b in runs[1]]
    clean = collect(config, tmp_path / "c", **arguments)
    assert [b.keys for b in clean] == [b.keys for b in runs[0]]
    for a, b in zip(clean, runs[0], strict=True):
        assert a.features_BTF.shape == b.features_BTF.shape
        assert (a.features_BTF - b.features_BTF).abs().mean() > 0.01


def test_noise_sets_share_by_weight_and_report_bad_recordings(
    tmp_path, config, monkeypatch
) -> None:
    """Each set has its weight's share of the recordings; long ones are cut to their start."""
    from dsasr.data.dataloader import dataloader as module

    monkeypatch.setattr(module, "RECORDINGS", 8)
    plain_corpus(tmp_path / "c", [6])
    plain_corpus(tmp_path / "cars", [2, 2, 2], "car", seed=9)
    hum = {"key": "hum", "audio": encoded(wave(14.0)), "duration": 14.0}
    torn = {"key": "torn", "audio": b"no audio", "duration": 1.0}
    write_tar(tmp_path / "hums" / "hum-00.tar", [torn, hum])
    cars, hums = (str(tmp_path / name / "*.tar") for name in ("cars", "hums"))
    augment = AugmentConfig(noise_share=0.5, kinds=("recorded", "vehicle"))
    datasets = [DatasetConfig("d", str(tmp_path / "c" / "*.tar"))]

    def open_loader(noise, **arguments) -> StreamingDataLoader:
        return StreamingDataLoader(
            replace(config, noise=noise), datasets=datasets, augment=augment, **arguments
        )

    for noise, shares in (
        ({cars: 3.0, hums: 1.0}, (6, 2)),
        ((cars, hums), (4, 4)),
        (cars, (6, 0)),  # one set: each of its recordings once
    ):
        with open_loader(noise) as stream:
            lengths = [len(w) for w in stream.collator.recordings]
            long = sum(n == module.NOISE_SECONDS * RATE for n in lengths)
            assert (len(lengths) - long, long) == shares
            bad = [(cause, key) for cause, _, key, _ in next(stream).bad]
            assert bad == ([("decode_error", "torn")] if long else [])
            assert not next(stream).bad
    with open_loader((cars, hums), rank=1, world=2) as stream:
        assert not next(stream).bad  # reported by one rank
    with pytest.raises(UserError, match=r"hum-01.*no usable recording"):
        write_tar(tmp_path / "hums" / "hum-01.tar", [torn])
        open_loader((cars, str(tmp_path / "hums" / "hum-01.tar")))
    with pytest.raises(UserError, match=r"noise\..* must be above 0"):
        replace(config, noise={cars: 0.0})


@pytest.mark.parametrize("features", ["worker", "device"])
def test_cmvn_is_applied_and_padding_stays_zero(tmp_path, config, features) -> None:
    plain_corpus(tmp_path / "c", [6])
    cmvn = Cmvn(torch.linspace(1, 9, 80), torch.linspace(0.5, 4, 80))
    config = replace(config, features=features)
    pairs = zip(
        collect(config, tmp_path / "c"),
        collect(config, tmp_path / "c", front_end=FbankFrontEnd(FbankConfig(), cmvn)),
        strict=True,
    )
    for plain, normal in pairs:
        for i, n in enumerate(plain.feature_lengths_B.tolist()):
            want = cmvn.apply(plain.features_BTF[i, :n])
            assert torch.allclose(normal.features_BTF[i, :n], want, atol=1e-6)
            assert not normal.features_BTF[i, n:].any()


@pytest.mark.parametrize("shift", [4.0, 10.0, 20.0])
def test_any_shift_of_frames(tmp_path, config, shift) -> None:
    """The plan counts hundredths of a second, whatever the features' rate."""
    plain_corpus(tmp_path / "c", [6])
    fbanks = FbankConfig(shift_ms=shift, mels=23)
    for batch in collect(config, tmp_path / "c", front_end=FbankFrontEnd(fbanks)):
        want = [fbanks.frames(round(seconds * RATE)) for seconds in batch.durations]
        assert batch.feature_lengths_B.tolist() == want and batch.features_BTF.shape[2] == 23
        for row, length in zip(batch.features_BTF, want, strict=True):
            assert row[:length].any(1).all() and not row[length:].any()


def test_device_features_equal_worker_features(tmp_path, config) -> None:
    plain_corpus(tmp_path / "c", [6])
    one = collect(config, tmp_path / "c")
    two = collect(replace(config, features="device"), tmp_path / "c")
    for a, b in zip(one, two, strict=True):
        assert a.keys == b.keys and torch.equal(a.feature_lengths_B, b.feature_lengths_B)
        assert a.features_BTF.shape == b.features_BTF.shape
        assert (a.features_BTF - b.features_BTF).abs().max() < 1e-3
        assert a.durations == b.durations


def test_temperature_evens_out_languages(tmp_path, config) -> None:
    folder = tmp_path / "c"
    keys = plain_corpus(folder, [16], "en") + plain_corpus(folder, [4], "zh")
    names = sorted(p.name for p in folder.glob("*.tar"))
    data = {
        "version": 1,
        "shards": [{"name": n, "samples": s} for n, s in zip(names, (16, 4), strict=True)],
        "samples": 20,
        "hours": 5.0,
        "langs": {"en": {"samples": 16, "hours": 4.0}, "zh": {"samples": 4, "hours": 1.0}},
    }
    (folder / "dataset.json").write_text(json.dumps(data))
    datasets = [DatasetConfig("d", str(folder))]
    from dsasr.data.shards.storage import ShardStorage

    for temperature, share in ((1.0, 0.8), (2.0, 2 / 3), (100.0, 0.5)):
        parts = build_dataset_parts(datasets, ShardStorage(), temperature)
        assert [p.name for p in parts] == ["d/en", "d/zh"]
        assert parts[0].weight == pytest.approx(share, abs=0.01)
    with StreamingDataLoader(
        replace(config, temperature=2.0), datasets=datasets, purpose="eval"
    ) as stream:
        batches = list(stream)
    assert Counter(k for b in batches for k in b.keys) == Counter(keys)
    assert all(len(set(b.langs)) == 1 for b in batches)
    with pytest.raises(UserError, match="has no 'fr'"):
        build_dataset_parts([DatasetConfig("d", str(folder), lang="fr")], ShardStorage())
    with pytest.raises(UserError, match="needs the hours"):
        build_dataset_parts([DatasetConfig("d", str(folder / "*.tar"))], ShardStorage(), 2.0)


def test_wrong_configs_are_user_errors(tmp_path, config) -> None:
    for wrong in ({"num_workers": -1}, {"prefetch": 0}, {"window": 0}, {"temperature": 0.5}):
        with pytest.raises(UserError):
            DataLoaderConfig(**wrong)
    with pytest.raises(UserError, match="weight"):
        DatasetConfig("d", "x", weight=0.0)
    with pytest.raises(UserError, match="there is no shard"):
        StreamingDataLoader(config, datasets=[DatasetConfig("d", str(tmp_path / "none.tar"))])
