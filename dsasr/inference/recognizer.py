"""`Recognizer`, the API for transcription: audio files in, text with times and confidence out.

::

    from dsasr import Recognizer

    recognizer = Recognizer.from_pretrained("models/mine")
    print(recognizer.transcribe("talk.wav").text)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, overload

import torch

from dsasr.data.audio.files import FFMPEG, SNDFILE
from dsasr.data.audio.frontends import FrontEnd
from dsasr.data.batch import Batch
from dsasr.data.speech_statistics import SpeechStatistics
from dsasr.data.text.tokenizers import Tokenizer
from dsasr.evaluation.decode import DecodeConfig, decode_nbest
from dsasr.evaluation.tuned import Tuned
from dsasr.inference.joining import join
from dsasr.inference.segmentation import AudioSegment, SegmentationConfig
from dsasr.inference.segments import NoSpeechConfig, SegmentRules, make_segment
from dsasr.inference.sources import Source, damage, name_of, split_source
from dsasr.inference.transcript import Segment, Transcription
from dsasr.model.speech_llm import SpeechLLM
from dsasr.utils.distributed import device
from dsasr.utils.errors import UserError

EXTENSIONS = tuple(f".{kind}" for kind in (*SNDFILE, *FFMPEG))


@dataclass(frozen=True)
class Recognizer:
    """Transcribes audio of any length: cuts it at pauses and decodes the pieces.

    ``speech``: what the training's utterances were like, from which come pieces, token limits and
    doubts; ``frame_seconds``: of an encoder frame; ``nbest``: hypotheses of each segment that are
    kept; ``device`` None: the GPU if there is one.
    """

    model: SpeechLLM
    tokenizer: Tokenizer
    front_end: FrontEnd
    segmentation: SegmentationConfig
    decode: DecodeConfig
    no_speech: NoSpeechConfig = field(default_factory=NoSpeechConfig)
    batch_seconds: float = 240.0  # of padded audio, decoded together
    speech: SpeechStatistics = field(default_factory=SpeechStatistics)
    tuned: Tuned = field(default_factory=Tuned)
    frame_seconds: float = 0.04
    nbest: int = 1
    device: torch.device | None = None

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device: str | torch.device | None = None,
        batch_seconds: float = 240.0,
    ) -> Recognizer:
        """The recognizer of an exported folder (`dsasr export`) or of a run folder.

        It is on ``device``, or on the GPU if there is one; ``batch_seconds`` of padded audio are
        decoded together. Raises `UserError` if ``folder`` is neither.
        """
        from dsasr.inference.loading import load_parts

        parts = load_parts(Path(folder), None if device is None else torch.device(device))
        return cls(**parts, batch_seconds=batch_seconds)

    def with_beam(self, beam: int) -> Recognizer:
        """This recognizer with another beam width; 1 is greedy.

        A tuned weight of the CTC head counts where the beam can use it. Raises `UserError` for a
        width that the model's other decoding settings rule out.
        """
        weight = 0.0 if beam == 1 else self.decode.ctc_weight
        decode = replace(self.decode, beam=beam, ctc_weight=weight)
        return replace(self, decode=self.tuned.decode(decode))

    def with_nbest(self, nbest: int) -> Recognizer:
        """This recognizer with that many hypotheses of each segment, and a beam as wide."""
        return replace(self.with_beam(max(self.decode.beam, nbest)), nbest=nbest)

    def check_language(self, lang: str) -> None:
        """Raise `UserError` for a language that the model was not trained with, where it was
        trained with any."""
        self.model.hint(lang)

    @overload
    def transcribe(
        self, source: Source, *, lang: str = "", channel: int | None = None
    ) -> Transcription: ...

    @overload
    def transcribe(
        self, source: list[Source], *, lang: str = "", channel: int | None = None
    ) -> list[Transcription]: ...

    def transcribe(self, source, *, lang="", channel=None):
        """Transcribe one recording, or a list of them together: each a path, an open file, encoded
        bytes, or samples (an array or a tensor at 16 kHz; `Samples` for another rate).

        ``lang``: the language that is spoken, where it is known: the prompt names it, of a model
        that was trained with its name (`SpeechLLM.hint`), and the CTC head reads the text by it;
        ``channel``: the one to hear (from 0), in place of the mean of all. Raises `UserError` if it
        is no audio, and for a language that the model was not trained with; `transcribe_all` can
        leave out what is no audio.
        """
        if isinstance(source, list):
            return list(self.transcribe_all(source, lang=lang, channel=channel))
        return next(self.transcribe_all([source], lang=lang, channel=channel))

    def transcribe_all(
        self,
        sources: Iterable[Source],
        progress: Callable[[float], Any] = lambda seconds: None,
        on_error: Callable[[str, UserError], Any] | None = None,
        *,
        lang: str | Callable[[str], str] = "",
        channel: int | None = None,
    ) -> Iterator[Transcription]:
        """Transcribe many recordings, in order; short ones are decoded together.

        ``lang``: that of all, or a function from a recording's name to its own.
        ``progress`` is called with seconds of audio read. ``on_error`` is called with the name and
        the error of each file that is no audio, which is then left out; without it, the first such
        file raises.
        """
        waiting: list[tuple[int, AudioSegment]] = []  # (index of the file, segment)
        opened: list[Source] = []
        langs: list[str] = []
        if isinstance(lang, str):
            self.check_language(lang)
        segments: dict[int, list[Segment]] = {}  # by the index of the file
        read, yielded = 0, 0  # files read to their end; files yielded or left out

        def complete() -> Iterator[Transcription]:
            nonlocal yielded
            for index in range(yielded, read):
                if index in segments:
                    found = tuple(join(segments.pop(index)))
                    source = opened[index]
                    yield Transcription(name_of(source), found, damage(source))
                opened[index] = ""  # samples in memory may go
                yielded = index + 1

        for source in sources:
            index = len(opened)
            opened.append(source)
            langs.append(lang if isinstance(lang, str) else lang(name_of(source)))
            segments[index] = []
            position = 0.0
            try:
                self.check_language(langs[-1])
                for segment in split_source(source, self.segmentation, channel):
                    waiting.append((index, segment))
                    progress(max(0.0, segment.start + segment.seconds - position))
                    position = segment.start + segment.seconds
                    if self._padded_seconds(waiting) >= self.batch_seconds:
                        self._decode(waiting, segments, langs)
                        yield from complete()
            except UserError as error:
                if on_error is None:
                    raise
                on_error(name_of(source), error)
                waiting = [(i, segment) for i, segment in waiting if i != index]
                del segments[index]
            read += 1
        self._decode(waiting, segments, langs)
        yield from complete()

    @staticmethod
    def _padded_seconds(waiting: Sequence[tuple[int, AudioSegment]]) -> float:
        return len(waiting) * max(segment.seconds for _, segment in waiting)

    def _decode(
        self,
        waiting: list[tuple[int, AudioSegment]],
        segments: dict[int, list[Segment]],
        langs: Sequence[str],
    ) -> None:
        """Decode and remove all of ``waiting``; append each transcript to its file's."""
        audio, waiting[:] = list(waiting), []
        if not audio:
            return
        batch = self._batch([segment for _, segment in audio], [langs[index] for index, _ in audio])
        batch = batch.to(self.device or device())
        found = decode_nbest(
            self.model, batch, self.tokenizer, self.decode, nbest=self.nbest, with_ctc_score=True
        )
        rules = SegmentRules(
            self.tokenizer, self.no_speech, self.speech, self.tuned.doubt, self.frame_seconds,
            self.nbest,
        )  # fmt: skip
        for (index, segment), hypotheses in zip(audio, found, strict=True):
            segments[index].append(make_segment(rules, segment, hypotheses, langs[index]))

    def _batch(self, audio: Sequence[AudioSegment], langs: Sequence[str]) -> Batch:
        rows = [self.front_end.features(_pad_to_minimum(a.wave)) for a in audio]
        return Batch.blank(
            torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
            feature_lengths_B=torch.tensor([len(row) for row in rows]),
            keys=tuple(map(str, range(len(rows)))),
            langs=tuple(langs),
            durations=tuple(a.seconds for a in audio),
            hints=tuple(map(self.model.hint, langs)),
        )


def _pad_to_minimum(wave: torch.Tensor) -> torch.Tensor:
    """At least 0.2 s: the encoder's subsampling needs some frames."""
    return torch.nn.functional.pad(wave, (0, max(3200 - len(wave), 0)))


def audio_files(folder: Path) -> list[Path]:
    """All audio files below ``folder``, by their names' endings, sorted. Raises `UserError` if
    there is none."""
    found = (p for p in folder.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
    files = sorted(p for p in found if not p.name.startswith("._"))  # macOS's
    if not files:
        raise UserError(f"{folder} holds no audio ({', '.join(EXTENSIONS)})")
    return files
