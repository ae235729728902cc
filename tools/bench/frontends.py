"""How fast the front ends of pretrained encoders are: ours, and transformers' feature extractors.

    python tools/bench/frontends.py [--data MANIFEST] [--rounds 7]

Ours computes one utterance at a time into memory that is there already, as the dataloader's workers
do. transformers' extractor of the same encoder is called in three ways: ``transformers``, one
utterance a call with its defaults (Whisper's pads every utterance to 30 s, which transformers'
Whisper asks for); ``transformers_own``, one utterance a call without padding (Whisper's alone has
another default); ``transformers_batch``, ``BATCH`` utterances a call with its defaults. All sides
work on one core, on the same decoded clips, in turn; CPU time is counted.

First, ours and theirs must agree on every clip: to 1e-4. Parakeet's, both of which are computed in
float32, may differ by up to 1e-2 in one value of a thousand: logarithms of bins far below their
frame's loudest. ``MANIFEST`` is one of `dsasr data make-shards`; its clips of 2 to 10 s are used,
or synthetic ones. One line a front end and side is recorded: utterances per core-second, and how
many times as fast ours is.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

# Of numpy's own products, which torch's setting does not reach; before numpy is loaded.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import numpy as np
import torch
import transformers
from torch import Tensor

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from common import alternate, clock, record

from dsasr.data.audio.decoding import decode
from dsasr.data.audio.frontends import PretrainedFrontEnd
from dsasr.data.audio.resampling import RATE
from dsasr.data.dataloader.workers import keep_freed_memory
from dsasr.data.manifests.registry import read_manifest
from dsasr.utils.errors import UserError, run_tool

SHORTEST, LONGEST = 2.0, 10.0  # seconds of a clip
TOLERANCE = 1e-4
BATCH = 8


@dataclass(frozen=True)
class Case:
    """A front end, and transformers' extractor that it must agree with."""

    front_end: PretrainedFrontEnd
    extractor: str  # class in transformers
    options: dict[str, Any]
    key: str = "input_features"  # of the extractor's output
    batch_options: dict[str, Any] = field(default_factory=dict)
    most: float = TOLERANCE  # by which a value may differ
    beyond: float = 0.0  # share of values that may differ by more than `TOLERANCE`

    def load(self) -> Callable[..., Any]:
        return getattr(transformers, self.extractor)(**self.options)


CASES = {
    "whisper-80": Case(
        PretrainedFrontEnd("whisper", 80, max_seconds=30.0),
        "WhisperFeatureExtractor",
        {"feature_size": 80},
    ),
    "whisper-128": Case(
        PretrainedFrontEnd("whisper", 128, max_seconds=30.0),
        "WhisperFeatureExtractor",
        {"feature_size": 128},
    ),
    "wav2vec2": Case(
        PretrainedFrontEnd("wave", 1),
        "Wav2Vec2FeatureExtractor",
        {},
        "input_values",
        {"padding": True},
    ),
    "w2v-bert": Case(
        PretrainedFrontEnd("w2v-bert", 160),
        "SeamlessM4TFeatureExtractor",
        {},
    ),
    "parakeet": Case(
        PretrainedFrontEnd("parakeet", 128),
        "ParakeetFeatureExtractor",
        {"feature_size": 128},
        most=1e-2,
        beyond=1e-3,
    ),
}


# -- clips -----------------------------------------------------------------------------------------


def recorded_clips(manifest: str, count: int) -> list[Tensor]:
    """Up to ``count`` decoded recordings [n] of a manifest, evenly over it."""
    utterances = read_manifest(manifest).utterances
    inside = [u for u in utterances if SHORTEST <= u.duration <= LONGEST]
    if not inside:
        raise UserError(f"{manifest} has no utterance of {SHORTEST:g} to {LONGEST:g} s")
    picked = np.linspace(0, len(inside) - 1, min(count, len(inside))).astype(int)
    return [decode(Path(inside[i].audio).read_bytes()) for i in picked]


def synthetic_clips(count: int) -> list[Tensor]:
    """Noise in bursts over a hum, [n] of `SHORTEST` to `LONGEST` seconds."""
    rng = np.random.default_rng(0)
    clips = []
    for seconds in rng.uniform(SHORTEST, LONGEST, count):
        time = np.arange(int(seconds * RATE)) / RATE
        wave = 0.2 * rng.standard_normal(len(time)) * (np.sin(2 * np.pi * 3 * time) > 0)
        wave += 0.1 * np.sin(2 * np.pi * 220 * time) + 1e-4 * rng.standard_normal(len(time))
        clips.append(torch.from_numpy(wave.astype(np.float32)).clamp(-1, 1))
    return clips


# -- the sides -------------------------------------------------------------------------------------


def ours(case: Case, clips: list[Tensor], memory_TF: Tensor) -> None:
    for wave in clips:
        case.front_end.features(wave, memory_TF)


def theirs(extractor: Callable[..., Any], inputs: list[Any], **options: Any) -> None:
    """One call for each of ``inputs``: an utterance, or a list of utterances."""
    for waves in inputs:
        extractor(waves, sampling_rate=RATE, return_tensors="pt", **options)


def sides(case: Case, clips: list[Tensor]) -> dict[str, Callable[[], None]]:
    """The sides that are timed; each goes over all clips once."""
    extractor, waves = case.load(), [clip.numpy() for clip in clips]
    batches = [waves[first : first + BATCH] for first in range(0, len(waves), BATCH)]
    rows = max(case.front_end.frames(len(clip)) for clip in clips)
    memory_TF = torch.empty(rows, case.front_end.bins)
    to_30_s = case.front_end.kind == "whisper"
    by_name: dict[str, Callable[[], None]] = {
        "ours": partial(ours, case, clips, memory_TF),
        "transformers": partial(theirs, extractor, waves),
        "transformers_batch": partial(theirs, extractor, batches, **case.batch_options),
    }
    if to_30_s:
        by_name["transformers_own"] = partial(theirs, extractor, waves, padding="longest")
    return by_name


def differences(case: Case, clips: list[Tensor]) -> tuple[float, float]:
    """Of ours from transformers' features over all clips: the largest, and the share of values
    beyond `TOLERANCE`. Infinity where theirs are fewer frames."""
    extractor, largest, beyond, count = case.load(), 0.0, 0, 0
    for clip in clips:
        features_TF = case.front_end.features(clip)
        out = extractor(clip.numpy(), sampling_rate=RATE, return_tensors="pt")[case.key][0].float()
        if case.front_end.kind == "whisper":
            out = out.T
        elif case.front_end.kind == "wave":
            out = out[:, None]
        if len(out) < len(features_TF):
            return float("inf"), 1.0
        errors = (out[: len(features_TF)] - features_TF).abs()
        largest = max(largest, float(errors.max()))
        beyond += int((errors > TOLERANCE).sum())
        count += errors.numel()
    return largest, beyond / count


# -- measuring -------------------------------------------------------------------------------------


def measure(name: str, clips: list[Tensor], rounds: int, data: str) -> None:
    """Check one front end, time its sides and record a line for each."""
    case = CASES[name]
    largest, beyond = differences(case, clips)
    if largest > case.most or beyond > case.beyond:
        raise UserError(
            f"{name}: ours and {case.extractor} differ by {largest:.2g} at most, and by more than "
            f"{TOLERANCE:g} in {beyond:.2%} of the values: fix that before timing"
        )
    times = alternate(sides(case, clips), rounds)
    seconds = sum(map(len, clips)) / RATE
    for side, taken in times.items():
        rates = [len(clips) / t for t in taken]
        middle = statistics.median(rates)
        ratios = [t / mine for t, mine in zip(taken, times["ours"], strict=True)]
        record(
            "frontends",
            front_end=name,
            side=side,
            data=data,
            utterances=len(clips),
            seconds_each=round(seconds / len(clips), 2),
            rounds=rounds,
            clock=clock("cpu"),
            difference=float(f"{largest:.2g}"),
            beyond=float(f"{beyond:.2g}"),
            utterances_per_core_s=round(middle, 1),
            spread=round((max(rates) - min(rates)) / middle, 3),
            audio_s_per_core_s=round(middle * seconds / len(clips), 1),
            ours_over_this=round(statistics.median(ratios), 2),
            ours_over_this_range=[round(min(ratios), 2), round(max(ratios), 2)],
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="a manifest with recordings; default: synthetic clips")
    parser.add_argument("--front-ends", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    if args.clips < 1 or args.rounds < 2:
        raise UserError("--clips: at least 1; --rounds: at least 2")
    torch.set_num_threads(1)
    keep_freed_memory()  # as the dataloader's workers do
    clips = recorded_clips(args.data, args.clips) if args.data else synthetic_clips(args.clips)
    data = Path(args.data).resolve().parent.name if args.data else "synthetic"
    for name in args.front_ends:
        measure(name, clips, args.rounds, data)


if __name__ == "__main__":
    sys.exit(run_tool(main))
