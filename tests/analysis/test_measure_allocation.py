"""The allocation row of an encoder."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from dsasr.analysis.measure_allocation import Reference, measure
from dsasr.analysis.probe_set import ProbeSet, label_recordings
from dsasr.analysis.probed_encoders import ProbedEncoder
from dsasr.entropy_allocation.allocation_row import AllocationRow, EncoderSource
from dsasr.entropy_allocation.pai_csai import VInformationConfig
from dsasr.utils.errors import UserError


@pytest.fixture
def labeled(aligner, recording, phonemes):
    """Builds a probe set of ``count`` noisy utterances."""

    def build(count: int = 12, **changes) -> ProbeSet:
        rng = np.random.default_rng(0)
        recordings = [recording(f"u{i}", "今天", phonemes=phonemes) for i in range(count)]
        recordings = [
            replace(r, wave=rng.normal(0, 0.1, 6400).astype(np.float32)) for r in recordings
        ]
        return replace(label_recordings(aligner, recordings), **changes)

    return build


def encoder(encode, **options) -> ProbedEncoder:
    source = EncoderSource("x", "checkpoint", run="runs/x")
    return ProbedEncoder(
        source, 0.04, lambda recordings: {r.key: encode(r.wave) for r in recordings}, **options
    )


def spread(wave: np.ndarray) -> torch.Tensor:
    """Ten frames of four numbers."""
    return torch.from_numpy(wave[: len(wave) // 40 * 40]).reshape(10, 4, -1).std(-1)


def test_a_row_of_few_speakers_has_folds(labeled):
    config, probe_set = VInformationConfig(control=False, draws=20), labeled(11)
    row, features = measure(encoder(spread), probe_set, config)
    assert len(features) == row.utterances == row.csai.utterances == 11
    assert (row.pai.folds, row.pai.split_by) == (4, "speaker")
    assert math.isnan(row.pai.shuffled) and row.reference is None
    again = AllocationRow.from_json(json.loads(json.dumps(row.to_json(), allow_nan=False)))
    assert again.to_json() == row.to_json()
    reference = Reference("first", features)
    compared, _ = measure(encoder(spread), probe_set, config, reference)
    assert compared.cka_to_reference == pytest.approx(1) and compared.reference == "first"
    # A constant has no direction, and so no CKA.
    flat, _ = measure(encoder(lambda wave: torch.ones(10, 4)), probe_set, config, reference)
    assert math.isnan(flat.cka_to_reference)


def test_recordings_reach_an_encoder_at_its_own_rate(labeled):
    config, lengths = VInformationConfig(control=False, draws=2), []

    def encode(wave):
        lengths.append(len(wave))
        return spread(wave)

    measure(encoder(encode), labeled(), config)
    measure(encoder(encode), labeled(rate=8000), config)
    measure(encoder(encode, rate=8000), labeled(), config)
    assert lengths == [6400] * 12 + [12800] * 12 + [3200] * 12


def test_what_cannot_be_measured_is_refused(labeled):
    config = VInformationConfig(control=False)
    broken = encoder(lambda wave: torch.full((10, 4), math.nan))
    with pytest.raises(UserError, match="not finite"):
        measure(broken, labeled(), config)
    with pytest.raises(UserError, match="more folds; give more utterances"):
        measure(encoder(spread), labeled(3), VInformationConfig(folds=2, control=False))
