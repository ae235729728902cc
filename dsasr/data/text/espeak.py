"""Bindings of espeak-ng through ctypes: phonemization and speech synthesis.

espeak-ng is GPL-3 and this package is not: it comes as a separate wheel (``espeakng-loader``, the
``demo`` extra), is loaded at run time, and nothing outside phonemization and the demo needs it.
The library keeps one global state per process and is not thread-safe: one lock guards it here,
and work in parallel takes processes.
"""

from __future__ import annotations

import _ctypes
import ctypes
import functools
import threading

import numpy as np

from dsasr.utils.errors import UserError

_SYNCHRONOUS = 2  # AUDIO_OUTPUT_SYNCHRONOUS of speak_lib.h: samples by callback, no sound device
_UTF8 = 1  # espeakCHARS_UTF8
_RATE, _VOLUME, _PITCH, _RANGE = 1, 2, 3, 4  # espeak_PARAMETER
_POS_CHARACTER = 1
_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)

_lock = threading.RLock()
_library: _Library | None = None


class _Library:
    """The loaded library with its sampling rate, its current voice and its sample callback."""

    def __init__(self) -> None:
        try:
            import espeakng_loader
        except ImportError:
            raise UserError(
                'espeak-ng is not installed: run pip install "dsasr[demo]" (or espeakng-loader)'
            ) from None
        try:
            self.lib = ctypes.CDLL(espeakng_loader.get_library_path())
        except OSError as error:
            raise UserError(
                f"espeak-ng does not load ({error}): reinstall espeakng-loader"
            ) from None
        data = str(espeakng_loader.get_data_path()).encode()
        self.rate = self.lib.espeak_Initialize(_SYNCHRONOUS, 0, data, 0)
        if self.rate <= 0:
            raise UserError("espeak-ng finds no voices: reinstall espeakng-loader")
        self.lib.espeak_TextToPhonemes.restype = ctypes.c_char_p
        self.lib.espeak_TextToPhonemes.argtypes = [
            ctypes.POINTER(ctypes.c_void_p),
            ctypes.c_int,
            ctypes.c_int,
        ]
        self.lib.espeak_Synth.argtypes = [
            ctypes.c_char_p,
            ctypes.c_size_t,
            ctypes.c_uint,
            ctypes.c_int,
            ctypes.c_uint,
            ctypes.c_uint,
            ctypes.c_void_p,
            ctypes.c_void_p,
        ]
        self.voice = ""
        self.chunks: list[np.ndarray] = []
        self.callback = _CALLBACK(self._collect)  # kept alive here: espeak has only its address
        self.lib.espeak_SetSynthCallback(self.callback)

    def _collect(self, samples, count, _events) -> int:
        if samples and count > 0:
            self.chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def use(self, voice: str) -> None:
        if voice == self.voice:
            return
        if self.lib.espeak_SetVoiceByName(voice.encode()) != 0:
            self.voice = ""
            raise UserError(f"espeak-ng has no voice {voice!r}: try en-us or cmn")
        self.voice = voice

    def close(self) -> None:
        """Unload the library: the next one starts from its initial state."""
        self.lib.espeak_Terminate()
        if hasattr(_ctypes, "dlclose"):
            _ctypes.dlclose(self.lib._handle)


def _restart() -> _Library:
    global _library
    with _lock:
        if _library is not None:
            _library.close()
            _library = None
        return _loaded()


def _loaded() -> _Library:
    global _library
    with _lock:
        if _library is None:
            _library = _Library()
        return _library


def available() -> bool:
    """Whether espeak-ng is installed and loads."""
    try:
        _loaded()
    except UserError:
        return False
    return True


@functools.cache
def has_voice(voice: str) -> bool:
    """Whether espeak-ng has ``voice``, such as ``de`` or ``pt-br``."""
    library = _loaded()
    with _lock:
        try:
            library.use(voice)
        except UserError:
            return False
    return True


def phoneme_names(text: str, voice: str, *, ipa: bool) -> list[str]:
    """The phonemes of ``text``: one string per phoneme, a single space between words.

    ``ipa`` picks IPA names over espeak-ng's own ASCII mnemonics. Raises `UserError` for a voice
    that espeak-ng does not have.
    """
    mode = (0x02 if ipa else 0x00) | (ord("_") << 8)  # bits 8 up: what separates the phonemes
    library = _loaded()
    raw = text.replace("\0", " ").encode("utf-8", "replace")
    with _lock:
        library.use(voice)
        buffer = ctypes.create_string_buffer(raw)
        position = ctypes.c_void_p(ctypes.addressof(buffer))
        clauses = []
        while position.value:  # one clause per call; espeak-ng sets it to NULL at the end
            clause = library.lib.espeak_TextToPhonemes(ctypes.byref(position), _UTF8, mode)
            clauses.append((clause or b"").decode("utf-8", "replace"))
    names: list[str] = []
    for word in " ".join(clauses).split():
        if names:
            names.append(" ")
        names += [name for name in word.split("_") if name and name not in ("|", "||")]
    return names


def synthesize(
    text: str, voice: str, *, words_per_minute: int = 175, pitch: int = 50, pitch_range: int = 50
) -> tuple[np.ndarray, int]:
    """Speak ``text``: int16 samples [n] (mono) and their rate in Hz.

    ``words_per_minute`` 80–450, ``pitch`` and ``pitch_range`` 0–100 are espeak-ng's own scales.
    The same arguments give the same samples, whatever was synthesized before.
    """
    raw = text.replace("\0", " ").encode("utf-8")
    with _lock:
        # Flutter and noise continue from the last utterance, in static variables that
        # espeak_Initialize does not reset; a fresh load does (3 ms).
        library = _restart()
        library.lib.espeak_ng_SetRandSeed(ctypes.c_long(1))
        library.use(voice)
        for parameter, value in (
            (_RATE, words_per_minute),
            (_VOLUME, 100),
            (_PITCH, pitch),
            (_RANGE, pitch_range),
        ):
            library.lib.espeak_SetParameter(parameter, int(value), 0)
        library.chunks = []
        status = library.lib.espeak_Synth(
            raw, len(raw) + 1, 0, _POS_CHARACTER, 0, _UTF8, None, None
        )
        library.lib.espeak_Synchronize()
        chunks, library.chunks = library.chunks, []
    if status != 0:
        raise RuntimeError(f"espeak-ng could not speak {text!r} as {voice} (status {status})")
    return (np.concatenate(chunks) if chunks else np.zeros(0, np.int16)), library.rate
