"""A batch's bits are the same whoever makes it, on however many threads."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from dsasr.data.audio import features
from dsasr.data.audio.augment import NOISE_KINDS, RECORDED, AugmentConfig
from dsasr.data.dataloader.bucketing import BatchConfig
from dsasr.data.dataloader.dataloader import DataLoaderConfig, DatasetConfig, StreamingDataLoader
from dsasr.testing.dataloader_fuzz import digest

# What may be cut differently by threads: long sums, transforms, products; every kind of noise.
AUGMENT = AugmentConfig(noise_share=0.8, kinds=(*NOISE_KINDS, RECORDED))


@pytest.fixture(autouse=True)
def threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Eight utterances of 2 to 5 s at three rates, one in stereo."""
    folder, rng = tmp_path_factory.mktemp("threads"), np.random.default_rng(0)
    with tarfile.open(folder / "x.tar", "w") as tar:
        for i, rate in enumerate((16_000, 8000, 48_000, 16_000) * 2):
            seconds = float(rng.uniform(2, 5))
            wave = rng.standard_normal((int(seconds * rate), 2 if i == 3 else 1)) * 0.1
            buffer = io.BytesIO()
            soundfile.write(buffer, wave, rate, format="FLAC", subtype="PCM_16")
            meta = {"text": f"text {i}", "lang": "en", "speaker": "s", "duration": seconds}
            for name, data in ((f"{i}.flac", buffer.getvalue()), (f"{i}.json", json.dumps(meta))):
                data = data if isinstance(data, bytes) else data.encode()
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return folder


def stream_digests(corpus: Path, workers: int, threads: int, features: str) -> list[str]:
    torch.set_num_threads(threads)
    config = DataLoaderConfig(
        batch=BatchConfig(frames=2000),
        num_workers=workers,
        features=features,
        noise=str(corpus / "x.tar"),
    )
    datasets = [DatasetConfig("x", str(corpus / "x.tar"))]
    with StreamingDataLoader(
        config, datasets=datasets, augment=AUGMENT, epochs=2, seed=3
    ) as stream:
        marks = [digest(batch) for batch in stream]
    assert torch.get_num_threads() == threads, "the training process's threads were taken away"
    return marks


@pytest.mark.parametrize("features", ["worker", "device"])
def test_bits_depend_neither_on_threads_nor_on_processes(corpus, features) -> None:
    want = stream_digests(corpus, 0, 1, features)
    assert len(want) > 3 and len(set(want)) == len(want)
    for workers, threads in ((0, 2), (0, 5), (1, 1), (1, 2), (2, 2)):
        assert stream_digests(corpus, workers, threads, features) == want, (workers, threads)


def test_one_thread_holds_inside_and_only_there() -> None:
    torch.set_num_threads(2)
    seen = []

    @features.one_thread()
    def work(fail: bool = False) -> None:
        seen.append(torch.get_num_threads())
        if fail:
            raise ValueError

    work()
    with pytest.raises(ValueError):
        work(True)
    work()  # a decorator made of a context manager can be entered again
    assert seen == [1, 1, 1] and torch.get_num_threads() == 2
    assert replace(AUGMENT).kinds[-1] == RECORDED
