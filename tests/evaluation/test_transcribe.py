"""Transcribing batches and clips: keys, conditions and order, over any number of ranks."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dsasr.data.audio.features import Cmvn, FbankConfig
from dsasr.data.audio.frontends import FbankFrontEnd
from dsasr.evaluation.decode import DecodeConfig, Hypothesis
from dsasr.evaluation.eval_sets import Recording, batch_recordings
from dsasr.evaluation.results import Result, Results
from dsasr.evaluation.suite import SuiteConfig, build_suite
from dsasr.evaluation.transcribe import transcribe, transcribe_clips

FBANK = FbankConfig()
FRONT_END = FbankFrontEnd(FBANK, Cmvn(torch.zeros(FBANK.mels), torch.ones(FBANK.mels)))
TOKENIZER = SimpleNamespace(pad_id=0, end_id=1, encode=lambda text: [2] * len(text))


def recording(key: str, text: str, seconds: float) -> Recording:
    wave = np.random.default_rng(0).normal(0, 0.1, int(16000 * seconds)).astype(np.float32)
    return Recording(key, wave, text, "en", "s")


RECORDINGS = [
    recording("b", "two", 0.5), recording("a", "one", 0.3), recording("c", "", 0.4),
]  # fmt: skip


@pytest.fixture
def batch_sizes(monkeypatch) -> list[int]:
    """Sizes of the decoded batches; the text of an utterance is its duration."""
    sizes: list[int] = []

    def decode(_model, batch, _tokenizer, _config, _any_rank, with_ctc_score):
        sizes.append(len(batch))
        return [
            [Hypothesis(key, (5,), f"{seconds:.2f}", -1.0, (0.2, 0.4))]
            for key, seconds in zip(batch.keys, batch.durations, strict=True)
        ]

    monkeypatch.setattr("dsasr.evaluation.transcribe.decode_nbest", decode)
    return sizes


def test_batches_give_results_by_key(batch_sizes):
    batches = batch_recordings(RECORDINGS, front_end=FRONT_END, tokenizer=TOKENIZER)
    results = transcribe(None, batches, TOKENIZER, DecodeConfig(), device=torch.device("cpu"))
    assert [(r.key, r.reference, r.hypothesis) for r in results.rows] == [
        ("a", "one", "0.30"), ("b", "two", "0.50"), ("c", None, "0.40")
    ]  # fmt: skip
    assert results.conditions() == ["clean"]
    expected = Result("a", "clean", "en", "one", "0.30", 0.3, pytest.approx(0.3), True, "s")
    assert results.rows[0] == expected


def test_clips_keep_their_order_and_every_rank_decodes_as_often(batch_sizes):
    config = SuiteConfig(clips=1, seconds=0.6, snrs=(5.0,), truncations=(0.5,))
    clips = build_suite(RECORDINGS, config)
    options = {"front_end": FRONT_END, "device": torch.device("cpu"), "frames": 100}
    results = transcribe_clips(None, clips, TOKENIZER, DecodeConfig(), **options)
    labels = [(clip.key, clip.condition, clip.text, clip.lang) for clip in clips]
    assert [(r.key, r.condition, r.reference, r.lang) for r in results.rows] == labels
    assert all(float(r.hypothesis) == pytest.approx(r.seconds, abs=0.01) for r in results.rows)
    batch_sizes.clear()
    barrier, values = threading.Barrier(3), [None] * 3

    def on_rank(rank: int) -> Results:
        def gather(value):
            values[rank] = value
            barrier.wait(60)
            gathered = list(values)
            barrier.wait(60)
            return gathered

        return transcribe_clips(
            None, clips, TOKENIZER, DecodeConfig(), **options,
            rank=rank, world_size=3, gather=gather,
        )  # fmt: skip

    with ThreadPoolExecutor(3) as ranks:
        assert list(ranks.map(on_rank, range(3))) == [results] * 3
    assert 0 in batch_sizes and len(batch_sizes) % 3 == 0
