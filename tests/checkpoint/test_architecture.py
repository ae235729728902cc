"""Settings that no shape of a weight shows."""

from __future__ import annotations

import pytest

from dsasr import config
from dsasr.checkpoint import architecture
from dsasr.model.adaptors.protocol import AdaptorConfig
from dsasr.model.encoders.conformer import EncoderConfig
from dsasr.model.lora import LoraConfig

MODEL = {
    "encoder": EncoderConfig(width=16, heads=2),
    "encoder_lora": LoraConfig(rank=2),
    "adaptor": AdaptorConfig(kind="qformer", stack=4),
    "lora": None,
}


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("encoder", "heads", 4),
        ("encoder_lora", "alpha", 8.0),
        ("adaptor", "heads", 4),
        ("adaptor", "stack", 8),
    ],
)
def test_hidden_settings_are_compared_whatever_the_shapes(part, key, value):
    theirs = config.to_plain(MODEL)
    ours = {**theirs, part: {**theirs[part], key: value}}
    expected = [f"model.{part}.{key}={theirs[part][key]}"]
    assert architecture.hidden_differences(theirs, ours) == expected
    assert architecture.hidden_differences(theirs, theirs) == []


def test_settings_that_change_training_alone_may_differ():
    theirs = config.to_plain(MODEL)
    encoder = {**theirs["encoder"], "dropout": 0.3, "activation_checkpointing": True}
    assert architecture.hidden_differences(theirs, {**theirs, "encoder": encoder}) == []
    # An encoder of another kind has other names and shapes.
    assert architecture.hidden_differences(theirs, {**theirs, "encoder": {"path": "x"}}) == []
    assert architecture.hidden_differences({}, theirs) == []
