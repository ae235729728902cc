"""The labeled recordings on which encoders are probed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dsasr.analysis.probed_encoders import ProbedEncoder
from dsasr.build import Builder
from dsasr.data.audio.resampling import resample
from dsasr.data.text.phoneme_vocab import UnknownPhoneme
from dsasr.data.text.phonemizer import MissingPhonemes, Phonemizer, UnknownWord
from dsasr.entropy_allocation import forced_alignment, frame_labels
from dsasr.entropy_allocation.frame_labels import AlignedUtterance, UtteranceLabels
from dsasr.evaluation.eval_sets import Recording
from dsasr.model.encoders.pretrained import RATE
from dsasr.utils.distributed import device
from dsasr.utils.errors import UserError


@dataclass
class ProbeSet:
    """Recordings at ``rate`` with their labels; ``causes`` counts those left out."""

    recordings: list[Recording]
    labels: list[UtteranceLabels]
    causes: Counter[str] = field(default_factory=Counter)
    rate: int = RATE

    def at_rate(self, rate: int) -> list[Recording]:
        """The recordings resampled to ``rate``."""
        if rate == self.rate:
            return self.recordings
        return [
            replace(r, wave=resample(torch.from_numpy(r.wave), self.rate, rate).numpy())
            for r in self.recordings
        ]


def label_recordings(
    aligner: ProbedEncoder, recordings: Sequence[Recording], semantic: str = "word"
) -> ProbeSet:
    """Label recordings by the alignments in their shards, else by the aligner's forced alignment.

    ``semantic`` is ``word`` or ``token`` (of the run's LLM): the labels S of CSAI. A recording
    without text, or with the key of an earlier one, is left out. Raises `UserError` if fewer than 3
    utterances can be labeled, or if the aligner's posteriors are NaN.
    """
    builder = aligner.builder
    if builder is None:
        raise UserError("labels need a CTC head: give --aligner a run, checkpoint or snapshot")
    causes: Counter[str] = Counter()
    by_key: dict[str, Recording] = {}
    for r in recordings:
        if r.text and r.key not in by_key:
            by_key[r.key] = r
        else:
            causes["same_key" if r.text else "no_text"] += 1
    features = aligner.encode(list(by_key.values())) if aligner.ctc is not None else {}
    phonemizer = builder.phonemizer
    of_words = frame_labels.word_phonemizer(phonemizer)
    aligned, labeled = [], []
    for r in by_key.values():
        try:
            aligned.append(_align(r, aligner, features.get(r.key), phonemizer, of_words))
            labeled.append(r)
        except (UnknownPhoneme, UnknownWord, MissingPhonemes) as error:
            causes[type(error).__name__] += 1
        except ValueError:
            causes["not_alignable"] += 1
    if len(labeled) < 3:
        raise UserError(
            f"only {len(labeled)} utterances could be labeled (left out: {dict(causes)}): "
            "at least 3 are needed"
        )
    labels = frame_labels.number_words(aligned, aligner.frame_seconds)
    if semantic == "token":
        pairs = zip(labeled, labels, strict=True)
        labels = [_label_tokens(r, of_utterance, builder, of_words) for r, of_utterance in pairs]
    return ProbeSet(labeled, labels, causes, builder.front_end.rate)


def _align(
    r: Recording,
    aligner: ProbedEncoder,
    x_SE: Tensor | None,
    phonemizer: Phonemizer,
    of_words: Phonemizer,
) -> AlignedUtterance:
    vocab = aligner.builder.phonemes
    if r.alignment is not None and r.alignment.get("phonemes"):
        return _stored(r, aligner, x_SE, of_words)
    if x_SE is None:
        raise UserError("the aligner has no CTC head, and the shards hold no alignments")
    ids = vocab.encode(phonemizer.for_sample(r))
    with torch.no_grad():
        log_probs_SP = aligner.ctc(
            x_SE[None].to(device()), torch.tensor([len(x_SE)], device=device())
        )[0]
    if bool(log_probs_SP.isnan().any()):
        raise UserError(
            f"the aligner {aligner.source.name} gives posteriors that are not numbers (NaN): "
            "choose another --aligner"
        )
    return frame_labels.align_utterance(
        r.key, r.speaker, r.text, r.lang, ids, log_probs_SP, vocab, of_words
    )


def _stored(
    r: Recording, aligner: ProbedEncoder, x_SE: Tensor | None, of_words: Phonemizer
) -> AlignedUtterance:
    """An utterance by its shard's alignment."""
    rate, seconds = aligner.builder.front_end.rate, aligner.frame_seconds
    frames = len(x_SE) if x_SE is not None else round(len(r.wave) / rate / seconds)
    stored = forced_alignment.read(r.alignment, frames, seconds)
    ids = aligner.builder.phonemes.encode(stored.phonemes)
    words, phoneme_words = stored.words, stored.phoneme_words
    if words is None or phoneme_words is None:  # else the alignment decides what a word is
        words = forced_alignment.words_of(r.text)
        phoneme_words = frame_labels.assign_words(stored.phonemes, r.text, r.lang, of_words)
    return AlignedUtterance(
        r.key, r.speaker, tuple(ids), stored.positions_S, tuple(words), tuple(phoneme_words)
    )


def _label_tokens(
    r: Recording, labels: UtteranceLabels, builder: Builder, of_words: Phonemizer
) -> UtteranceLabels:
    symbols = builder.phonemes.decode(labels.phonemes)
    phoneme_words = frame_labels.assign_words(symbols, r.text, r.lang, of_words)
    ids = builder.tokenizer.encode(r.text)
    return frame_labels.label_tokens(labels, r.text, phoneme_words, ids, builder.tokenizer.decode)
