"""`Recognizer`, the API for transcription: audio files in, text with times and confidence out.

::

    from dsasr import Recognizer

    recognizer = Recognizer.from_pretrained("models/mine")
    print(recognizer.transcribe("talk.wav").text)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch

from dsasr.data.audio.files import FFMPEG, SNDFILE
from dsasr.data.audio.frontends import FrontEnd
from dsasr.data.batch import Batch
from dsasr.data.text.tokenizers import Tokenizer
from dsasr.evaluation.decode import DecodeConfig, Hypothesis, decode
from dsasr.inference.segmentation import AudioSegment, SegmentationConfig, split_audio
from dsasr.model.speech_llm import SpeechLLM
from dsasr.utils.distributed import device
from dsasr.utils.errors import UserError

EXTENSIONS = tuple(f".{kind}" for kind in (*SNDFILE, *FFMPEG))


@dataclass(frozen=True)
class NoSpeechConfig:
    """A segment is probably no speech if one of its values is lower (**ours**)."""

    loudness_db: float = -55.0  # `AudioSegment.loudness`
    confidence: float = 0.4  # mean over the tokens
    seconds: float = 0.1  # the shortest words take longer, and less is padded with zeros


@dataclass(frozen=True)
class Token:
    """One token's text and confidence (see `Segment`)."""

    text: str
    confidence: float


@dataclass(frozen=True)
class Segment:
    """The transcript of one segment of audio, with its times in seconds.

    ``confidence`` of a token is exp(−H), with the predictive entropy H in nats: 1 if the model is
    certain, 1/n if it is undecided between n equally likely tokens; of the segment it is the mean
    over its tokens (**ours**).
    """

    start: float
    end: float
    text: str
    confidence: float
    no_speech: bool  # probably: too quiet, or too uncertain
    finished: bool  # False: the transcript was cut at the token limit
    tokens: tuple[Token, ...]


@dataclass(frozen=True)
class Transcription:
    """A file's transcript. ``text`` leaves out segments that are probably no speech."""

    path: str
    segments: tuple[Segment, ...]

    @property
    def text(self) -> str:
        return " ".join(s.text for s in self.segments if s.text and not s.no_speech)

    @property
    def finished(self) -> bool:
        """False if the transcript of any segment was cut at the token limit."""
        return all(s.finished for s in self.segments)

    def to_dict(self) -> dict[str, Any]:
        """As a dict for JSON."""
        return {
            "path": self.path,
            "text": self.text,
            "finished": self.finished,
            "segments": [asdict(s) for s in self.segments],
        }

    def to_srt(self) -> str:
        """As SubRip subtitles."""
        spoken = [s for s in self.segments if s.text and not s.no_speech]
        return "\n".join(
            f"{i}\n{_srt_time(s.start)} --> {_srt_time(s.end)}\n{s.text}\n"
            for i, s in enumerate(spoken, 1)
        )


def _srt_time(seconds: float) -> str:
    """``hh:mm:ss,mmm``"""
    total, milliseconds = divmod(round(seconds * 1000), 1000)
    return f"{total // 3600:02d}:{total // 60 % 60:02d}:{total % 60:02d},{milliseconds:03d}"


@dataclass(frozen=True)
class Recognizer:
    """Transcribes audio files of any length: splits them at silence and decodes the segments."""

    model: SpeechLLM
    tokenizer: Tokenizer
    front_end: FrontEnd
    segmentation: SegmentationConfig
    decode: DecodeConfig
    no_speech: NoSpeechConfig = NoSpeechConfig()
    batch_seconds: float = 240.0  # of padded audio, decoded together

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Recognizer:
        """The recognizer of an exported folder (`dsasr export`) or of a run folder.

        It is on the GPU if there is one. Raises `UserError` if ``folder`` is neither.
        """
        from dsasr.checkpoint.export_folder import is_export
        from dsasr.inference.export import load_export

        folder = Path(folder)
        if is_export(folder):
            export = load_export(folder)
            return cls(
                export.model.to(device()),
                export.tokenizer,
                export.front_end,
                SegmentationConfig(max_seconds=export.config.max_seconds),
                export.config.decode,
            )
        if not (folder / "recipe.yaml").is_file():
            raise UserError(f"{folder} is neither an exported model nor a run folder")
        from dsasr.inference.model_from_run import RunModel

        run = RunModel.from_run(folder)
        recipe = run.build.recipe
        return cls(
            run.model,
            run.build.tokenizer,
            run.build.front_end,
            SegmentationConfig(max_seconds=recipe.data.dataloader.batch.max_seconds),
            recipe.evaluation.decode,
        )

    def with_beam(self, beam: int) -> Recognizer:
        """This recognizer with another beam width; 1 is greedy.

        Raises `UserError` for one that the model's other decoding settings rule out.
        """
        return replace(self, decode=replace(self.decode, beam=beam))

    def transcribe(self, source: str | Path | BinaryIO) -> Transcription:
        """Transcribe one file, given by path or open for reading.

        Raises `UserError` if it is no audio.
        """
        return next(self.transcribe_all([source]))

    def transcribe_all(
        self,
        sources: Iterable[str | Path | BinaryIO],
        progress: Callable[[float], Any] = lambda seconds: None,
        on_error: Callable[[str, UserError], Any] | None = None,
    ) -> Iterator[Transcription]:
        """Transcribe many files, in order; short ones are decoded together.

        ``progress`` is called with seconds of audio read. ``on_error`` is called with the name and
        the error of each file that is no audio, which is then left out; without it, the first such
        file raises.
        """
        waiting: list[tuple[int, AudioSegment]] = []  # (index of the file, segment)
        names: list[str] = []
        segments: dict[int, list[Segment]] = {}  # by the index of the file
        read, yielded = 0, 0  # files read to their end; files yielded or left out

        def complete() -> Iterator[Transcription]:
            nonlocal yielded
            for index in range(yielded, read):
                if index in segments:
                    yield Transcription(names[index], tuple(segments.pop(index)))
                yielded = index + 1

        for source in sources:
            index = len(names)
            names.append(str(source) if isinstance(source, (str, Path)) else "-")
            segments[index] = []
            position = 0.0
            try:
                for segment in split_audio(source, self.segmentation):
                    waiting.append((index, segment))
                    progress(segment.start + segment.seconds - position)
                    position = segment.start + segment.seconds
                    if self._padded_seconds(waiting) >= self.batch_seconds:
                        self._decode(waiting, segments)
                        yield from complete()
            except UserError as error:
                if on_error is None:
                    raise
                on_error(names[index], error)
                waiting = [(i, segment) for i, segment in waiting if i != index]
                del segments[index]
            read += 1
        self._decode(waiting, segments)
        yield from complete()

    @staticmethod
    def _padded_seconds(waiting: Sequence[tuple[int, AudioSegment]]) -> float:
        return len(waiting) * max(segment.seconds for _, segment in waiting)

    def _decode(
        self, waiting: list[tuple[int, AudioSegment]], segments: dict[int, list[Segment]]
    ) -> None:
        """Decode and remove all of ``waiting``; append each transcript to its file's."""
        audio, waiting[:] = list(waiting), []
        if not audio:
            return
        batch = self._batch([segment for _, segment in audio]).to(device())
        hypotheses = decode(self.model, batch, self.tokenizer, self.decode)
        for (index, segment), hypothesis in zip(audio, hypotheses, strict=True):
            segments[index].append(self._segment(segment, hypothesis))

    def _batch(self, audio: Sequence[AudioSegment]) -> Batch:
        rows = [self.front_end.features(_pad_to_minimum(a.wave)) for a in audio]
        return Batch.blank(
            torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
            feature_lengths_B=torch.tensor([len(row) for row in rows]),
            keys=tuple(map(str, range(len(rows)))),
            durations=tuple(a.seconds for a in audio),
        )

    def _segment(self, audio: AudioSegment, hypothesis: Hypothesis) -> Segment:
        confidences = [math.exp(-entropy) for entropy in hypothesis.token_entropies]
        confidence = sum(confidences) / max(len(confidences), 1)
        quiet = audio.loudness < self.no_speech.loudness_db
        uncertain = confidence < self.no_speech.confidence
        short = audio.seconds < self.no_speech.seconds
        return Segment(
            start=round(audio.start, 3),
            end=round(audio.start + audio.seconds, 3),
            text=hypothesis.text,
            confidence=round(confidence, 4),
            no_speech=quiet or uncertain or short or not hypothesis.text,
            finished=hypothesis.finished,
            tokens=self._tokens(hypothesis),
        )

    def _tokens(self, hypothesis: Hypothesis) -> tuple[Token, ...]:
        """Each token with the text that it adds; one that only begins a character adds none."""
        tokens, before = [], ""
        for count, (_, entropy) in enumerate(
            zip(hypothesis.ids, hypothesis.token_entropies, strict=False), 1
        ):
            text = self.tokenizer.decode(list(hypothesis.ids[:count]))
            complete = text.rstrip("\N{REPLACEMENT CHARACTER}")
            added = complete[len(before) :] if complete.startswith(before) else ""
            tokens.append(Token(added, round(math.exp(-entropy), 4)))
            before = complete if complete.startswith(before) else before
        return tuple(tokens)


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
