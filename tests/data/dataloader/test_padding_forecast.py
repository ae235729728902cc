"""Forecasts of batches: known answers, agreement with the stream, and padding on real durations."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from dsasr import recipe
from dsasr.build import Builder
from dsasr.data.audio.augment import AugmentConfig
from dsasr.data.dataloader.augment_sampler import planned_seconds
from dsasr.data.dataloader.bucketing import BatchConfig
from dsasr.data.dataloader.padding_forecast import Forecast, forecast
from dsasr.data.dataloader.window_plan import DatasetPart, PlanConfig
from dsasr.data.shards.index import ShardIndex, load_index
from dsasr.data.shards.sample import Entry
from dsasr.planning import batch_search

ROOT = Path(__file__).resolve().parents[3]
DEMO = ROOT / "corpus" / "demo" / "shards" / "train"


def index_of(rows: list[tuple[float, int]]) -> ShardIndex:
    """A shard of (seconds, characters)."""
    entries = [Entry(f"k{i}", "flac", 0, 1, 0, 1, s, c, "en") for i, (s, c) in enumerate(rows)]
    return ShardIndex("x.tar", entries)


def told(rows: list[tuple[float, int]], augment: AugmentConfig | None = None, **batch) -> Forecast:
    index = index_of(rows)
    lengths = None if augment is None else planned_seconds(augment)
    plan = PlanConfig(batch=BatchConfig(**batch))
    return forecast([DatasetPart("a", ["x.tar"])], plan, lambda shard: index, lengths)


def test_known_answers() -> None:
    # Two batches: 2 x 1 s, and 4 s beside 3.88 s, 12 frames of padding; a fifth is too long.
    rows = [(1.0, 4), (1.0, 4), (4.0, 16), (3.875, 10), (50.0, 9)]
    got = told(rows, frames=800, bucket=0.05)
    assert (got.samples, got.batches, got.left_out) == (4, 2, Counter(too_long=1))
    assert got.padding == pytest.approx(12 / 1000)
    assert got.fill == pytest.approx((200 + 800) / 2 / 800)
    assert got.hours == pytest.approx(9.88 / 3600) and (got.longest, got.shortest) == (400, 100)
    # Positions: 40 + 7 + 4 + 1 = 52 twice; at most 40 + 25 + 16 + 1 = 82, padded for both.
    assert got.positions_per_frame == pytest.approx(0.99 * 104 / 200 + 0.01 * 164 / 800)
    assert told([(50.0, 1)], frames=800).batches == 0


def test_a_share_of_the_shards_is_evenly_spread() -> None:
    loaded = []

    def load(shard: str) -> ShardIndex:
        loaded.append(shard)
        return index_of([(1.0, 4)] * 5)

    part = DatasetPart("a", [f"{i}.tar" for i in range(100)], np.full(100, 5))
    got = forecast([part], PlanConfig(), load, max_shards=5)
    assert got.samples == 25 and sorted(set(loaded), key=lambda s: int(s[:-4])) == [
        "0.tar", "24.tar", "49.tar", "74.tar", "99.tar",
    ]  # fmt: skip


def test_the_stream_makes_what_was_forecast(tiny) -> None:
    cfg = recipe.load(str(tiny), ["data.augment={speeds: [0.9, 1.1], noise_share: 0.5}"])
    stage = cfg.stage("align")
    got = batch_search.forecast_stage(cfg, stage)
    padded = useful = batches = 0
    with Builder(cfg).train_dataloader(stage, None) as stream:
        for batch in stream:
            if batch.epoch:
                break
            batches += 1
            padded += batch.features_BTF.shape[0] * batch.features_BTF.shape[1]
            useful += int(batch.feature_lengths_B.sum())
    assert batches == got.batches
    # Feature frames are two fewer than a sample's hundredths of a second.
    assert 1 - useful / padded == pytest.approx(got.padding, abs=0.005)


@pytest.mark.parametrize("augment", [None, AugmentConfig()])
@pytest.mark.parametrize(
    ("name", "frames"), [("en_read", 12_000), ("en_digits", 6000), ("zh_words", 12_000)]
)
def test_at_most_three_percent_of_real_speech_is_padding(recordings, name, frames, augment) -> None:
    lines = (recordings / name / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [(row["duration"], len(row["text"])) for row in map(json.loads, lines)]
    got = told(rows, augment, frames=frames)
    print(f"{name} at {frames} frames: {got.padding:.2%} of {got.batches} batches")
    assert got.samples == len(rows) and got.padding <= 0.03


def test_at_most_three_percent_of_the_demo_is_padding() -> None:
    if not DEMO.is_dir():
        pytest.skip("no demo corpus: tools/quickstart.sh makes it")
    cfg = recipe.load("demo")
    indexes = {p.name: load_index(p) for p in DEMO.glob("*.index.json")}
    shards = sorted(str(p) for p in DEMO.glob("*.tar"))
    for stage in cfg.stages:
        plan = PlanConfig(batch=cfg.dataloader(stage)[0].batch, window_samples=8192)
        lengths = planned_seconds(cfg.data.augment)
        part = DatasetPart("demo", shards, np.array([len(indexes[_index(s)]) for s in shards]))
        got = forecast([part], plan, lambda shard: indexes[_index(shard)], lengths)
        assert not got.left_out and got.padding <= 0.03


def _index(shard: str) -> str:
    return Path(shard).name.replace(".tar", ".index.json")
