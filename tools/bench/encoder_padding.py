"""What padding to 30 s costs a Whisper encoder: its own frames against ``pad_to: 30``.

    python tools/bench/encoder_padding.py [--encoder FOLDER | --shape large-v3] [--lengths MANIFEST]

Both sides encode the same utterances in the same batches, cut as a training's dataloader cuts them:
``own`` on as many frames as the batch's longest utterance has, with padding masked; ``pad_to_30``
on the 1500 frames that transformers' Whisper asks for. ``forward`` is what a frozen encoder does,
without a graph; ``both`` has the gradients of all weights. Lengths are a manifest's, or drawn from
the quantiles of 45 minutes of read English (`QUANTILES`).

First, padded frames must be those of transformers' own encoder and feature extractor, and an
utterance's own frames must not depend on its batch (both to 1e-3 of the frames' root mean square,
in float32). One line a pass and side is recorded: encoder time per second of audio, and the peak
memory of the side's largest batch, beyond weights and inputs; on a CPU that of a fresh process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import WhisperConfig, WhisperFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoder as TheirEncoder

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from common import alternate, clock, median_and_spread, peak_bytes, record

from dsasr.data.dataloader.bucketing import BatchConfig, bucket_order, split_into_batches
from dsasr.data.manifests.registry import read_manifest
from dsasr.model.encoders.load import load_encoder
from dsasr.model.encoders.pretrained import PretrainedEncoderConfig
from dsasr.model.encoders.whisper import WhisperEncoder
from dsasr.utils.errors import UserError, run_tool

SHAPES = {
    "small": {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4,
              "encoder_ffn_dim": 64, "num_mel_bins": 80},
    "base": {"d_model": 512, "encoder_layers": 6, "encoder_attention_heads": 8,
             "encoder_ffn_dim": 2048, "num_mel_bins": 80},
    "large-v3": {"d_model": 1280, "encoder_layers": 32, "encoder_attention_heads": 20,
                 "encoder_ffn_dim": 5120, "num_mel_bins": 128},
}  # fmt: skip
# Seconds of read English utterances at the quantiles 0, 0.05, … 1.
QUANTILES = (
    2.05, 2.57, 2.73, 2.88, 3.02, 3.13, 3.27, 3.37, 3.53, 3.65, 3.84, 4.02, 4.21, 4.53, 4.79, 5.18,
    5.8, 6.6, 7.47, 9.11, 15.34,
)  # fmt: skip
CORPUS = 600  # utterances that batches are cut from
SIDES = {"own": 0.0, "pad_to_30": 30.0}
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Inputs:
    """One batch: features [B, T, F] and lengths [B]."""

    features_BTF: Tensor
    lengths_B: Tensor

    @property
    def seconds(self) -> float:
        """Of audio, without padding."""
        return float(self.lengths_B.sum()) / 100


# -- encoder and batches ---------------------------------------------------------------------------


def build(folder: str, shape: str, device: str) -> WhisperEncoder:
    """The folder's encoder, or without one a random encoder of that shape."""
    with tempfile.TemporaryDirectory() as temporary:
        if not folder:
            WhisperConfig(**SHAPES[shape]).save_pretrained(temporary)
        cfg = PretrainedEncoderConfig(folder or temporary, weights=bool(folder))
        encoder = load_encoder(Path(cfg.path), cfg)
    if not isinstance(encoder, WhisperEncoder):
        raise UserError(f"{folder} is no Whisper: no other encoder is padded to 30 s")
    return encoder.to(device)


def set_side(encoder: WhisperEncoder, side: str) -> None:
    encoder.cfg = replace(encoder.cfg, pad_to=SIDES[side])


def seconds_of(manifest: str) -> np.ndarray:
    """Durations of a manifest's utterances up to 30 s, or drawn from `QUANTILES`."""
    if manifest:
        durations = np.array([u.duration for u in read_manifest(manifest).utterances])
        if not (durations > 0).all():
            raise UserError(f"{manifest} has utterances without a duration")
        return durations[durations <= 30.0]
    shares = np.random.default_rng(0).random(CORPUS)
    return np.interp(shares, np.linspace(0, 1, len(QUANTILES)), QUANTILES)


def batches(seconds: np.ndarray, frames: int, count: int) -> list[np.ndarray]:
    """Frames of the utterances of ``count`` batches, evenly from the shortest to the longest."""
    rng = np.random.default_rng(0)
    lengths = np.ceil(100 * seconds).astype(np.int64)
    lengths = lengths[bucket_order(lengths, lengths, BatchConfig().bucket, rng)]
    ranges = split_into_batches(lengths, lengths, BatchConfig(frames=frames, max_seconds=30.0))
    picked = np.linspace(0, len(ranges) - 1, min(count, len(ranges))).round().astype(int)
    return [lengths[first:last] for first, last in ranges[picked]]


def inputs(lengths: Sequence[int], bins: int, device: str, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator().manual_seed(len(lengths))
    lengths_B = torch.as_tensor(np.asarray(lengths))
    features = torch.randn(len(lengths_B), int(lengths_B.max()), bins, generator=generator)
    features[torch.arange(features.shape[1]) >= lengths_B[:, None]] = 0.0
    return Inputs(features.to(device, dtype), lengths_B.to(device))


# -- passes ----------------------------------------------------------------------------------------


def forward(encoder: WhisperEncoder, batch: Inputs) -> None:
    encoder.eval()
    with torch.no_grad():
        encoder(batch.features_BTF, batch.lengths_B)


def both(encoder: WhisperEncoder, batch: Inputs) -> None:
    encoder.train()
    frames_BSE = encoder(batch.features_BTF, batch.lengths_B).frames_BSE
    torch.autograd.grad(frames_BSE.float().square().mean(), list(encoder.parameters()))


PASSES: dict[str, Callable[[WhisperEncoder, Inputs], None]] = {"forward": forward, "both": both}


def run(encoder: WhisperEncoder, side: str, kind: str, todo: Sequence[Inputs]) -> None:
    set_side(encoder, side)
    for batch in todo:
        PASSES[kind](encoder, batch)


# -- checks ----------------------------------------------------------------------------------------


@torch.no_grad()
def errors(encoder: WhisperEncoder) -> dict[str, float]:
    """Largest differences over the root mean square: padded frames from transformers' own, and an
    utterance in a batch from the same one alone."""
    encoder.eval()
    front_end, rng = encoder.front_end, np.random.default_rng(0)
    waves = [(0.1 * rng.standard_normal(n)).astype(np.float32) for n in (31_234, 64_000)]
    for wave in waves:
        wave[-400:] = 0.0  # theirs also sees the frame whose window only begins in the audio
    rows = [front_end.features(torch.from_numpy(wave)) for wave in waves]
    lengths_B = torch.tensor([len(row) for row in rows])
    features_BTF = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    theirs = TheirEncoder(encoder.settings).eval()
    theirs.load_state_dict(encoder.model.state_dict())
    extractor = WhisperFeatureExtractor(feature_size=front_end.bins)
    wanted = theirs(**extractor(waves, sampling_rate=16_000, return_tensors="pt"))[0]
    set_side(encoder, "pad_to_30")
    padded = encoder(features_BTF, lengths_B)
    set_side(encoder, "own")
    together = encoder(features_BTF, lengths_B)
    found = {"error_of_padded": 0.0, "error_of_batching": 0.0}
    for i, row in enumerate(rows):
        count = int(padded.lengths_B[i])
        pairs = {
            "error_of_padded": (padded.frames_BSE[i, :count], wanted[i, :count]),
            "error_of_batching": (
                together.frames_BSE[i, :count],
                encoder(row[None], lengths_B[i : i + 1]).frames_BSE[0],
            ),
        }
        for name, (a, b) in pairs.items():
            rms = b.square().mean().sqrt()
            found[name] = max(found[name], float((a - b).abs().max() / rms))
    return {name: float(f"{value:.2g}") for name, value in found.items()}


# -- measuring -------------------------------------------------------------------------------------


def peak(options: argparse.Namespace, side: str, kind: str, lengths: np.ndarray) -> int:
    """Bytes that a pass over one batch holds beyond weights and inputs; a CPU's in a process of its
    own."""
    if options.device != "cpu":
        encoder = build(options.encoder, options.shape, options.device).to(options.dtype)
        return _peak(encoder, side, kind, lengths, options)
    case = json.dumps([side, kind, lengths.tolist()])
    command = [sys.executable, __file__, "--peak", case, "--shape", options.shape]
    done = subprocess.run([*command, "--encoder", options.encoder], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{kind} {side}: no peak ({done.stderr[-500:].strip()})")
    return int(done.stdout.split()[-1])


def _peak(encoder: WhisperEncoder, side: str, kind: str, lengths: Sequence[int], options) -> int:
    settings = encoder.bins, options.device, options.dtype
    # Libraries load; at a size whose freed memory could not serve the pass.
    run(encoder, "own", kind, [inputs([20], *settings)])
    batch = inputs(lengths, *settings)
    return peak_bytes(partial(run, encoder, side, kind, [batch]), options.device)


def measure(options: argparse.Namespace) -> None:
    encoder = build(options.encoder, options.shape, "cpu")
    found = errors(encoder)
    if max(found.values()) > TOLERANCE:
        raise UserError(f"the encoders differ: {found}; fix that before timing")
    encoder = encoder.to(options.device, options.dtype)
    lengths = batches(seconds_of(options.lengths), options.frames, options.batches)
    settings = encoder.bins, options.device, options.dtype
    todo = [inputs(one, *settings) for one in lengths]
    audio = sum(batch.seconds for batch in todo)
    # Encoder frames of each batch, with padding.
    slots = {
        "own": [-(-int(one.max()) // 2) * len(one) for one in lengths],
        "pad_to_30": [1500 * len(one) for one in lengths],
    }
    largest = {side: lengths[int(np.argmax(counts))] for side, counts in slots.items()}
    for kind in options.passes:
        sides = {side: partial(run, encoder, side, kind, todo) for side in SIDES}
        times = alternate(sides, options.rounds, options.device)
        peaks = {side: peak(options, side, kind, largest[side]) for side in SIDES}
        for side, taken in times.items():
            median, spread = median_and_spread(taken)
            record(
                "encoder_padding",
                encoder=Path(options.encoder).name
                if options.encoder
                else f"random {options.shape}",
                **{"pass": kind},
                side=side,
                lengths=Path(options.lengths).parent.name if options.lengths else "quantiles",
                device=options.device,
                dtype=str(options.dtype).removeprefix("torch."),
                batches=len(todo),
                utterances=sum(map(len, lengths)),
                seconds_each=round(audio / sum(map(len, lengths)), 2),
                rounds=options.rounds,
                clock=clock(options.device),
                **found,
                ms_per_audio_s=round(median / audio, 4),
                spread=round(spread, 3),
                frames_per_audio_s=round(sum(slots[side]) / audio, 1),
                this_over_own=round(median / median_and_spread(times["own"])[0], 3),
                peak_mb=round(peaks[side] / 2**20, 1),
                peak_over_own=round(peaks[side] / max(peaks["own"], 1), 3),
                peak_batch=[len(largest[side]), int(largest[side].max())],
            )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--encoder", default="", help="folder of a Whisper; default: random")
    parser.add_argument("--shape", choices=SHAPES, default="base", help="of the random encoder")
    parser.add_argument("--lengths", default="", help="a manifest; default: the quantiles")
    parser.add_argument("--frames", type=int, default=4000, help="of a batch, with padding")
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=0, help="0: 10 on a GPU, 3 on a CPU")
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    options.rounds = options.rounds or (3 if options.device == "cpu" else 10)
    if options.rounds < 2 or options.batches < 1 or options.frames < 100:
        raise UserError("--rounds: at least 2; --batches: at least 1; --frames: at least 100")
    return options


def main() -> None:
    options = parse()
    if options.peak:
        side, kind, lengths = json.loads(options.peak)
        encoder = build(options.encoder, options.shape, "cpu")
        print(_peak(encoder, side, kind, lengths, options))
        return
    measure(options)


if __name__ == "__main__":
    sys.exit(run_tool(main))
