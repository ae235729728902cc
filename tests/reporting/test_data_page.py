"""The page of a data set: histograms, players, the oddest, and no word of a transcript as HTML."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
import soundfile
import torch

from dsasr.data.shards import shard_measures
from dsasr.data.shards.shard_measures import measure_shard
from dsasr.data.shards.writer import PackedSample, write_shard
from dsasr.reporting import data_page

RATE = 16_000


def sound(seconds: float, seed: int) -> bytes:
    buffer = io.BytesIO()
    wave = np.random.default_rng(seed).normal(0, 0.05 * (1 + seed % 3), int(RATE * seconds))
    soundfile.write(buffer, wave.clip(-1, 1), RATE, format="FLAC")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> shard_measures.ShardMeasures:
    """Eight utterances in two languages, one damaged; texts with what HTML must not obey."""
    path = tmp_path_factory.mktemp("page") / "000000.tar"
    texts = ["<script>alert(1)</script>", "打开灯", *(f"one two {i}" for i in range(6))]
    samples = [
        PackedSample(f"k{i}", "flac", sound(0.5 + i / 4, i), {
            "text": text, "lang": "zh" if i == 1 else "en", "speaker": f"s{i % 2}",
            "duration": 0.5 + i / 4,
        })
        for i, text in enumerate(texts)
    ]  # fmt: skip
    samples.append(
        PackedSample("bad", "flac", b"fLaC" + bytes(4000), {"text": "x", "duration": 1.0})
    )
    write_shard(path, samples)
    return measure_shard(path, odd=4, random=3)


def test_the_page_has_what_was_measured(found):
    page = data_page.page("shards/train", found, of_shards=7)
    assert "<h1>Data: shards/train</h1>" in page and "1 of 7" in page
    for title in ("Length", "Characters a second", "Level", "Signal-to-noise ratio", "Languages"):
        assert f"<h3>{title}</h3>" in page
    assert page.count("<article") == 3 + 4 * 4  # nothing is clipped
    assert page.count('<audio controls preload="none"') == 19
    assert "decode_error" in page and "flac 16 kHz (8)" in page
    assert "en 0.00 h, zh 0.00 h" in page and "2 of them" not in page
    assert "3 of them Han" in page  # characters


def test_texts_are_escaped_and_nothing_is_loaded(found):
    page = data_page.page("x<y", found, of_shards=1)
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "x&lt;y" in page and page.count("<script>") == 1
    assert "default-src 'none'" in page
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)


def test_a_player_has_the_first_seconds(found):
    wave = 0.5 * torch.sin(torch.arange(RATE) / 5)
    data, kind = data_page.encode(wave)
    heard, rate = soundfile.read(io.BytesIO(base64.b64decode(data)))
    assert (kind, rate) == ("audio/mpeg", RATE)
    assert abs(len(heard) - RATE) < 3000 and len(data) < 8000
    assert np.abs(heard).max() == pytest.approx(0.5, abs=0.1)


def test_without_mp3_a_player_has_flac(monkeypatch):
    monkeypatch.setattr(soundfile, "available_formats", dict)
    data, kind = data_page.encode(torch.zeros(800))
    assert kind == "audio/flac" and base64.b64decode(data)[:4] == b"fLaC"


def test_the_oddest_run_from_one_end_to_the_other(found):
    odd = data_page._odd("seconds", found, {})
    assert [p.utterance.key for p in odd.players] == ["k0", "k1", "k6", "k7"]
    assert odd.players[0].about.startswith("0.5 s · s0 · en · ")
    assert odd.note.startswith("From the shortest to the longest; half of all lie below 1.")


def test_audio_that_is_gone_leaves_its_text(found, monkeypatch):
    monkeypatch.setattr(data_page, "read_audio", lambda *_: [])
    page = data_page.page("x", found, of_shards=1)
    assert "<audio" not in page and page.count("<article") == 19
