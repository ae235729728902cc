"""Where utterances begin and end in audio that comes in pieces."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from dsasr.data.audio.activity import FRAME
from dsasr.data.audio.resampling import RATE
from dsasr.inference.segmentation import SegmentationConfig
from dsasr.inference.vad import SPEECH, Vad

FRAME_SAMPLES = int(FRAME * RATE)
GROUP = 10  # frames that are judged together: decisions don't depend on how the audio was cut
# Of a long utterance's remaining length, a pause this long is enough to end it.
SHORT_PAUSE = 0.15


@dataclass(frozen=True)
class SpeechPart:
    """Audio of an utterance that begins at second ``start`` of the stream.

    ``begins``: it is the utterance's first part; ``ends``: its last, which may have no audio.
    ``spoken``: seconds in it in which somebody speaks.
    """

    wave: np.ndarray
    start: float
    spoken: float
    begins: bool
    ends: bool


class Endpointer:
    """Cuts a stream into utterances, as far as the audio allows at any moment.

    An utterance ends after a pause of ``pause_seconds`` (once it is 70% of ``max_seconds`` long,
    after any pause of 0.15 s), or at ``max_seconds``; ``margin_seconds`` of silence stay on both
    sides of it.
    """

    def __init__(self, config: SegmentationConfig, vad: Vad):
        self._config, self._vad = config, vad
        self._rest = np.zeros(0, np.float32)  # less than a group of frames
        self._silence: list[np.ndarray] = []  # frames since the last one with speech
        self._margin = max(round(config.margin_seconds / FRAME), 1)
        self._position = 0  # frames judged
        self._start = 0  # of the utterance, in frames
        self._length: int | None = None  # of the utterance, in frames; None: between two

    @property
    def speaking(self) -> bool:
        """Whether an utterance is going on."""
        return self._length is not None

    def feed(self, wave: np.ndarray) -> list[SpeechPart]:
        """The parts of utterances that are known after ``wave`` [n], float32 at 16 kHz."""
        wave = np.concatenate((self._rest, wave))
        size = GROUP * FRAME_SAMPLES
        whole = len(wave) // size * size
        self._rest = wave[whole:]
        parts: list[SpeechPart] = []
        for start in range(0, whole, size):
            self._judge(wave[start : start + size], parts)
        return parts

    def finish(self) -> list[SpeechPart]:
        """The last parts: the stream has ended."""
        rest, self._rest = self._rest, np.zeros(0, np.float32)
        parts: list[SpeechPart] = []
        frames = math.ceil(len(rest) / FRAME_SAMPLES)
        if frames:
            padded = np.zeros(frames * FRAME_SAMPLES, np.float32)
            padded[: len(rest)] = rest
            self._judge(padded, parts)
        if self.speaking:
            self._end(parts)
        return parts

    def _judge(self, wave: np.ndarray, parts: list[SpeechPart]) -> None:
        frames = wave.reshape(-1, FRAME_SAMPLES)
        for frame, speech in zip(frames, self._vad.feed(wave).tolist(), strict=True):
            self._position += 1
            if speech >= SPEECH:
                self._speech(frame, parts)
            else:
                self._silence.append(frame)
                if self.speaking:
                    self._pause(parts)
                else:
                    del self._silence[: -self._margin]

    def _speech(self, frame: np.ndarray, parts: list[SpeechPart]) -> None:
        audio = [*self._silence, frame]
        self._silence = []
        begins = not self.speaking
        if begins:
            self._start, self._length = self._position - len(audio), 0
        self._length += len(audio)
        last = parts[-1] if parts and not parts[-1].ends and not begins else None
        if last is not None:
            parts[-1] = SpeechPart(
                np.concatenate((last.wave, *audio)), last.start, last.spoken + FRAME,
                last.begins, False,
            )  # fmt: skip
        else:
            parts.append(self._part(np.concatenate(audio), FRAME, begins, False))
        if self._length >= self._config.max_seconds / FRAME:
            self._end(parts)

    def _pause(self, parts: list[SpeechPart]) -> None:
        long = self._length >= 0.7 * self._config.max_seconds / FRAME
        pause = min(SHORT_PAUSE, self._config.pause_seconds) if long else self._config.pause_seconds
        if len(self._silence) >= round(pause / FRAME):
            self._end(parts)

    def _end(self, parts: list[SpeechPart]) -> None:
        margin = self._silence[: self._margin]
        wave = np.concatenate(margin) if margin else np.zeros(0, np.float32)
        parts.append(self._part(wave, 0.0, False, True))
        # What is left of the silence may be the margin of the next utterance.
        self._silence = self._silence[len(margin) :][-self._margin :]
        self._length = None

    def _part(self, wave: np.ndarray, spoken: float, begins: bool, ends: bool) -> SpeechPart:
        return SpeechPart(wave, self._start * FRAME, spoken, begins, ends)
