"""What transcription gives: words, segments and the transcript of a file, as values and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from dsasr.data.text.scripts import HAN_SPACES
from dsasr.inference import subtitles
from dsasr.inference.words import Word


@dataclass(frozen=True)
class Token:
    """One token's text and confidence (see `Segment`)."""

    text: str
    confidence: float


@dataclass(frozen=True)
class Alternative:
    """A hypothesis of an n-best list: ``score`` is what they are ranked by, ``logprob`` the
    language model's (nats), ``heard`` the CTC head's (nats; None: it has none)."""

    text: str
    score: float
    logprob: float
    heard: float | None = None


@dataclass(frozen=True)
class Segment:
    """The transcript of one segment of audio, with its times in seconds.

    ``confidence`` of a token is exp(−H), with the predictive entropy H in nats: 1 if the model is
    certain, 1/n if it is undecided between n equally likely tokens; of the segment it is the mean
    over its tokens (**ours**). ``heard`` is the transcript's log-probability by the CTC head less
    that of what the head itself writes, in nats per phoneme: 0 where they agree. ``doubt`` names
    why the text may be wrong (`dsasr.evaluation.doubt`).
    """

    start: float
    end: float
    text: str
    confidence: float
    no_speech: bool  # probably: too quiet, not heard by the CTC head, too uncertain, or too short
    finished: bool  # False: the transcript was cut at the token limit
    tokens: tuple[Token, ...]
    language: str = ""
    heard: float | None = None
    doubt: tuple[str, ...] = ()
    words: tuple[Word, ...] = ()
    phonemes: tuple[Word, ...] = ()
    alternatives: tuple[Alternative, ...] = ()
    overlap: float = 0.0  # seconds at its start that the segment before it holds as well


@dataclass(frozen=True)
class Transcription:
    """A file's transcript. ``text`` leaves out segments that are probably no speech.

    ``warnings``: what is wrong with the file though it was transcribed, such as that it is cut off.
    """

    path: str
    segments: tuple[Segment, ...]
    warnings: tuple[str, ...] = field(default=())

    @property
    def text(self) -> str:
        return HAN_SPACES.sub("", " ".join(s.text for s in self.spoken))

    @property
    def spoken(self) -> list[Segment]:
        """The segments with text that are probably speech."""
        return [s for s in self.segments if s.text and not s.no_speech]

    @property
    def finished(self) -> bool:
        """False if the transcript of any segment was cut at the token limit."""
        return all(s.finished for s in self.segments)

    @property
    def doubtful(self) -> list[Segment]:
        """The segments whose text is in doubt."""
        return [s for s in self.spoken if s.doubt]

    def to_dict(self) -> dict[str, Any]:
        """As a dict for JSON."""
        return {
            "path": self.path,
            "text": self.text,
            "finished": self.finished,
            "doubtful": len(self.doubtful),
            "warnings": list(self.warnings),
            "segments": [asdict(s) for s in self.segments],
        }

    def to_srt(self) -> str:
        """As SubRip subtitles (`dsasr.inference.subtitles`)."""
        return subtitles.srt(self.spoken)

    def to_vtt(self) -> str:
        """As WebVTT subtitles (`dsasr.inference.subtitles`)."""
        return subtitles.vtt(self.spoken)

    def to_nbest(self) -> str:
        """One line for each hypothesis of each segment: start, end, rank, score and text, with
        tabs between."""
        return "".join(
            f"{s.start:.2f}\t{s.end:.2f}\t{rank}\t{a.score:.3f}\t{a.text}\n"
            for s in self.spoken
            for rank, a in enumerate(s.alternatives or (Alternative(s.text, 0.0, 0.0),), 1)
        )
