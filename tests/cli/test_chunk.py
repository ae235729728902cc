"""``--chunk``: durations, and models that take none."""

from __future__ import annotations

import argparse
from types import SimpleNamespace

import pytest

from dsasr.cli.arguments import milliseconds
from dsasr.evaluation.decode import DecodeConfig
from dsasr.model.dynamic_chunks import Chunk
from dsasr.utils.errors import UserError


def test_a_duration_in_milliseconds_or_seconds():
    assert [milliseconds(text) for text in ("640ms", "0.64s", " 1s")] == [640, 640, 1000]
    for text in ("640", "ms", "-5ms", "0ms", "0.5ms", "1h", "99999s"):
        with pytest.raises(argparse.ArgumentTypeError, match="640ms"):
            milliseconds(text)


def test_a_chunk_is_of_whole_frames_and_of_an_encoder_that_takes_one():
    ours = SimpleNamespace(takes_chunks=True, frame_seconds=0.04)
    assert DecodeConfig().chunk(ours) is None
    assert DecodeConfig(chunk_ms=640).chunk(ours) == Chunk(16, 4)
    assert DecodeConfig(chunk_ms=40, chunk_left=0).chunk(ours) == Chunk(1, 0)
    with pytest.raises(UserError, match="give 640ms"):
        DecodeConfig(chunk_ms=650).chunk(ours)
    theirs = SimpleNamespace(takes_chunks=False, frame_seconds=0.02)
    with pytest.raises(UserError, match="whole utterances only"):
        DecodeConfig(chunk_ms=640).chunk(theirs)
