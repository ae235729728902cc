"""Speech by espeak-ng with the time at which each word begins."""

from __future__ import annotations

import ctypes

import numpy as np
import torch

from dsasr.data.audio.resampling import resample
from dsasr.data.text import espeak
from dsasr.entropy_allocation.forced_alignment import words_of

RATE = 16000


LANGUAGES = {"en": "en-us", "zh": "cmn"}  # espeak-ng's voices


def offsets(text: str) -> list[int]:
    """Where each of `words_of` begins in ``text``."""
    found, at = [], 0
    for word in words_of(text):
        at = text.index(word, at)
        found.append(at)
        at += len(word)
    return found


class Event(ctypes.Structure):
    """espeak-ng's ``espeak_EVENT`` (speak_lib.h)."""

    _fields_ = (
        ("type", ctypes.c_int), ("identifier", ctypes.c_uint), ("text_position", ctypes.c_int),
        ("length", ctypes.c_int), ("audio_position", ctypes.c_int), ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p), ("id", ctypes.c_char * 8),
    )  # fmt: skip


def speak_with_times(text: str, lang: str, voice: str) -> tuple[np.ndarray, dict[int, float]]:
    """(wave at 16 kHz in 0.1 s of silence, {character: second at which its word begins})."""
    starts: dict[int, float] = {}
    collect = espeak._Library._collect

    def with_events(library, samples, count, events) -> int:
        event, number = ctypes.cast(events, ctypes.POINTER(Event)), 0
        while event[number].type:
            if event[number].type == 1:  # a word
                second = event[number].audio_position / 1000
                starts.setdefault(event[number].text_position - 1, second)
            number += 1
        return collect(library, samples, count, events)

    espeak._Library._collect = with_events
    try:
        samples, rate = espeak.synthesize(text, f"{LANGUAGES[lang]}+{voice}")
    finally:
        espeak._Library._collect = collect
    wave = resample(torch.from_numpy(samples.astype(np.float32) / 32768), rate, RATE).numpy()
    lead = RATE // 10
    wave = np.pad(0.3 * wave / max(1e-3, float(np.abs(wave).max())), (lead, lead))
    noise = np.random.default_rng(0).standard_normal(len(wave)) * 1e-4
    return (wave + noise).astype(np.float32), {k: v + 0.1 for k, v in starts.items()}
