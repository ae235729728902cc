"""Whether a dataset's transcripts, the phonemizer and the phoneme vocabulary fit each other.

A vocabulary made with one kind of phonemizer and read with another shares some symbols with it, so
that a few short transcripts pass and nearly all others are dropped in training.
"""

from __future__ import annotations

from collections import Counter

from dsasr.build import Builder
from dsasr.data.dataloader.text_encoder import TextEncoder
from dsasr.data.dataloader.window_plan import DatasetPart
from dsasr.data.shards.index_cache import load_or_build_index
from dsasr.data.shards.sample import BadSample, Sample, parse_sample
from dsasr.data.shards.storage import ShardStorage, ShardTruncated
from dsasr.data.text.espeak_phonemizer import EspeakPhonemizer
from dsasr.data.text.phoneme_vocab import PhonemeVocab, UnknownPhoneme
from dsasr.data.text.phonemizer import MissingPhonemes, Phonemizer, UnknownWord
from dsasr.data.text.phonemizer import StoredPhonemes as Stored
from dsasr.utils.errors import UserError
from dsasr.utils.troubleshooting import see

SAMPLES = 64  # transcripts that are looked at
MISFIT = 0.5  # share of them without labels from which on the parts do not fit
CAUSES = ("unknown_phoneme", "missing_phonemes", "unknown_word", "no_phonemes")


def check(builder: Builder, storage: ShardStorage, where: str, part: DatasetPart) -> None:
    """Raise `UserError` where most transcripts of ``part`` have no labels for CTC."""
    samples = _samples(storage, part)
    encoder = builder.text_encoder(phonemes=True, tokens=False)
    failed: list[BadSample] = []
    for sample in samples:
        try:
            encoder.encode(sample)
        except BadSample as error:
            if error.cause in CAUSES:
                failed.append(error)
    if len(failed) <= MISFIT * len(samples):
        return
    kind = builder.recipe.data.phonemizer.kind
    causes = ", ".join(f"{cause} {n}" for cause, n in Counter(b.cause for b in failed).items())
    last = failed[-1]
    raise UserError(
        f"{where}: data.phonemizer.kind={kind} and data.phonemes={builder.recipe.data.phonemes} do "
        f"not fit its transcripts: {len(failed)} of {len(samples)} have no labels ({causes}; the "
        f"last: {last.key}: {last.detail}); {_fix(kind, samples, encoder)}{see('phonemes')}"
    )


def _fix(kind: str, samples: list[Sample], encoder: TextEncoder) -> str:
    others: dict[str, Phonemizer] = {"stored": Stored(), "espeak": EspeakPhonemizer()}
    others.pop(kind, None)
    for other, phonemizer in others.items():
        if _readable(samples, phonemizer, encoder.vocab) > MISFIT * len(samples):
            return f"they fit data.phonemizer.kind={other}"
    return f"make the vocabulary again with `dsasr data phonemes … --kind {kind}`"


def _readable(samples: list[Sample], phonemizer: Phonemizer, vocab: PhonemeVocab) -> int:
    count = 0
    for sample in samples:
        try:
            count += bool(vocab.encode(phonemizer.for_sample(sample)))
        except (UnknownPhoneme, UnknownWord, MissingPhonemes):
            continue
        except UserError:  # espeak-ng is not installed
            return 0
    return count


def _samples(storage: ShardStorage, part: DatasetPart) -> list[Sample]:
    """The first transcripts of the part, without audio."""
    samples: list[Sample] = []
    for shard in part.shards:
        for entry in load_or_build_index(storage, shard):
            if part.lang not in (None, entry.lang):
                continue
            try:
                labels = storage.read(shard, entry.json_offset, entry.json_size)
                samples.append(parse_sample(entry, shard, b"", labels))
            except (BadSample, ShardTruncated):
                continue
            if len(samples) == SAMPLES:
                return samples
        if samples:
            break
    return samples
