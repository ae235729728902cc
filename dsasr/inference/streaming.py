"""`StreamingRecognizer`: audio as it is spoken in, text on the way and at each utterance's end out.

::

    from dsasr import StreamingRecognizer

    recognizer = StreamingRecognizer.from_pretrained("models/mine")
    for samples in microphone:              # float32 or int16 at 16 kHz, of any length
        for event in recognizer.feed(samples):
            print(event)                    # Partial(…) each chunk, Final(…) at an utterance's end
    print(recognizer.finish())

NIM4-ASR's way (arXiv 2604.18105): chunks of 640 ms with 4 cached chunks to the left, the prompt's
beginning cached, speech appended to the language model's cache chunk by chunk, and one decoding at
the end of an utterance, which voice activity finds. **ours**: partial texts on the way, decoded
from the same cache (`dsasr.inference.partial_text`).

Many streams run in one process: `StreamingRecognizer.advance` takes a step with all of them
together. Between utterances only the loudness so far is kept: an utterance starts
from the prompt, with fresh caches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dsasr.data.audio.activity import FRAME
from dsasr.data.audio.files import AudioError, check_scale
from dsasr.data.audio.frontends import FbankFrontEnd
from dsasr.data.audio.resampling import RATE
from dsasr.data.text.prompt import PromptIds
from dsasr.evaluation.decode import DecodeConfig, Hypothesis
from dsasr.evaluation.decode_stream import decode_pasts
from dsasr.evaluation.doubt import find_doubt
from dsasr.evaluation.hypothesis_scorer import HypothesisScorer
from dsasr.inference.endpointing import Endpointer, SpeechPart
from dsasr.inference.live_utterance import LiveUtterance
from dsasr.inference.partial_text import PartialText
from dsasr.inference.recognizer import Recognizer
from dsasr.inference.stream_events import Final, Partial
from dsasr.inference.streaming_encoder import SUBSAMPLING, ChunkedEncoder, WholeEncoder
from dsasr.inference.vad import build_vad
from dsasr.model.dynamic_chunks import chunk_of
from dsasr.model.llm_forward import Continuation, LlmPast
from dsasr.model.streaming_speech import ctc_log_probs, embed_frames, settled_tokens
from dsasr.utils import ranges
from dsasr.utils.errors import UserError
from dsasr.utils.ranges import NonNegativeInt, PositiveFloat, PositiveInt

SHORTEST_SPEECH = 0.1  # seconds: less than any word takes


@dataclass(frozen=True)
class StreamingConfig:
    """Chunks and partial texts of live recognition."""

    chunk_seconds: PositiveFloat = 0.64  # encoded at once; a whole number of encoder frames
    left: NonNegativeInt = 4  # chunks to the left that the encoder sees
    # silence that ends an utterance; a file is cut at shorter pauses, those of the training's
    # utterances, which live speech makes in the middle of a sentence, too
    pause_seconds: PositiveFloat = 0.3
    partials: bool = True  # texts on the way, one each chunk
    open_words: NonNegativeInt = 3  # last words of a partial text that a later one may change
    partial_tokens: PositiveInt = 16  # of a partial text beyond what is settled, at most

    def __post_init__(self) -> None:
        ranges.check(self)


class Stream:
    """One speaker's audio. Made by `StreamingRecognizer.stream`; for one thread at a time."""

    def __init__(self, recognizer: StreamingRecognizer, endpointer: Endpointer, lang: str = ""):
        self._recognizer, self._endpointer, self.lang = recognizer, endpointer, lang
        self.utterances: deque[LiveUtterance] = deque()
        self.seconds = 0.0  # of audio received
        self.ended = False

    def push(self, samples: np.ndarray | Tensor) -> None:
        """Take in audio [n], int16 or float32 in [-1, 1], without recognizing it yet.

        Raises `UserError` for what is no such audio, and after the stream's end; the stream then is
        as it was.
        """
        if self.ended:
            raise UserError("the stream has ended: open another")
        wave = _as_wave(samples)
        self.seconds += len(wave) / RATE
        self._take(self._endpointer.feed(wave))

    def end(self) -> None:
        """There is no more audio."""
        if not self.ended:
            self._take(self._endpointer.finish())
            self.ended = True

    def feed(self, samples: np.ndarray | Tensor) -> list[Partial | Final]:
        """Take in audio, as `push`, and recognize what it completes."""
        self.push(samples)
        return self._recognizer.advance([self])[0]

    def finish(self) -> list[Partial | Final]:
        """Recognize what is left: the stream has ended."""
        self.end()
        return self._recognizer.advance([self])[0]

    @property
    def waiting(self) -> bool:
        """Whether there is something to recognize."""
        return any(u.ended or u.audio.ready for u in self.utterances)

    def _take(self, parts: Sequence[SpeechPart]) -> None:
        for part in parts:
            if part.begins:
                self.utterances.append(self._recognizer.begin(part.start, self.lang))
            self.utterances[-1].add(part)


class StreamingRecognizer:
    """Recognizes live audio, of many streams together."""

    def __init__(
        self,
        recognizer: Recognizer,
        config: StreamingConfig | None = None,
        lang: str = "",
    ):
        """Utterances are found by the detector that ``recognizer.segmentation`` names.

        ``lang``: the language of streams that are opened without one. Raises `UserError` for a
        model that reads another rate than 16 kHz, for a chunk that is no whole number of encoder
        frames, for a language that the model was not trained with (`SpeechLLM.hint`), and for
        decoding settings that its CTC head cannot serve (`DecodeConfig.check`).
        """
        self.config = config or StreamingConfig()
        self.recognizer = recognizer
        self._model = model = recognizer.model.eval()
        recognizer.decode.check(model)
        front_end = recognizer.front_end
        if front_end.rate != RATE:
            raise UserError(
                f"the model reads audio of {front_end.rate} Hz: streams need one of {RATE} Hz"
            )
        if model.encoder.takes_chunks and isinstance(front_end, FbankFrontEnd):
            frame = SUBSAMPLING * front_end.config.shift_ms / 1000
            chunk = chunk_of(self.config.chunk_seconds, self.config.left, frame)
            self._encoder = ChunkedEncoder(model, front_end, chunk)
        else:
            self._encoder = WholeEncoder(model, front_end, self.config.chunk_seconds)
        self.lang = lang
        self._prefixes: dict[tuple[int, ...], LlmPast] = {(): LlmPast()}
        self._prompt(lang)
        self._own: Stream | None = None

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, config: StreamingConfig | None = None, lang: str = ""
    ) -> StreamingRecognizer:
        """The recognizer of an exported folder or a run folder, as `Recognizer.from_pretrained`."""
        return cls(Recognizer.from_pretrained(folder), config, lang)

    # -- streams -----------------------------------------------------------------------------

    def stream(self, lang: str | None = None) -> Stream:
        """A new stream; ``lang``: what is spoken in it (None: the recognizer's, "": not known).

        Raises `UserError` for a language that the model was not trained with.
        """
        lang = self.lang if lang is None else lang
        self._model.hint(lang)
        files = self.recognizer.segmentation
        longest = max(files.max_seconds, files.whole_seconds)
        pause = min(self.config.pause_seconds, longest / 2)
        live = replace(files, max_seconds=longest, pause_seconds=pause)
        return Stream(self, Endpointer(live, build_vad(live.vad, RATE)), lang)

    def feed(self, samples: np.ndarray | Tensor) -> list[Partial | Final]:
        """`Stream.feed` of a stream that the recognizer keeps itself: for a single speaker."""
        self._own = self._own or self.stream()
        return self._own.feed(samples)

    def finish(self) -> list[Partial | Final]:
        """`Stream.finish` of that stream; the next `feed` begins another one."""
        stream, self._own = self._own, None
        return stream.finish() if stream is not None else []

    def begin(self, start: float, lang: str) -> LiveUtterance:
        """An utterance's state before its first audio."""
        text = PartialText(self.config.open_words)
        return LiveUtterance(start, lang, self._encoder.begin(), *self._prompt(lang), text)

    def _prompt(self, lang: str) -> tuple[PromptIds, LlmPast]:
        """The prompt of speech in ``lang``, and the language model's past after its beginning."""
        prompt = self._model.prompt_of(self._model.hint(lang))
        if prompt.prefix not in self._prefixes:
            (past,) = self._extended([LlmPast()], [self._embed(prompt.prefix)])
            self._prefixes[prompt.prefix] = past
        return prompt, self._prefixes[prompt.prefix]

    @torch.no_grad()
    def advance(self, streams: Sequence[Stream]) -> list[list[Partial | Final]]:
        """Recognize all complete chunks of ``streams``, together; returns the events of each.

        A stream with several complete chunks gets one partial text for all of them.
        """
        events: list[list[Partial | Final]] = [[] for _ in streams]
        while any(stream.waiting for stream in streams):
            self._round([s.utterances[0] if s.utterances else None for s in streams], events)
            for stream in streams:
                if stream.utterances and self._complete(stream.utterances[0]):
                    stream.utterances.popleft()
        return events

    # -- one step of several utterances ------------------------------------------------------

    @staticmethod
    def _complete(utterance: LiveUtterance) -> bool:
        return utterance.ended and not utterance.audio.ready

    def _round(
        self, heads: Sequence[LiveUtterance | None], events: list[list[Partial | Final]]
    ) -> None:
        """The next chunk of each utterance, and the texts that are due then."""
        ready = [u for u in heads if u is not None and u.audio.ready]
        if ready:
            self._encoder.encode([u.audio for u in ready])
        unread = [u for u in heads if u is not None and u.read is not u.audio.frames_SE]
        if unread:
            self._append(unread)
        partial, final = [], []
        for place, utterance in enumerate(heads):
            if utterance is None:
                continue
            if self._complete(utterance):
                final.append((place, utterance))
            elif utterance in unread and self._shows(utterance):
                partial.append((place, utterance))
        for due, decoded in ((partial, self._partials), (final, self._finals)):
            if due:
                for (place, _), event in zip(due, decoded([u for _, u in due]), strict=True):
                    events[place] += [] if event is None else [event]

    def _shows(self, utterance: LiveUtterance) -> bool:
        enough = utterance.spoken >= SHORTEST_SPEECH - FRAME / 2
        return self.config.partials and enough and not utterance.audio.ready

    def _append(self, utterances: Sequence[LiveUtterance]) -> None:
        """Have the language model read the speech tokens that are settled."""
        embeds = embed_frames(self._model, [u.audio.frames_SE for u in utterances])
        read, growing, parts = [], [], []
        for utterance, embeds_AD in zip(utterances, embeds, strict=True):
            embeds_AD = embeds_AD.to(self._model.llm.dtype)
            settled = 0
            if utterance.audio.settles:
                frames, tokens = len(utterance.audio.frames_SE), len(embeds_AD)
                settled = settled_tokens(self._model, frames, tokens)
            if not utterance.prompt.suffix:  # something must be left that predicts the first token
                settled = min(settled, len(embeds_AD) - 1)
            settled = max(settled, utterance.settled)
            read.append((utterance, embeds_AD, settled))
            if settled > utterance.settled:
                growing.append(utterance)
                parts.append(embeds_AD[utterance.settled : settled])
        pasts = self._extended([u.past for u in growing], parts) if growing else []
        # Nothing above changes an utterance: a step that fails can be tried again, one by one.
        for utterance, past in zip(growing, pasts, strict=True):
            utterance.past = past
        for utterance, embeds_AD, settled in read:
            utterance.settled, utterance.rest_AD = settled, embeds_AD[settled:]
            utterance.read = utterance.audio.frames_SE

    def _extended(self, pasts: Sequence[LlmPast], parts: Sequence[Tensor]) -> list[LlmPast]:
        continuation = Continuation(self._model.llm, self._model.cached)
        with torch.no_grad():
            continuation.resume(pasts, parts)
        return continuation.pasts()

    def _embed(self, ids: Sequence[int]) -> Tensor:
        device = self._model.llm.device
        with torch.no_grad():
            return self._model.embed_tokens(torch.tensor(ids, dtype=torch.int64, device=device))

    def _decode(
        self,
        utterances: Sequence[LiveUtterance],
        forced: Sequence[Sequence[int]],
        limits: Sequence[int],
        cfg: DecodeConfig,
        scorer: HypothesisScorer | None = None,
    ) -> list[Hypothesis]:
        endings = [
            torch.cat((u.rest_AD, self._embed([*u.prompt.suffix, *ids])))
            for u, ids in zip(utterances, forced, strict=True)
        ]
        pasts = [u.past for u in utterances]
        tokenizer = self.recognizer.tokenizer
        return decode_pasts(self._model, pasts, endings, limits, tokenizer, cfg, scorer)

    def _scorer(self, utterances: Sequence[LiveUtterance]) -> HypothesisScorer | None:
        if self._model.ctc is None:
            return None
        found = ctc_log_probs(self._model, [u.audio.frames_SE for u in utterances])
        return HypothesisScorer.of(self._model, *found, [u.lang for u in utterances])

    def _partials(self, utterances: Sequence[LiveUtterance]) -> list[Partial]:
        cfg = replace(self.recognizer.decode, beam=1, ctc_weight=0.0)
        forced = [u.text.settled for u in utterances]
        limits = [
            max(min(self.config.partial_tokens, cfg.token_limit(u.seconds) - len(ids)), 1)
            for u, ids in zip(utterances, forced, strict=True)
        ]
        partials = []
        for u, hypothesis in zip(
            utterances, self._decode(utterances, forced, limits, cfg), strict=True
        ):
            text, settled = u.text.update(hypothesis.ids, self.recognizer.tokenizer)
            u.shown = u.shown or bool(text)
            partials.append(Partial(*u.times, text, settled))
        return partials

    def _finals(self, utterances: Sequence[LiveUtterance]) -> list[Final | None]:
        """None for an utterance that was no speech and of which nothing was shown."""
        cfg = self.recognizer.decode
        limits = [cfg.token_limit(u.seconds) for u in utterances]
        nothing = [()] * len(utterances)
        found = self._decode(utterances, nothing, limits, cfg, self._scorer(utterances))
        return [self._final(u, h) for u, h in zip(utterances, found, strict=True)]

    def _final(self, utterance: LiveUtterance, hypothesis: Hypothesis) -> Final | None:
        rules = self.recognizer.no_speech
        spoken = utterance.spoken + FRAME / 2  # sums of frames are not exact
        no_speech = spoken < SHORTEST_SPEECH or rules.holds(hypothesis, utterance.loudness, spoken)
        if no_speech and not utterance.shown:
            return None
        text, finished = "" if no_speech else hypothesis.text, hypothesis.finished
        confidence = round(hypothesis.confidence, 4)
        speech, doubt = self.recognizer.speech, self.recognizer.tuned.doubt
        ctc = None if no_speech else hypothesis.ctc_score
        heard = None if no_speech else hypothesis.heard
        found = find_doubt(
            text, seconds=utterance.spoken, finished=finished, ctc_margin=heard, speech=speech,
            config=doubt, lang=utterance.lang or speech.language(text),
        )  # fmt: skip
        words, _ = utterance.stretch(self.recognizer.frame_seconds).words(text, ctc)
        return Final(*utterance.times, text, confidence, no_speech, finished, found, heard, words)


def _as_wave(samples: np.ndarray | Tensor) -> np.ndarray:
    """[n] float32 in [-1, 1]. Raises `UserError` for another shape or type, NaN, and samples far
    above full scale."""
    wave = samples.detach().cpu().numpy() if isinstance(samples, Tensor) else np.asarray(samples)
    if wave.ndim != 1:
        raise UserError(f"a stream takes mono audio [n], not {list(wave.shape)}: mix its channels")
    if wave.dtype == np.int16:
        return wave.astype(np.float32) / 32_768
    if not np.issubdtype(wave.dtype, np.floating):
        raise UserError(f"a stream takes int16 or float32 samples, not {wave.dtype}")
    wave = wave.astype(np.float32)
    try:
        check_scale(wave)
    except AudioError as error:
        raise UserError(f"the stream's audio holds {error.detail}") from None
    return wave
