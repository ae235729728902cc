"""The budget probe: its search, its worst cases, and real trials that run out of memory."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsasr import config, recipe
from dsasr.data.dataloader.bucketing import BatchConfig
from dsasr.data.dataloader.padding_forecast import Forecast
from dsasr.planning import batch_search
from dsasr.planning.batch_trial import Shape, beside, is_out_of_memory, synthetic_batch
from dsasr.utils.errors import UserError

GIB = 1 << 30


@settings(max_examples=200, deadline=None)
@given(limit=st.integers(0, 300_000), start=st.integers(1, 50_000), most=st.integers(100, 200_000))
def test_the_search_finds_the_largest_budget_that_fits(limit, start, most) -> None:
    tried = []

    def fits(frames: int) -> bool:
        tried.append(frames)
        return frames <= limit

    found, complete = batch_search.search(fits, start, most, within=0.05)
    ceiling = most // 100 * 100
    assert all(frames % 100 == 0 and 0 < frames <= ceiling for frames in tried)
    assert found <= min(limit, ceiling) and (found == 0 or found in tried)
    assert complete == (limit < ceiling)
    if limit < 100:
        assert found == 0
    elif complete:  # within a step of what is right
        assert limit < found + max(200, 0.05 * found + 100)
    else:
        assert found == ceiling
    assert len(tried) < 40 and len(set(tried)) == len(tried)


TOLD = Forecast(10, 1, 1.0, 0.0, 0.0, 1.0, 80, 1000, 0.5, Counter())


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
    batch = replace(batch, tokens=batch_search.tokens_for(frames, batch, TOLD))
    shapes = batch_search.worst_shapes(batch, shortest, sft=True)
    for shape in shapes:
        positions = batch.prompt_tokens + -(-shape.frames // 16) + shape.tokens
        assert shape.samples * positions <= batch.tokens and shape.tokens >= 1
        # The budget is used up to what an equal share leaves over.
        assert (shape.samples + 1) * (positions + 1) > batch.tokens
    assert any(s.samples == 1 and s.frames == longest for s in shapes)


def test_the_token_budget_keeps_the_recipes_ratio_and_takes_the_longest_sample() -> None:
    batch = BatchConfig(frames=12_000, tokens=4000, max_seconds=10.0)
    assert batch_search.tokens_for(24_000, batch, TOLD) == 8000
    assert batch_search.tokens_for(24_000, replace(batch, tokens=0), TOLD) == 12_000
    assert batch_search.tokens_for(100, batch, TOLD) == 40 + 7 + 25 + 1
    assert batch_search.tokens_for(1000, batch, TOLD) == 40 + 63 + 250 + 1


def test_out_of_memory_is_told_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as huge:
        torch.empty(1 << 60)
    for error in (huge.value, MemoryError(), torch.OutOfMemoryError("CUDA out of memory")):
        assert is_out_of_memory(error)
    for error in (RuntimeError("shapes do not match"), ValueError("alloc"), KeyError("x")):
        assert not is_out_of_memory(error)


def test_synthetic_batches_are_what_a_model_takes() -> None:
    batch = synthetic_batch(Shape(3, 200, 7), mels=80, phonemes=5, tokens=11)
    assert batch.features_BTF.shape == (3, 200, 80) and batch.tokens_BU.shape == (3, 7)
    assert batch.phonemes_BP.min() >= 1 and batch.phonemes_BP.max() < 5
    assert not (batch.phonemes_BP[:, 1:] == batch.phonemes_BP[:, :-1]).any()
    assert batch.phonemes_BP.shape[1] <= 200 // 4 // 2 + 40 and batch.tokens_BU.max() < 11
    assert len(batch) == 3 and batch.padding_share == 0 and batch.audio_seconds == 6.0


def test_the_other_branch_lies_beside_where_both_run(tiny) -> None:
    chosen = recipe.load(str(tiny))
    stages = {s.name: s for s in chosen.stages}
    assert [s.name for s in beside(chosen, stages["pretrain"])] == ["ia_sft"]
    assert [s.name for s in beside(chosen, stages["align"])] == ["pretrain"]
    assert beside(chosen, stages["joint"]) == []
    alone = recipe.load(str(tiny), ["branch=pretrain"])
    assert beside(alone, stages["pretrain"]) == []


@pytest.fixture(scope="module")
def small(tiny) -> recipe.Recipe:
    over = ["data.dataloader.batch.max_seconds=4", "branch=sft", "model.encoder_from=none"]
    return recipe.load(str(tiny), over)


def test_trials_run_out_of_memory_and_the_largest_that_fits_is_told(small, tiny) -> None:
    """Real engines in child processes; the bound is what a first child holds, and a little."""
    stage = batch_search.stage_of(small, "joint")
    free = batch_search.probe(small, stage, most=800)
    assert not free.complete and free.batch.frames == 800
    assert [t.frames for t in free.trials] == [400, 800] and all(t.fits for t in free.trials)
    heard = []
    bound = free.held + (48 << 20)
    found = batch_search.probe(
        small, stage, memory=bound, margin=0.0, most=10**6, within=0.4, tell=heard.append
    )
    assert found.complete and tuple(heard) == found.trials and found.memory == bound
    fits = [t for t in heard if t.fits]
    fails = [t for t in heard if not t.fits]
    assert fits and fails and max(t.frames for t in fits) == found.batch.frames
    assert min(t.frames for t in fails) > found.batch.frames
    assert all(t.peak <= bound for t in fits)
    assert all(t.peak is None or t.peak > bound for t in fails)
    assert found.batch.tokens >= found.batch.frames * 0.2
    text = batch_search.table(found)
    assert "peak GiB" in text and text.splitlines()[-1] == batch_search.recipe_line(found)
    # The line is a recipe override that gives just this batch.
    line = batch_search.recipe_line(found)
    again = recipe.load(str(tiny), [line])
    assert batch_search.stage_of(again, "joint").batch == found.batch


def test_a_stage_that_does_not_fit_at_all_is_a_users_error(small) -> None:
    with pytest.raises(UserError, match="'align' does not fit without any batch"):
        batch_search.probe(small, batch_search.stage_of(small, "align"), memory=64 << 20)
    with pytest.raises(UserError, match="did you mean 'align'"):
        batch_search.stage_of(small, "algin")


def test_other_failures_of_a_trial_are_not_taken_for_memory(tiny) -> None:
    broken = recipe.load(str(tiny), ["branch=sft", "model.encoder_from=none"])
    broken = replace(broken, model=replace(broken.model, tokenizer="/nowhere"))
    with pytest.raises(UserError, match="nowhere"):
        batch_search.probe(broken, batch_search.stage_of(broken, "align"))


def test_a_forecast_is_of_the_stages_own_batches(tiny) -> None:
    chosen = recipe.load(str(tiny))
    told = batch_search.outlook(chosen, batch_search.stage_of(chosen, "pretrain"))
    assert told.samples == 52 and not told.left_out and told.padding < 0.1
    assert 40 < told.shortest <= told.longest < 120 and 0 < told.fill <= 1
    assert config.to_plain(told)["batches"] == told.batches > 52 * 45 / 400
