"""From the hypotheses of a piece of audio to a segment of the transcript."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dsasr.data.audio.activity import spoken_part
from dsasr.data.audio.resampling import RATE
from dsasr.data.speech_statistics import SpeechStatistics
from dsasr.evaluation.decode import Hypothesis
from dsasr.evaluation.detokenizer import Detokenizer
from dsasr.evaluation.doubt import DoubtConfig, find_doubt
from dsasr.inference.segmentation import AudioSegment
from dsasr.inference.transcript import Alternative, Segment, Token
from dsasr.inference.words import Stretch


@dataclass(frozen=True)
class NoSpeechConfig:
    """A segment is probably no speech if it has no text, or one of its values is lower (**ours**).

    What the CTC head says of the text tells more than how sure the language model is of it: written
    of noise, texts of the demo have −3.3 to −8 nats a unit, and confidences of 0.3 to 0.7; a
    recognizer of unclear speech has confidences of 0.2 to 0.7, and −1.1 to 0 nats.
    """

    loudness_db: float = -55.0  # `AudioSegment.loudness`
    seconds: float = 0.1  # the shortest words take longer, and less is padded with zeros
    heard: float = -3.0  # nats a unit (`Hypothesis.heard`)
    confidence: float = 0.4  # mean over the tokens, of a text that no CTC head has scored
    scored_confidence: float = 0.15  # the same, of one that it has scored

    def holds(self, hypothesis: Hypothesis, loudness: float, seconds: float) -> bool:
        """Whether a segment of that ``loudness`` in dB, with ``seconds`` of speech, is none."""
        scored = hypothesis.heard is not None
        return (
            not hypothesis.text.strip()
            or loudness < self.loudness_db
            or seconds < self.seconds
            or (scored and hypothesis.heard < self.heard)
            or hypothesis.confidence < (self.scored_confidence if scored else self.confidence)
        )


@dataclass(frozen=True)
class SegmentRules:
    """What a segment is judged by; the fields are those of `Recognizer`."""

    tokenizer: Detokenizer
    no_speech: NoSpeechConfig
    speech: SpeechStatistics
    doubt: DoubtConfig
    frame_seconds: float
    nbest: int = 1


def make_segment(
    rules: SegmentRules, audio: AudioSegment, hypotheses: Sequence[Hypothesis], lang: str
) -> Segment:
    """The segment of ``audio``, whose best hypothesis comes first."""
    best = hypotheses[0]
    language = lang or rules.speech.language(best.text)
    first, last, _ = spoken_part(audio.wave.numpy(), RATE)
    begin, end = audio.start + first, audio.start + (last or audio.seconds)
    words, phonemes = Stretch(audio.start, begin, end, rules.frame_seconds).words(
        best.text, best.ctc_score
    )
    return Segment(
        start=round(audio.start, 3),
        end=round(audio.start + audio.seconds, 3),
        text=best.text,
        confidence=round(best.confidence, 4),
        no_speech=rules.no_speech.holds(best, audio.loudness, audio.seconds),
        finished=best.finished,
        tokens=tokens_of(best, rules.tokenizer),
        language=language,
        heard=best.heard,
        doubt=find_doubt(
            best.text,
            seconds=audio.speech,
            finished=best.finished,
            ctc_margin=best.heard,
            speech=rules.speech,
            config=rules.doubt,
            lang=language,
        ),
        words=words,
        phonemes=phonemes,
        alternatives=tuple(map(_alternative, hypotheses)) if rules.nbest > 1 else (),
        overlap=round(audio.overlap, 3),
    )


def tokens_of(hypothesis: Hypothesis, tokenizer: Detokenizer) -> tuple[Token, ...]:
    """Each token with the text that it adds; one that only begins a character adds none."""
    tokens, before = [], ""
    pairs = zip(hypothesis.ids, hypothesis.token_entropies, strict=False)
    for count, (_, entropy) in enumerate(pairs, 1):
        text = tokenizer.decode(list(hypothesis.ids[:count]))
        complete = text.rstrip("\N{REPLACEMENT CHARACTER}")
        added = complete[len(before) :] if complete.startswith(before) else ""
        tokens.append(Token(added, round(math.exp(-entropy), 4)))
        before = complete if complete.startswith(before) else before
    return tuple(tokens)


def _alternative(hypothesis: Hypothesis) -> Alternative:
    ctc = hypothesis.ctc_score
    log_prob = None if ctc is None else round(ctc.log_prob, 4)
    return Alternative(
        hypothesis.text, round(hypothesis.score, 5), round(hypothesis.logprob, 4), log_prob
    )
