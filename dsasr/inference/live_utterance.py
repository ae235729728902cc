"""An utterance of a live stream: its audio, its caches and how far the language model has read."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from dsasr.data.audio.activity import frame_power, spoken_frames
from dsasr.data.audio.resampling import RATE
from dsasr.data.text.prompt import PromptIds
from dsasr.inference.endpointing import SpeechPart
from dsasr.inference.partial_text import PartialText
from dsasr.inference.streaming_encoder import UtteranceAudio
from dsasr.inference.words import Stretch
from dsasr.model.llm_forward import LlmPast


class LiveUtterance:
    """An utterance that goes on, or waits for its last steps."""

    def __init__(self, start: float, lang: str, audio: UtteranceAudio, prompt: PromptIds,
                 past: LlmPast, text: PartialText):  # fmt: skip
        self.start, self.lang, self.audio, self.prompt = start, lang, audio, prompt
        self.past, self.text = past, text
        self.samples, self.spoken, self.ended = 0, 0.0, False
        self.powers: list[np.ndarray] = []  # mean squares of 10 ms of audio each
        self.sounds: list[np.ndarray] = []  # the same without offset and hum (`frame_power`)
        self.shown = False  # whether a partial text of it was shown
        self.settled = 0  # speech tokens that ``past`` holds
        self.read: Tensor | None = None  # the frames that the language model has read
        self.rest_AD: Tensor | None = None  # tokens after those, which later frames may change

    def add(self, part: SpeechPart) -> None:
        """Take in the utterance's next audio; its last part ends it."""
        self.samples += len(part.wave)
        self.spoken += part.spoken
        if len(part.wave):
            frames = part.wave[: len(part.wave) // 160 * 160].reshape(-1, 160)
            self.powers.append(np.square(frames, dtype=np.float64).mean(axis=1))
            self.sounds.append(frame_power(frames.reshape(-1), RATE))
            self.audio.add(torch.from_numpy(part.wave))
        if part.ends:
            self.audio.end()
            self.ended = True

    @property
    def seconds(self) -> float:
        return self.samples / RATE

    @property
    def loudness(self) -> float:
        """The 90th percentile of the frames' power, in dB of full scale."""
        powers = np.concatenate(self.powers) if self.powers else np.zeros(1)
        return 10 * math.log10(max(float(np.quantile(powers, 0.9)), 1e-10))

    def stretch(self, frame_seconds: float) -> Stretch:
        """Where its sound is, for the times of its words."""
        sounds = np.concatenate(self.sounds) if self.sounds else np.zeros(0)
        first, last, _ = spoken_frames(sounds)
        end = self.start + (last or self.seconds)
        return Stretch(self.start, self.start + first, end, frame_seconds)

    @property
    def times(self) -> tuple[float, float]:
        """Where it begins and ends so far, in seconds of the stream."""
        return round(self.start, 3), round(self.start + self.seconds, 3)
