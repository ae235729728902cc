"""Voice activity detection: silero-vad where it is installed, else the energy rule.

A detector is fed the samples of one file in order and says for each frame of 10 ms how probable
speech is. silero-vad (MIT license; ``pip install "dsasr[vad]"``) is a small recurrent network whose
wheel carries its weights; it separates speech from other sounds, which energy does not.
"""

from __future__ import annotations

import importlib.util
import warnings
import weakref
from collections import deque
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch

from dsasr.data.audio.activity import (
    FRAME,
    active_frames,
    decibels,
    frame_power,
    noise_floor,
    runs,
)
from dsasr.data.audio.resampling import RATE, resample

CONTEXT_SECONDS = 5.0  # that the energy rule compares a frame with
HISTORY_SECONDS = 30.0  # over which it tracks the noise floor
SPEECH, SURE = 0.5, 0.97  # from these probabilities on a frame is speech, and surely speech
CLEAR = 30.0  # dB
_WINDOW = 512  # samples at 16 kHz that silero-vad reads at once: 32 ms


class Vad(Protocol):
    """The detector of one file at one sampling rate."""

    name: str

    def feed(self, wave: np.ndarray) -> np.ndarray:
        """The probability of speech in each frame of 10 ms of ``wave`` [n], float32; the samples
        follow those fed before."""


class EnergyVad:
    """1 where a frame is active (`dsasr.data.audio.activity`) among those of the last
    `CONTEXT_SECONDS`, above the lowest floor of the last `HISTORY_SECONDS`; else 0."""

    name = "energy"

    def __init__(self, rate: int):
        self.rate = rate
        self._position = 0  # frames fed
        self._powers = np.zeros(0)  # of the last frames, in dB
        self._floors: deque[tuple[int, float]] = deque()  # the position and floor of what was fed
        self.clear = False  # whether the last sounds lie far above their floor

    def feed(self, wave: np.ndarray) -> np.ndarray:
        new = decibels(frame_power(wave, self.rate))
        if not len(new):
            return np.zeros(0, np.float32)
        self._position += len(new)
        frames = max(len(new), round(CONTEXT_SECONDS / FRAME))
        self._powers = power = np.concatenate((self._powers, new))[-frames:]
        self._floors.append((self._position, noise_floor(power)))
        while self._floors[0][0] <= self._position - HISTORY_SECONDS / FRAME:
            self._floors.popleft()
        floor = min(floor for _, floor in self._floors)
        self.clear = float(np.quantile(power, 0.95)) - floor > CLEAR
        return active_frames(power, floor)[-len(new) :].astype(np.float32)


class SileroVad:
    """silero-vad's probabilities, each repeated over its 32 ms.

    It smooths over short pauses, and misses faint ends of words. So a frame that the energy rule
    calls silent counts as such where sound and silence lie `CLEAR` apart, and else where silero is
    not `SURE` of speech; and where they lie `CLEAR` apart, sound without a pause is speech as a
    whole if silero finds speech in it (**ours**).
    """

    name = "silero"

    def __init__(self, rate: int):
        self.rate = rate
        # A model holds its state: each file in progress has one of its own.
        self._model = _free.pop() if _free else _load_silero()
        self._model.reset_states()
        weakref.finalize(self, _free.append, self._model)
        self._rest = np.zeros(0, np.float32)  # at 16 kHz, less than a window
        self._probabilities: list[float] = []
        self._frames = 0
        self._energy = EnergyVad(rate)
        self._speaking = False  # whether the last frame was speech

    @torch.no_grad()
    def feed(self, wave: np.ndarray) -> np.ndarray:
        frames = -(-len(wave) // max(int(FRAME * self.rate), 1))
        inner = resample(torch.from_numpy(np.ascontiguousarray(wave)), self.rate, RATE).numpy()
        inner = np.concatenate((self._rest, inner))
        whole = len(inner) // _WINDOW * _WINDOW
        windows = torch.from_numpy(inner[:whole].reshape(-1, _WINDOW).copy())
        self._probabilities += [float(self._model(window, RATE)) for window in windows]
        self._rest = inner[whole:]
        start = self._frames
        self._frames += frames
        centers = (np.arange(start, self._frames) + 0.5) * FRAME * RATE / _WINDOW
        known = self._probabilities or [0.0]
        index = np.minimum(centers.astype(np.int64), len(known) - 1)
        speech = np.asarray(known, np.float32)[index]
        quiet = self._energy.feed(wave) < 1
        speech = np.where(quiet & ((speech < SURE) | self._energy.clear), 0.0, speech)
        if self._energy.clear:
            for start, end in runs(~quiet):
                if (start == 0 and self._speaking) or (speech[start:end] >= SPEECH).any():
                    speech[start:end] = 1.0
        self._speaking = bool(frames and speech[-1] >= SPEECH)
        return speech.astype(np.float32)


_free: list = []  # models of silero-vad that no file uses


def _load_silero():
    threads = torch.get_num_threads()
    try:
        from silero_vad import load_silero_vad

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of its way to load the weights
            return load_silero_vad()
    finally:
        torch.set_num_threads(threads)  # its import sets one thread for the whole process


@lru_cache(maxsize=1)
def has_silero() -> bool:
    """Whether silero-vad can be used here."""
    return importlib.util.find_spec("silero_vad") is not None


def build_vad(kind: str, rate: int) -> Vad:
    """The detector that ``kind`` names: silero, energy, or auto: silero where it is installed."""
    if kind == "silero" or (kind == "auto" and has_silero()):
        return SileroVad(rate)
    return EnergyVad(rate)
