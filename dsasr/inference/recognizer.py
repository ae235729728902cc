"""`Recognizer`: audio files in, text with times and confidence out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch

from dsasr.data.audio.features import Cmvn, FbankConfig, fbank
from dsasr.data.batch import Batch
from dsasr.data.text.tokenizers import Tokenizer
from dsasr.evaluation.decode import DecodeConfig, Hypothesis, decode
from dsasr.inference.segmentation import Piece, SegmentationConfig, pieces
from dsasr.model.speech_llm import SpeechLLM
from dsasr.utils.distributed import device
from dsasr.utils.errors import UserError

EXTENSIONS = (
    ".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".aif", ".aiff", ".au", ".caf", ".w64",
)  # fmt: skip


@dataclass(frozen=True)
class NoSpeechConfig:
    """When a piece is probably no speech (**ours**)."""

    loudness_db: float = -55.0  # its loud tenth is quieter than this
    confidence: float = 0.4  # or its tokens' mean confidence is lower


@dataclass(frozen=True)
class Token:
    text: str
    confidence: float


@dataclass(frozen=True)
class Segment:
    """One piece of audio. ``confidence``: exp(−H), H the predictive entropy in nats, which is 1
    where the model wavers between no two tokens and 1/n where it wavers evenly between n; of the
    segment, the mean over its tokens (**ours**)."""

    start: float
    end: float
    text: str
    confidence: float
    no_speech: bool  # probably: too quiet, or too uncertain
    finished: bool  # False: the decoder was cut off at its token limit
    tokens: tuple[Token, ...]


@dataclass(frozen=True)
class Transcription:
    """A file's transcript. ``text`` leaves out what is probably no speech."""

    path: str
    segments: tuple[Segment, ...]

    @property
    def text(self) -> str:
        return " ".join(s.text for s in self.segments if s.text and not s.no_speech)

    def plain(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return {
            "path": self.path,
            "text": self.text,
            "segments": [asdict(s) for s in self.segments],
        }

    def srt(self) -> str:
        """As SubRip subtitles."""
        shown = [s for s in self.segments if s.text and not s.no_speech]
        return "\n".join(
            f"{i}\n{_clock(s.start)} --> {_clock(s.end)}\n{s.text}\n"
            for i, s in enumerate(shown, 1)
        )


def _clock(seconds: float) -> str:
    whole = round(seconds * 1000)
    return (
        f"{whole // 3_600_000:02d}:{whole // 60_000 % 60:02d}:{whole // 1000 % 60:02d},"
        f"{whole % 1000:03d}"
    )


@dataclass(frozen=True)
class Recognizer:
    """A model with all that it needs to read audio and write text."""

    model: SpeechLLM
    tokenizer: Tokenizer
    fbank: FbankConfig
    cmvn: Cmvn
    cut: SegmentationConfig
    decode: DecodeConfig
    no_speech: NoSpeechConfig = NoSpeechConfig()
    batch_seconds: float = 240.0  # of padded audio, decoded together

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Recognizer:
        """Of an exported folder (`dsasr export`), or of a run folder.

        Raises `UserError` if it is neither.
        """
        from dsasr.inference.export import is_export, load_export

        folder = Path(folder)
        if is_export(folder):
            held = load_export(folder)
            cut = SegmentationConfig(max_seconds=held.config.max_seconds)
            model = held.model.to(device())
            return cls(model, held.tokenizer, held.config.fbank, held.cmvn, cut, held.config.decode)
        if not (folder / "recipe.yaml").is_file():
            raise UserError(f"{folder} is neither an exported model nor a run folder")
        from dsasr.inference.model_from_run import RunModel

        found = RunModel.from_run(folder)
        data, build = found.build.recipe.data, found.build
        cut = SegmentationConfig(max_seconds=data.dataloader.batch.max_seconds)
        chosen = build.recipe.evaluation.decode
        return cls(found.model, build.tokenizer, data.fbank, build.cmvn, cut, chosen)

    def transcribe(self, source: str | Path | BinaryIO) -> Transcription:
        """One file of any length, by path or open for reading. Raises `UserError` if it is no
        audio."""
        return next(self.transcribe_all([source]))

    def transcribe_all(
        self,
        sources: Iterable[str | Path | BinaryIO],
        progress: Callable[[float], Any] = lambda seconds: None,
        failed: Callable[[str, UserError], Any] | None = None,
    ) -> Iterator[Transcription]:
        """Many files, in order; short ones are decoded together.

        ``progress`` is told of seconds of audio; ``failed``, where given, of files that are no
        audio, which are then left out instead of ending it all.
        """
        waiting: list[tuple[int, Piece]] = []
        names: list[str] = []
        found: dict[int, list[Segment]] = {}
        ended, given = 0, 0  # files read to their end; files given out

        def done() -> Iterator[Transcription]:
            nonlocal given
            for index in range(given, ended):
                if index in found:
                    yield Transcription(names[index], tuple(found.pop(index)))
                given = index + 1

        for source in sources:
            index = len(names)
            names.append(str(source) if isinstance(source, (str, Path)) else "-")
            found[index] = []
            at = 0.0
            try:
                for piece in pieces(source, self.cut):
                    waiting.append((index, piece))
                    progress(piece.start + piece.seconds - at)
                    at = piece.start + piece.seconds
                    if self._padded(waiting) >= self.batch_seconds:
                        self._decode(waiting, found)
                        yield from done()
            except UserError as error:
                if failed is None:
                    raise
                failed(names[index], error)
                waiting = [(i, p) for i, p in waiting if i != index]
                del found[index]
            ended += 1
        self._decode(waiting, found)
        yield from done()

    @staticmethod
    def _padded(waiting: Sequence[tuple[int, Piece]]) -> float:
        return len(waiting) * max(piece.seconds for _, piece in waiting)

    def _decode(self, waiting: list[tuple[int, Piece]], found: dict[int, list[Segment]]) -> None:
        """Decode what waits, together, and append each piece's segment to its file's."""
        held, waiting[:] = list(waiting), []
        if not held:
            return
        batch = self._batch([piece for _, piece in held]).to(device())
        results = decode(self.model, batch, self.tokenizer, self.decode)
        for (index, piece), result in zip(held, results, strict=True):
            found[index].append(self._segment(piece, result))

    def _batch(self, chosen: Sequence[Piece]) -> Batch:
        rows = [self.cmvn.apply(fbank(_long_enough(p.wave), self.fbank)) for p in chosen]
        return Batch.blank(
            torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
            feature_lengths_B=torch.tensor([len(row) for row in rows]),
            keys=tuple(map(str, range(len(rows)))),
            durations=tuple(p.seconds for p in chosen),
        )

    def _segment(self, piece: Piece, result: Hypothesis) -> Segment:
        tokens = self._tokens(result)
        sure = [math.exp(-h) for h in result.token_entropies]
        confidence = sum(sure) / max(len(sure), 1)
        quiet = piece.loudness < self.no_speech.loudness_db
        unsure = confidence < self.no_speech.confidence
        return Segment(
            start=round(piece.start, 3),
            end=round(piece.start + piece.seconds, 3),
            text=result.text,
            confidence=round(confidence, 4),
            no_speech=quiet or unsure or not result.text,
            finished=result.finished,
            tokens=tokens,
        )

    def _tokens(self, result: Hypothesis) -> tuple[Token, ...]:
        """Each token with the text that it adds; one that only begins a character adds none."""
        tokens, before = [], ""
        for count, (_, entropy) in enumerate(
            zip(result.ids, result.token_entropies, strict=False), 1
        ):
            after = self.tokenizer.decode(list(result.ids[:count]))
            whole = after.rstrip("\N{REPLACEMENT CHARACTER}")
            added = whole[len(before) :] if whole.startswith(before) else ""
            tokens.append(Token(added, round(math.exp(-entropy), 4)))
            before = whole if whole.startswith(before) else before
        return tuple(tokens)


def _long_enough(wave: torch.Tensor) -> torch.Tensor:
    """At least 0.2 s: the encoder's subsampling needs some frames."""
    return torch.nn.functional.pad(wave, (0, max(3200 - len(wave), 0)))


def audio_files(folder: Path) -> list[Path]:
    """All audio files below ``folder``, by their names' endings, sorted."""
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
    if not found:
        raise UserError(f"{folder} holds no audio ({', '.join(EXTENSIONS)})")
    return found


def with_beam(recognizer: Recognizer, beam: int) -> Recognizer:
    """The same one with another beam."""
    return replace(recognizer, decode=replace(recognizer.decode, beam=beam))
