"""Front ends: from audio to the features [T, F] that an encoder reads.

Each encoder names the one that it was trained with. All take mono audio in [-1, 1] and work on an
utterance's own samples: nothing depends on the batch, and nothing is padded to 30 s.

    fbank      Kaldi's log-Mel filter banks with global mean and variance: the Conformer's
    whisper    log10-Mel at 80 or 128 bins, 100 Hz, as transformers' WhisperFeatureExtractor
    wave       the waveform itself, [samples, 1], zero mean and unit variance if asked for
    w2v-bert   Kaldi's 80 bins normalized per utterance, two frames side by side: [T, 160], 50 Hz
    parakeet   natural-log Mel of the pre-emphasized wave, normalized per utterance, 100 Hz
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dsasr.data.audio.features import Cmvn, FbankConfig, fbank, fbank_batch
from dsasr.data.audio.resampling import RATE, one_thread

HOP = 160  # samples between the frames of every Mel front end: 10 ms
BLOCK = 256  # frames that stay in the processor's cache
Kind = Literal["whisper", "wave", "w2v-bert", "parakeet"]


class FrontEnd(Protocol):
    """What dataloader, evaluation and transcription need of a front end."""

    rate: int  # Hz of the audio it reads
    bins: int  # F
    max_seconds: float  # of the longest audio that the encoder reads; infinity: no limit

    @property
    def window(self) -> int:
        """The fewest samples that give a frame."""

    def frames(self, samples: int) -> int:
        """Rows T of ``samples`` of audio."""

    def features(self, wave: Tensor, out_TF: Tensor | None = None) -> Tensor:
        """[n] → [T, F] float32; ``out_TF`` gives memory for the result, for at least T rows."""

    def batch(self, waves_BN: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """Padded waves [B, n] → features [B, T, F] (zero beyond an utterance) and lengths [B]."""


class FbankFrontEnd:
    """Filter banks, normalized by ``cmvn`` if there is one."""

    max_seconds = float("inf")

    def __init__(self, config: FbankConfig, cmvn: Cmvn | None = None):
        self.config, self.cmvn = config, cmvn
        self.rate, self.bins, self.window = config.rate, config.mels, config.window

    def frames(self, samples: int) -> int:
        return self.config.frames(samples)

    def features(self, wave: Tensor, out_TF: Tensor | None = None) -> Tensor:
        features = fbank(wave, self.config, out_TF)
        return features if self.cmvn is None else self.cmvn.apply_(features)

    def batch(self, waves_BN: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        features, frames = fbank_batch(waves_BN, lengths_B, self.config)
        if self.cmvn is not None:
            features = self.cmvn.apply(features)
            beyond = torch.arange(features.shape[1], device=frames.device) >= frames[:, None]
            features = features.masked_fill(beyond[..., None], 0.0)
        return features, frames


@dataclass(frozen=True)
class PretrainedFrontEnd:
    """The front end of a pretrained encoder. ``normalize`` matters to ``wave`` only."""

    kind: Kind
    bins: int
    normalize: bool = True
    max_seconds: float = float("inf")
    rate: int = RATE

    @property
    def window(self) -> int:
        """The fewest samples that give a frame (of an encoder of raw waves: one of its own)."""
        return {"wave": 400, "w2v-bert": 400 + HOP}.get(self.kind, HOP)

    @property
    def steps_per_second(self) -> float:
        """Rows of [T, F] a second of audio makes."""
        return {"wave": self.rate, "w2v-bert": 50.0}.get(self.kind, 100.0)

    @property
    def stack(self) -> int:
        """Spectral frames side by side in a row."""
        return 2 if self.kind == "w2v-bert" else 1

    def frames(self, samples: int) -> int:
        """Rows T of ``samples`` of audio."""
        if self.kind == "wave":
            return samples
        if self.kind == "whisper":
            return -(-samples // HOP)
        if self.kind == "parakeet":
            return samples // HOP
        return _KALDI.frames(samples) // 2

    def features(self, wave: Tensor, out_TF: Tensor | None = None) -> Tensor:
        """[n] → [T, F] float32; ``out_TF`` gives memory for the result, for at least T rows."""
        result = _FEATURES[self.kind](wave, self)
        if out_TF is None:
            return result
        return out_TF[: len(result)].copy_(result)

    def batch(self, waves_BN: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """Padded waves [B, n] → features [B, T, F] (zero beyond an utterance) and lengths [B]."""
        rows = [
            self.features(wave[:length])
            for wave, length in zip(waves_BN, lengths_B.tolist(), strict=True)
        ]
        counts = [len(row) for row in rows]
        features = waves_BN.new_zeros(len(rows), max(counts, default=0), self.bins)
        for place, row in zip(features, rows, strict=True):
            place[: len(row)] = row
        return features, torch.tensor(counts, dtype=torch.int64, device=lengths_B.device)


_KALDI = FbankConfig()


@one_thread()
def _whisper(wave: Tensor, cfg: PretrainedFrontEnd) -> Tensor:
    """transformers' extractor on 30 s of audio and zeros, of which only the own frames are made.

    The last half window of an utterance sees the zeros that would follow it; only audio that fills
    the window to its end is reflected there, as the start always is.
    """
    samples = len(wave)
    zeros = 200 if cfg.max_seconds == float("inf") else int(cfg.max_seconds * cfg.rate) - samples
    zeros = min(max(zeros, 0), 200)
    padded = F.pad(wave, (0, zeros + max(0, 201 - samples)))
    padded = F.pad(padded[None], (200, 200 - zeros), mode="reflect")[0]
    frames = padded.unfold(0, 400, HOP)[: cfg.frames(samples)]
    window, weights = _slaney_tables(400, 400, True, cfg.bins, str(wave.device))
    features = _mel_energies(frames, window, weights, 400).clamp_min_(1e-10).log10_()
    features = torch.maximum(features, features.max() - 8.0)
    return features.add_(4.0).mul_(0.25)


@one_thread()
def _parakeet(wave: Tensor, cfg: PretrainedFrontEnd) -> Tensor:
    """NeMo's and transformers' ParakeetFeatureExtractor, in the wave's own precision.

    In float32 the normalization enlarges the rounding of the quietest bins to as much as 5e-4, here
    and there; float64 would take twice the time.
    """
    emphasized = torch.cat((wave[:1], wave[1:] - 0.97 * wave[:-1]))
    # 512 points centered on the frame, of which the middle 400 are windowed.
    padded = F.pad(emphasized, (256 - 56, 256))
    count = cfg.frames(len(wave))
    frames = padded.unfold(0, 400, HOP)[:count]
    window, weights = _slaney_tables(400, 512, False, cfg.bins, str(wave.device))
    features = _mel_energies(frames, window.to(wave.dtype), weights.to(wave.dtype), 512)
    features = features.add_(2.0**-24).log_()
    mean = features.mean(0)
    std = ((features - mean).square().sum(0) / max(count - 1, 1)).sqrt()
    return (features - mean) / (std + 1e-5)


def _w2v_bert(wave: Tensor, _: PretrainedFrontEnd) -> Tensor:
    """transformers' SeamlessM4TFeatureExtractor: Kaldi's bins, normalized, stacked in pairs.

    In float64 as there: what float32 lacks in the quietest bins of a loud frame reaches 0.01.
    """
    features = fbank(wave.double(), _KALDI)
    variance, mean = torch.var_mean(features, 0, correction=1)
    features = (features - mean) / (variance + 1e-7).sqrt()
    pairs = len(features) // 2
    return features[: 2 * pairs].reshape(pairs, -1).float()


def _wave(wave: Tensor, cfg: PretrainedFrontEnd) -> Tensor:
    """transformers' Wav2Vec2FeatureExtractor."""
    if cfg.normalize:
        wave = wave - wave.mean()
        variance = torch.dot(wave, wave) / len(wave)  # a fifth of torch.var_mean's time
        wave.mul_(torch.rsqrt(variance + 1e-7))
    return wave[:, None]


_FEATURES = {"whisper": _whisper, "wave": _wave, "w2v-bert": _w2v_bert, "parakeet": _parakeet}


def _mel_energies(frames_TW: Tensor, window: Tensor, weights: Tensor, size: int) -> Tensor:
    """[T, window] → Mel energies [T, F] of the power spectrum over ``size`` points."""
    energies = frames_TW.new_empty(len(frames_TW), weights.shape[1])
    for first in range(0, len(frames_TW), BLOCK):
        block = frames_TW[first : first + BLOCK] * window
        spectrum = torch.view_as_real(torch.fft.rfft(block, n=size))
        power = spectrum[..., 0].square() + spectrum[..., 1].square()
        torch.mm(power, weights, out=energies[first : first + len(block)])
    return energies


@lru_cache(maxsize=8)
def _slaney_tables(
    window: int, size: int, periodic: bool, bins: int, device: str
) -> tuple[Tensor, Tensor]:
    """The Hann window [w] and Slaney's area-normalized triangles [size / 2 + 1, F], 0 to 8 kHz.

    Slaney's Mel scale (Auditory Toolbox, 1998): linear below 1 kHz, logarithmic above.
    """
    step = torch.log(torch.tensor(6.4, dtype=torch.float64)) / 27

    def mel(hertz: Tensor) -> Tensor:
        return torch.where(
            hertz < 1000, hertz * 3 / 200, 15 + torch.log(hertz.clamp_min(1e-9) / 1000) / step
        )

    def hertz(mels: Tensor) -> Tensor:
        return torch.where(mels < 15, mels * 200 / 3, 1000 * torch.exp(step * (mels - 15)))

    top = mel(torch.tensor(RATE / 2, dtype=torch.float64))
    edges = hertz(torch.linspace(0, 1, bins + 2, dtype=torch.float64) * top)
    centers = torch.linspace(0, RATE / 2, size // 2 + 1, dtype=torch.float64)[:, None]
    up = (centers - edges[:-2]) / (edges[1:-1] - edges[:-2])
    down = (edges[2:] - centers) / (edges[2:] - edges[1:-1])
    weights = torch.minimum(up, down).clamp_min(0) * 2 / (edges[2:] - edges[:-2])
    hann = torch.hann_window(window, periodic=periodic, dtype=torch.float64)
    return hann.float().to(device), weights.float().to(device)
