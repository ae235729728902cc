"""The gain by the right audio: of a model that hears, of one that does not."""

from __future__ import annotations

import math

import pytest
import torch

from dsasr.data.batch import Batch
from dsasr.evaluation.audio_use import BATCHES, LEAST_GAIN, audio_gain
from dsasr.model.outputs import Outputs

CPU = torch.device("cpu")


def batch(*classes: int) -> Batch:
    """An utterance of each class: its features and its token are the class."""
    count = len(classes)
    features_BTF = torch.tensor(classes, dtype=torch.float32)[:, None, None].expand(count, 5, 2)
    tokens_BU = torch.tensor(classes)[:, None]
    lengths_B = torch.arange(2, 2 + count)
    return Batch.blank(
        features_BTF, tokens_BU=tokens_BU, feature_lengths_B=lengths_B,
        keys=tuple(f"k{c}" for c in classes),
    )  # fmt: skip


class Model:
    """NLL 0.5 a token where the features are those of the token's class, 2.5 where not; ``deaf``:
    1.5 in any case."""

    def __init__(self, deaf: bool = False):
        self.deaf, self.seen = deaf, []

    def __call__(self, batch: Batch) -> Outputs:
        self.seen.append((len(batch), batch.feature_lengths_B.tolist(), batch.keys))
        right_B = batch.features_BTF[:, 0, 0] == batch.tokens_BU[:, 0]
        nll_B = torch.where(right_B, 0.5, 2.5) if not self.deaf else torch.full(right_B.shape, 1.5)
        sums = {"nll": (nll_B.double().sum(), torch.tensor(float(len(batch))))}
        return Outputs(loss=nll_B.sum(), sums=sums)


def test_a_model_that_hears_gains():
    assert audio_gain(Model(), [batch(1, 2, 3), batch(4, 5)], device=CPU) == pytest.approx(2.0)


def test_one_that_hears_nothing_does_not():
    assert audio_gain(Model(deaf=True), [batch(1, 2, 3)], device=CPU) == 0 < LEAST_GAIN


def test_an_utterance_alone_does_not_count():
    model = Model()
    assert audio_gain(model, [batch(1), batch(2, 3)], device=CPU) == pytest.approx(2.0)
    # Each batch is run nonetheless, twice: what ranks do together must stay the same.
    assert [size for size, *_ in model.seen] == [0, 2, 0, 2]
    assert math.isnan(audio_gain(Model(), [batch(1)], device=CPU))
    assert math.isnan(audio_gain(Model(), [], device=CPU))


def test_lengths_go_with_the_audio_and_names_stay():
    model = Model()
    audio_gain(model, [batch(1, 2, 3)], device=CPU)
    assert [row[1] for row in model.seen] == [[2, 3, 4], [4, 2, 3]]
    assert model.seen[0][2] == model.seen[1][2] == ("k1", "k2", "k3")


def test_few_batches_are_tried_and_ranks_are_added_up():
    model = Model()
    twice = audio_gain(model, [batch(1, 2)] * 20, device=CPU, sum_ranks=lambda t: 2 * t)
    assert twice == pytest.approx(2.0) and len(model.seen) == 2 * BATCHES
