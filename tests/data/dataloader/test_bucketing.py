"""The plan: exactly once, elastic, bounded, and the same on all ranks."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import textwrap
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsasr.data.dataloader.bucketing import BatchConfig, bucket_order, split_into_batches
from dsasr.data.dataloader.sampler import BatchSampler
from dsasr.data.dataloader.window_plan import (
    DatasetPart,
    PlanConfig,
    sample_seeds,
    stable_hash,
    uniform,
)
from dsasr.utils.errors import UserError


@dataclass(frozen=True)
class FakeEntry:
    key: str
    duration: float
    chars: int


class FakeIndex:
    """What the sampler asks of a shard's index, made from the shard's name."""

    bad = ()

    def __init__(self, shard: str, count: int, langs: str = "en", longest: float = 15.0) -> None:
        rng = np.random.default_rng(stable_hash(shard))
        self.shard, self.keys = shard, [f"{shard}:{row}" for row in range(count)]
        self.durations = rng.uniform(0.5, longest, count).astype(np.float32)
        self.chars = (self.durations * 12 * rng.uniform(0.5, 1.5, count)).astype(np.int32)
        self.langs = np.array([langs.split("+")[i % len(langs.split("+"))] for i in range(count)])

    def __len__(self) -> int:
        return len(self.durations)

    def entry(self, row: int) -> FakeEntry:
        return FakeEntry(self.keys[row], float(self.durations[row]), int(self.chars[row]))

    def lang_mask(self, lang: str) -> np.ndarray:
        return self.langs == lang


class Corpus:
    """Shards by name; counts the index loads."""

    def __init__(self, sizes: list[int], name: str = "a", langs: str = "en") -> None:
        self.sizes = {f"/data/{name}-{i:05d}.tar": n for i, n in enumerate(sizes)}
        self.langs = langs

    def __call__(self, shard: str) -> FakeIndex:
        return FakeIndex(shard, self.sizes[shard], self.langs)

    def part(self, name: str = "a", counted: bool = True, **kwargs) -> DatasetPart:
        counts = np.array(list(self.sizes.values())) if counted else None
        return DatasetPart(name, list(self.sizes), counts, **kwargs)

    def keys(self) -> Counter:
        return Counter(f"{s}:{i}" for s, n in self.sizes.items() for i in range(n))


def keys(tasks) -> Counter:
    return Counter(s.entry.key for t in tasks for s in t.samples)


def drain(parts, config, load, world, state=None, steps=None, **kwargs):
    """Run all ranks in step; their tasks in global order and the state behind them."""
    samplers = [
        BatchSampler(parts, config, load, rank=r, world=world, state=state, **kwargs)
        for r in range(world)
    ]
    tasks = []
    while steps is None or steps > 0:
        row = [p.step() for p in samplers]
        states = [p.state() for p in samplers]
        assert all(s == states[0] for s in states)
        assert len({t is None for t in row}) == 1, "ranks must end together"
        if row[0] is None:
            break
        tasks += row
        steps = None if steps is None else steps - 1
    state = json.loads(json.dumps(samplers[0].state()))
    for sampler in samplers:
        sampler.close()
    return tasks, state


FINITE = PlanConfig(BatchConfig(frames=6000), seed=3, epochs=1, window=2, window_samples=50)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(sum),
    world=st.integers(1, 5),
    counted=st.booleans(),
    seed=st.integers(0, 9),
    epochs=st.integers(1, 3),
)
def test_every_sample_once_an_epoch(sizes, world, counted, seed, epochs) -> None:
    corpus = Corpus(sizes)
    config = replace(FINITE, seed=seed, epochs=epochs)
    tasks, _ = drain([corpus.part(counted=counted)], config, corpus, world)
    want = corpus.keys()
    assert keys(tasks) == Counter({k: epochs * n for k, n in want.items()})
    assert len(tasks) % world == 0
    empty = [t for t in tasks if not t.samples]
    assert len(empty) < world and tasks[len(tasks) - len(empty) :] == empty
    assert [t.number for t in tasks] == list(range(len(tasks)))
    for epoch in range(epochs):
        assert keys(t for t in tasks if t.epoch == epoch) == want


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=8).filter(sum),
    worlds=st.lists(st.integers(1, 5), min_size=2, max_size=4),
    cuts=st.lists(st.integers(0, 5), min_size=3, max_size=3),
)
def test_another_world_size_continues_the_same_sequence(sizes, worlds, cuts) -> None:
    """Whatever the world sizes on the way, global batches come in one order, endless."""
    corpus = Corpus(sizes)
    config = replace(FINITE, epochs=0)
    state, seen = None, []
    for world, steps in zip(worlds, cuts, strict=False):
        tasks, state = drain([corpus.part()], config, corpus, world, state, steps)
        seen += tasks
    whole, _ = drain([corpus.part()], config, corpus, 1, None, len(seen))
    assert seen == whole


def test_epochs_differ_and_seeds_differ_but_runs_do_not() -> None:
    corpus = Corpus([20, 20, 20])
    config = replace(FINITE, epochs=2)
    first, _ = drain([corpus.part()], config, corpus, 1)
    again, _ = drain([corpus.part()], config, corpus, 1)
    other, _ = drain([corpus.part()], replace(config, seed=4), corpus, 1)
    assert first == again
    half = [t for t in first if t.epoch == 0], [t for t in first if t.epoch == 1]
    assert [t.samples for t in half[0]] != [t.samples for t in half[1]]
    assert [t.samples for t in first] != [t.samples for t in other]
    assert {t.seed for t in first}.isdisjoint(t.seed for t in other)


@settings(max_examples=60, deadline=None)
@given(
    seconds=st.lists(st.floats(0.05, 60.0), min_size=1, max_size=80),
    frames=st.integers(10, 4000),
    tokens=st.sampled_from([0, 200, 900]),
    samples=st.integers(1, 9),
)
def test_budgets_hold_and_ranges_cover(seconds, frames, tokens, samples) -> None:
    config = BatchConfig(frames=frames, tokens=tokens, samples=samples)
    length = np.ceil(np.array(seconds) * 100).astype(np.int64)
    chars = (length // 9).astype(np.int64)
    order = bucket_order(length, chars, config.bucket, np.random.default_rng(0))
    assert sorted(order.tolist()) == list(range(len(seconds)))
    length, chars = length[order], chars[order]
    ranges = split_into_batches(length, chars, config)
    assert np.concatenate([np.arange(a, b) for a, b in ranges]).tolist() == list(
        range(len(seconds))
    )
    for first, last in ranges:
        count = last - first
        assert count <= samples
        if count > 1:
            assert count * length[first:last].max() <= frames
            row = 41 + -(-length[first:last] // 16) + chars[first:last]
            assert not tokens or count * row.max() <= tokens


def test_bucket_1_mixes_all_lengths_in_batches_that_are_full() -> None:
    """Else they would be of one length, and of few samples where a corpus is small."""
    corpus = Corpus([150] * 4)
    config = PlanConfig(BatchConfig(frames=24_000, samples=16, bucket=1.0), epochs=1, window=4)
    tasks, _ = drain([corpus.part()], config, corpus, 1)
    frames = [s.frames for t in tasks for s in t.samples]
    full = [t for t in tasks if len(t.samples) == 16]
    assert len(full) > 0.6 * len(frames) / 16
    spreads = [np.std([s.frames for s in t.samples]) / np.std(frames) for t in full]
    assert np.mean(spreads) > 0.8
    for task in tasks:
        assert len(task.samples) * max(s.frames for s in task.samples) <= 24_000


def test_a_wide_bucket_may_have_half_its_width_in_padding() -> None:
    corpus = Corpus([150] * 4)
    counts = {}
    for width in (0.02, 0.3):
        config = PlanConfig(BatchConfig(frames=8000, bucket=width), epochs=1, window=4)
        tasks, _ = drain([corpus.part()], config, corpus, 1)
        counts[width] = len(tasks)
        useful = sum(s.frames for t in tasks for s in t.samples)
        padded = sum(len(t.samples) * max(s.frames for s in t.samples) for t in tasks)
        assert 1 - useful / padded < max(0.05, width / 2)
    assert counts[0.3] <= 1.1 * counts[0.02]


def test_padding_of_a_window_is_small() -> None:
    corpus = Corpus([800] * 8)
    config = PlanConfig(BatchConfig(frames=12_000), epochs=1, window=4)
    tasks, _ = drain([corpus.part()], config, corpus, 1)
    useful = sum(s.frames for t in tasks for s in t.samples)
    padded = sum(len(t.samples) * max(s.frames for s in t.samples) for t in tasks)
    assert 1 - useful / padded < 0.02
    least = useful / 12_000
    assert len(tasks) < 1.1 * least + 2


def test_over_long_samples_are_reported_once_and_never_planned() -> None:
    corpus = Corpus([30, 30])
    batch = BatchConfig(frames=1000, min_seconds=2.0, max_seconds=12.0)
    tasks, _ = drain([corpus.part()], replace(FINITE, batch=batch), corpus, 3)
    bad = [b for t in tasks for b in t.bad]
    got = keys(tasks) + Counter(key for _, _, key, _ in bad)
    assert got == corpus.keys()
    assert {b[0] for b in bad} == {"too_short", "over_budget", "too_long"}
    assert max(s.frames for t in tasks for s in t.samples) <= 1000


def test_augmentation_that_breaks_a_limit_is_left_out_not_the_sample() -> None:
    corpus = Corpus([40])
    batch = BatchConfig(frames=1600, max_seconds=16.0)
    longer = lambda seconds, seeds: seconds * (1 + uniform(seeds, 5))  # noqa: E731
    tasks, _ = drain([corpus.part()], replace(FINITE, batch=batch), corpus, 1, lengths=longer)
    assert keys(tasks) == corpus.keys() and not any(t.bad for t in tasks)
    samples = [s for t in tasks for s in t.samples]
    assert {s.plain for s in samples} == {True, False}
    for s in samples:
        stretched = longer(np.float64(s.entry.duration), np.array([s.seed], np.uint64))[0]
        assert s.plain == (stretched > 16.0)
        assert s.frames == np.ceil(100 * (s.entry.duration if s.plain else stretched))


def test_a_window_without_usable_samples_still_reports() -> None:
    corpus = Corpus([5, 5])
    batch = BatchConfig(frames=6000, min_seconds=100.0, max_seconds=200.0)
    config = replace(FINITE, batch=batch, window=1, window_samples=1)
    tasks, _ = drain([corpus.part()], config, corpus, 2)
    assert Counter(b[2] for t in tasks for b in t.bad) == corpus.keys()
    assert not keys(tasks)


def test_mixture_keeps_weights_and_each_dataset_exact() -> None:
    one, two = Corpus([40] * 4, "a"), Corpus([7] * 3, "b")
    load = lambda shard: (one if "/a-" in shard else two)(shard)  # noqa: E731
    parts = [one.part("a", weight=3.0), two.part("b", weight=1.0)]
    tasks, _ = drain(parts, replace(FINITE, epochs=0), load, 2, None, 100)
    counts = Counter(t.dataset for t in tasks)
    assert counts == {"a": 150, "b": 50}
    for i in range(0, 200, 20):  # low discrepancy: any stretch keeps the share
        assert 14 <= sum(t.dataset == "a" for t in tasks[i : i + 20]) <= 16
    for name, corpus in (("a", one), ("b", two)):
        mine = [t for t in tasks if t.dataset == name]
        for epoch in range(mine[-1].epoch):
            assert keys(t for t in mine if t.epoch == epoch) == corpus.keys()


def test_finite_mixture_delivers_every_dataset_whole() -> None:
    one, two = Corpus([40] * 2, "a"), Corpus([3], "b")
    load = lambda shard: (one if "/a-" in shard else two)(shard)  # noqa: E731
    parts = [one.part("a", weight=1.0), two.part("b", weight=5.0)]
    tasks, _ = drain(parts, FINITE, load, 3)
    assert keys(tasks) == one.keys() + two.keys()


def test_languages_of_one_dataset_are_streams_of_their_own() -> None:
    corpus = Corpus([11, 12, 13], langs="en+zh")
    parts = [corpus.part("x/en", lang="en"), corpus.part("x/zh", lang="zh")]
    tasks, _ = drain(parts, FINITE, corpus, 2)
    assert keys(tasks) == corpus.keys()
    for task in tasks:
        rows = {int(s.entry.key.rsplit(":", 1)[1]) % 2 for s in task.samples}
        assert rows <= {0 if task.dataset == "x/en" else 1}


def test_a_language_that_no_shard_has_is_an_error_not_a_loop() -> None:
    corpus = Corpus([3, 3])
    sampler = BatchSampler([corpus.part("x", lang="fr")], replace(FINITE, epochs=0), corpus)
    with pytest.raises(UserError, match="no usable sample in language 'fr'"):
        sampler.step()


@pytest.mark.parametrize("seed", range(8))
def test_one_sample_among_empty_shards_comes_every_epoch(seed) -> None:
    """At one epoch's end and the next one's beginning nearly all windows may be empty."""
    corpus = Corpus([0, 0, 0, 1, 0])
    config = replace(FINITE, seed=seed, epochs=0, window=1, window_samples=1)
    tasks, state = drain([corpus.part()], config, corpus, world=2, steps=10)
    assert [t.epoch for t in tasks] == list(range(20)) and all(len(t.samples) == 1 for t in tasks)
    more, _ = drain([corpus.part()], config, corpus, world=1, state=state, steps=5)
    assert [t.epoch for t in more] == list(range(20, 25))


def test_resume_refuses_another_dataset_or_another_plan() -> None:
    corpus = Corpus([9, 9])
    _, state = drain([corpus.part()], replace(FINITE, epochs=0), corpus, 1, None, 1)
    more = Corpus([9, 9, 9])
    with pytest.raises(UserError, match="dataset 'a' is not the one"):
        BatchSampler([more.part()], replace(FINITE, epochs=0), more, state=state)
    with pytest.raises(UserError, match="batch budgets"):
        BatchSampler([corpus.part()], replace(FINITE, epochs=0, seed=8), corpus, state=state)
    with pytest.raises(UserError, match="version"):
        BatchSampler([corpus.part()], FINITE, corpus, state={**state, "version": 99})
    relocated = [re.sub("^/data", "s3://bucket", s) for s in corpus.part().shards]
    part = replace(corpus.part(), shards=relocated)
    BatchSampler([part], replace(FINITE, epochs=0), corpus, state=state)


def test_state_is_small_whatever_the_data() -> None:
    corpus = Corpus([2] * 5000)
    _, state = drain([corpus.part()], replace(FINITE, epochs=0), corpus, 4, None, 3)
    assert len(json.dumps(state)) < 400


def test_sample_seeds_depend_on_the_key_not_on_its_neighbors() -> None:
    keys = [f"k{i}" for i in range(10)]
    ten, five = (sample_seeds(1, 0, "a", "/x/s.tar", keys[::n]) for n in (1, 2))
    assert (ten[::2] == five).all()
    assert (ten == sample_seeds(1, 0, "a", "http://elsewhere/s.tar", keys)).all()
    others = [sample_seeds(*args, keys) for args in ((2, 0, "a", "s.tar"), (1, 1, "a", "s.tar"))]
    assert len({*ten.tolist(), *others[0].tolist(), *others[1].tolist()}) == 30
    assert ten.dtype == np.uint64 and ten.max() < 2**63
    assert len(sample_seeds(1, 0, "a", "s", [])) == 0 and len(
        sample_seeds(1, 0, "a", "s", ["\ud800"])
    )


def test_uniform_draws_are_uniform_and_independent() -> None:
    seeds = sample_seeds(0, 0, "a", "s", [str(i) for i in range(20_000)])
    one, two = uniform(seeds, 1), uniform(seeds, 2)
    assert one.min() >= 0 and one.max() < 1
    assert abs(one.mean() - 0.5) < 0.01 and abs(one.var() - 1 / 12) < 0.005
    assert abs(np.corrcoef(one, two)[0, 1]) < 0.03


def test_bad_arguments_are_user_errors() -> None:
    corpus = Corpus([3])
    for parts, kwargs, message in (
        ([corpus.part()], {"rank": 2, "world": 2}, "rank 2"),
        ([], {}, "no datasets"),
        ([corpus.part(), corpus.part()], {}, "names must differ"),
        ([corpus.part(weight=0.0)], {}, "must be positive"),
        ([DatasetPart("e", [])], {}, "has no shards"),
    ):
        with pytest.raises(UserError, match=message):
            BatchSampler(parts, FINITE, corpus, **kwargs)
    with pytest.raises(UserError, match="bucket"):
        BatchConfig(bucket=2.0)


def test_a_hundred_thousand_shards_start_quickly_in_little_memory(tmp_path) -> None:
    """From dataset.json to the first batch, in a fresh process: ≤ 5 s, ≤ 200 MB above imports."""
    rows = [{"name": f"shard-{i:06d}.tar", "samples": 1000} for i in range(100_000)]
    langs = {"en": {"samples": 10**8, "hours": 1e5}}
    for row in rows:
        os.mknod(tmp_path / row["name"])
    (tmp_path / "dataset.json").write_text(
        json.dumps({"version": 1, "shards": rows, "samples": 10**8, "hours": 1e5, "langs": langs})
    )
    code = textwrap.dedent("""
        import json, resource, sys, time
        sys.path.insert(0, sys.argv[1])
        import test_bucketing as t
        from dsasr.data.dataloader.window_plan import PlanConfig
        from dsasr.data.dataloader.sampler import BatchSampler
        from dsasr.data.shards.storage import ShardStorage
        from dsasr.data.dataloader.dataloader import DatasetConfig, build_dataset_parts
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        before, started = peak(), time.perf_counter()
        parts = build_dataset_parts([DatasetConfig("big", sys.argv[2])], ShardStorage())
        sampler = BatchSampler(parts, PlanConfig(seed=1), lambda s: t.FakeIndex(s, 1000), world=8)
        assert sampler.step().samples and len(parts[0].shards) == 100_000
        seconds = time.perf_counter() - started
        sampler.close()
        print(json.dumps({"seconds": seconds, "mb": peak() - before}))
    """)
    folder = __file__.rsplit("/", 1)[0]
    out = subprocess.run(
        [sys.executable, "-c", code, folder, str(tmp_path)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    measured = json.loads(out.stdout)
    assert measured["seconds"] < 5 and measured["mb"] < 200, measured


def test_random_walk_of_worlds_over_many_epochs() -> None:
    """Random world sizes and cuts; each finished epoch is whole."""
    rng = random.Random(5)
    corpus = Corpus([rng.randrange(1, 25) for _ in range(9)])
    config = replace(FINITE, epochs=0)
    state, seen = None, []
    for _ in range(12):
        tasks, state = drain(
            [corpus.part()], config, corpus, rng.randrange(1, 9), state, rng.randrange(1, 6)
        )
        seen += tasks
    assert seen[-1].epoch >= 1
    for epoch in range(seen[-1].epoch):
        assert keys(t for t in seen if t.epoch == epoch) == corpus.keys()
