"""The budget search: bisection, worst batches, and probes that run out of memory."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsasr import config, recipe
from dsasr.data.dataloader.bucketing import BatchConfig
from dsasr.data.dataloader.padding_forecast import Forecast
from dsasr.planning import batch_search
from dsasr.planning.measure_batch import Shape
from dsasr.utils.errors import UserError


@settings(max_examples=200, deadline=None)
@given(
    capacity=st.integers(0, 300_000), start=st.integers(1, 50_000), limit=st.integers(100, 200_000)
)
def test_the_search_finds_the_largest_budget_that_fits(capacity, start, limit) -> None:
    probed = []

    def fits(frames: int) -> bool:
        probed.append(frames)
        return frames <= capacity

    budget, complete = batch_search.bisect_budget(fits, start, limit, tolerance=0.05)
    ceiling = limit // 100 * 100
    assert all(frames % 100 == 0 and 0 < frames <= ceiling for frames in probed)
    assert budget <= min(capacity, ceiling) and (budget == 0 or budget in probed)
    assert complete == (capacity < ceiling)
    if capacity < 100:
        assert budget == 0
    elif complete:  # within a step of the capacity
        assert capacity < budget + max(200, 0.05 * budget + 100)
    else:
        assert budget == ceiling
    assert len(probed) < 40 and len(set(probed)) == len(probed)


EPOCH = Forecast(10, 1, 1.0, 0.0, 1.0, 80, 1000, 0.5, Counter())


@settings(max_examples=100, deadline=None)
@given(
    frames=st.integers(100, 100_000),
    seconds=st.floats(1.0, 60.0),
    samples=st.integers(1, 300),
    shortest=st.integers(1, 3000),
)
def test_worst_batches_are_within_the_budget_and_fill_it(frames, seconds, samples, shortest):
    batch = BatchConfig(frames=frames, samples=samples, max_seconds=seconds)
    longest = min(frames, math.ceil(seconds * 100))
    for shape in batch_search.worst_shapes(batch, shortest, sft=False):
        assert shape.samples * shape.frames <= frames and shape.samples <= samples
        assert shape.frames <= longest and shape.tokens == 0
    full = batch_search.worst_shapes(batch, shortest, sft=False)[0]
    assert full == Shape(min(samples, frames // longest), longest, 0)
    batch = replace(batch, tokens=batch_search.token_budget(frames, batch, EPOCH))
    shapes = batch_search.worst_shapes(batch, shortest, sft=True)
    for shape in shapes:
        positions = batch.prompt_tokens + -(-shape.frames // 16) + shape.tokens
        assert shape.samples * positions <= batch.tokens and shape.tokens >= 1
        # The budget is used up to what an equal share leaves over.
        assert (shape.samples + 1) * (positions + 1) > batch.tokens
    assert any(s.samples == 1 and s.frames == longest for s in shapes)


def test_the_token_budget_keeps_the_recipes_ratio_and_takes_the_longest_sample() -> None:
    batch = BatchConfig(frames=12_000, tokens=4000, max_seconds=10.0)
    assert batch_search.token_budget(24_000, batch, EPOCH) == 8000
    assert batch_search.token_budget(24_000, replace(batch, tokens=0), EPOCH) == 12_000
    assert batch_search.token_budget(100, batch, EPOCH) == 40 + 7 + 25 + 1
    assert batch_search.token_budget(1000, batch, EPOCH) == 40 + 63 + 250 + 1


@pytest.fixture(scope="module")
def small(tiny) -> recipe.Recipe:
    over = ["data.dataloader.batch.max_seconds=4", "branch=sft", "model.encoder_from=none"]
    return recipe.load(str(tiny), over)


@pytest.mark.slow
def test_probes_run_out_of_memory_and_the_largest_budget_that_fits_is_found(small, tiny) -> None:
    """Real engines in child processes, limited to little more than a first child's resident set."""
    stage = small.stage("joint")
    free = batch_search.search_budget(small, stage, limit=800)
    assert not free.complete and free.batch.frames == 800
    assert [p.frames for p in free.probes] == [400, 800] and all(p.fits for p in free.probes)
    reported = []
    memory = free.resident + (48 << 20)
    result = batch_search.search_budget(
        small, stage, memory=memory, margin=0.0, limit=10**6, tolerance=0.4, report=reported.append
    )
    assert result.complete and tuple(reported) == result.probes and result.memory == memory
    fits = [p for p in reported if p.fits]
    fails = [p for p in reported if not p.fits]
    assert fits and fails and max(p.frames for p in fits) == result.batch.frames
    assert min(p.frames for p in fails) > result.batch.frames
    assert all(p.peak <= memory for p in fits)
    assert all(p.peak is None or p.peak > memory for p in fails)
    assert result.batch.tokens >= result.batch.frames * 0.2
    text = batch_search.search_table(result)
    assert "peak GiB" in text and text.splitlines()[-1] == batch_search.recipe_line(result)
    # The line is a recipe override that gives exactly this batch.
    again = recipe.load(str(tiny), [batch_search.recipe_line(result)])
    assert again.stage("joint").batch == result.batch


def test_a_stage_that_does_not_fit_at_all_is_a_users_error(small) -> None:
    with pytest.raises(UserError, match="'align' does not fit without any batch"):
        batch_search.search_budget(small, small.stage("align"), memory=64 << 20)


def test_other_failures_of_a_probe_do_not_count_as_memory(tiny) -> None:
    broken = recipe.load(str(tiny), ["branch=sft", "model.encoder_from=none"])
    broken = replace(broken, model=replace(broken.model, tokenizer="/nowhere"))
    with pytest.raises(UserError, match="nowhere"):
        batch_search.search_budget(broken, broken.stage("align"))


def test_a_forecast_is_of_the_stages_own_batches(tiny) -> None:
    cfg = recipe.load(str(tiny))
    epoch = batch_search.forecast_stage(cfg, cfg.stage("pretrain"))
    assert epoch.samples == 52 and not epoch.left_out and epoch.padding < 0.1
    assert 40 < epoch.shortest <= epoch.longest < 120 and 0 < epoch.fill <= 1
    assert config.to_plain(epoch)["batches"] == epoch.batches > 52 * 45 / 400
