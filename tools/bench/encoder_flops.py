"""FLOPs of a recipe's encoder; of one that others trained, counted by torch without values."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from dsasr.build import Builder
from dsasr.model.encoders.pretrained import (
    PretrainedEncoder,
    PretrainedEncoderConfig,
    build_encoder,
)
from dsasr.planning import flops
from dsasr.planning.flops import PartFlops
from dsasr.recipe import Recipe

SECONDS = (4, 8, 16)  # of audio that is counted; a parabola goes through them
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)


def of(cfg: Recipe, rows: Sequence[int]) -> PartFlops:
    """Of utterances of ``rows`` feature frames each."""
    if cfg.pretrained_encoder is None:
        return flops.encoder(cfg.model.encoder, rows)
    return _pretrained(Builder(cfg).encoder_folder, cfg.pretrained_encoder).of(rows)


@lru_cache(maxsize=1)
def _pretrained(folder: Path, cfg: PretrainedEncoderConfig) -> EncoderFlops:
    with FakeTensorMode():
        encoder = build_encoder(folder, cfg)
        # The same products as fused attention, whose CPU operator the counter does not know.
        encoder.settings._attn_implementation = "eager"
        return EncoderFlops(encoder)


class EncoderFlops:
    """FLOPs by an utterance's length: products with weights grow with it, attention with its
    square."""

    def __init__(self, encoder: PretrainedEncoder):
        """``encoder``: made, and counted, under torch's FakeTensorMode."""
        lengths = [encoder.front_end.frames(encoder.front_end.rate * s) for s in SECONDS]
        counts, entries = zip(*(_count(encoder, length) for length in lengths), strict=True)
        self.square, self.slope, self.constant = np.polyfit(lengths, counts, 2)
        self.entry = entries[-1] / lengths[-1]

    def of(self, rows: Sequence[int]) -> PartFlops:
        """Of utterances of ``rows`` feature frames each."""
        total, squares = sum(rows), sum(x * x for x in rows)
        linear = self.slope * total + self.constant * len(rows)
        return PartFlops(float(linear), float(self.square * squares), self.entry * total)


def _count(encoder: PretrainedEncoder, length: int) -> tuple[float, float]:
    """FLOPs of one utterance, and those of the layer that reads it."""
    features = torch.zeros(1, length, encoder.bins)
    first = next(name for name, m in encoder.named_modules() if isinstance(m, LAYERS))
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        encoder.eval()(features, torch.full((1,), length))
    entry = counter.get_flop_counts().get(f"{type(encoder).__name__}.{first}", {})
    return float(counter.get_total_flops()), float(sum(entry.values()))
