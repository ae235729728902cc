"""Measures of shards: histograms that add up, the oddest utterances, and flat memory."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
import soundfile

from dsasr.data.shards import shard_measures
from dsasr.data.shards.shard_measures import (
    MEASURES,
    Histogram,
    ShardMeasures,
    Utterance,
    measure_shard,
    read_audio,
)
from dsasr.data.shards.writer import PackedSample, write_shard


def flac(seconds: float) -> bytes:
    buffer = io.BytesIO()
    wave = np.random.default_rng(0).normal(0, 0.1, int(16_000 * seconds))
    soundfile.write(buffer, wave, 16_000, format="FLAC")
    return buffer.getvalue()


def utterance(number: int, **values: float) -> Utterance:
    plain = {"seconds": 2.0, "rate": 10.0, "level": -20.0, "clipped": 0.0, "snr": 30.0}
    fields = {**plain, **values}
    order = number * 7919 % 1000
    names = Path("a.tar"), f"k{number}", "en", f"s{number % 3}", "text"
    return Utterance(*names, order=order, **fields)


def test_a_histogram_has_its_ends_and_quantiles():
    histogram = Histogram.empty(0.0, 10.0, 0.5)
    for value in (-3.0, 0.2, 4.9, 5.0, 99.0):
        histogram.add(value)
    assert histogram.counts[[0, 9, 10, 19]].tolist() == [2, 1, 1, 1] and histogram.total == 5
    assert (histogram.lowest, histogram.highest) == (-3.0, 99.0)
    assert histogram.quantile(0.5) == pytest.approx(4.75)
    other = Histogram.empty(0.0, 10.0, 0.5)
    assert np.isnan(other.quantile(0.5))
    other.add(7.0)
    other.merge(histogram)
    assert other.total == 6 and other.lowest == -3.0


def test_merged_shards_keep_what_one_of_all_keeps():
    rows = [utterance(i, seconds=float((i * 37) % 101), clipped=(i % 5) / 10) for i in range(100)]
    whole = ShardMeasures(odd=10, random=4)
    whole.keep(rows)
    merged = ShardMeasures(odd=10, random=4)
    for start in range(0, 100, 13):
        part = ShardMeasures(odd=10, random=4, shards=1)
        for row in rows[start : start + 13]:
            part.add(row, "flac 16 kHz")
        part.keep(rows[start : start + 13])
        merged.merge(part)
    assert merged.extremes == whole.extremes and merged.chosen == whole.chosen
    lengths = [row.seconds for row in merged.extremes["seconds"]]
    assert (
        lengths
        == sorted(row.seconds for row in rows)[:5] + sorted(row.seconds for row in rows)[-5:]
    )
    assert all(row.clipped == 0.4 for row in merged.extremes["clipped"])
    assert len(merged.chosen) == 4
    assert merged.utterances == 100 and merged.formats == {"flac 16 kHz": 100}
    assert merged.speakers == {"s0": 34, "s1": 33, "s2": 33} and merged.langs["en"][0] == 100


def test_few_utterances_are_all_kept_once():
    found = ShardMeasures(odd=10)
    rows = [utterance(i, level=-float(i)) for i in range(3)]
    found.keep(rows)
    found.keep(rows)
    assert [row.level for row in found.extremes["level"]] == [-2.0, -1.0, 0.0]
    assert found.extremes["clipped"] == []  # nothing is clipped: nothing is odd


def test_speakers_are_counted_up_to_a_limit(monkeypatch):
    monkeypatch.setattr(shard_measures, "MAX_NAMES", 2)
    found = ShardMeasures()
    for number in range(9):
        found.add(dataclasses.replace(utterance(number), speaker=f"s{number % 4}"), "wav")
    assert found.speakers == {"s0": 3, "s1": 2} and found.utterances == 9


def test_a_shard_is_measured_and_its_audio_read_again(tiny):
    tar = tiny.parent / "train" / "000002.tar"
    found = measure_shard(tar, odd=6, random=3)
    assert (found.shards, found.utterances, found.bad) == (1, 12, {})
    assert found.formats == {"flac 16 kHz": 12} and found.speakers == {"s": 12}
    assert set("badofigu") & set(found.characters) and found.langs["en"][0] == 12
    assert all(len(found.extremes[name]) == 6 for name in MEASURES if name != "clipped")
    first = found.extremes["seconds"][0]
    assert found.histograms["seconds"].lowest == first.seconds
    (pair,) = read_audio([first], seconds=0.25)
    assert pair[0] is first and len(pair[1]) == 4000


def test_damaged_samples_are_counted_by_cause(tmp_path):
    samples = [
        PackedSample(key, "flac", sound, {"text": "ba", "lang": "en", "duration": 0.5})
        for key, sound in (("a", b"fLaC" + bytes(4000)), ("b", flac(0.5)))
    ]
    path = tmp_path / "x.tar"
    write_shard(path, samples)
    found = measure_shard(path)
    assert found.utterances == 1 and found.bad == {"decode_error": 1}
    assert found.bad_examples["decode_error"][2] == "a"
