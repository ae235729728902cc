"""What training needs to know of all of its shards: the features' mean and variance, the units."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from dsasr.data.audio.features import CmvnSums, FbankConfig
from dsasr.data.shards.build_index import read_texts
from dsasr.data.shards.process_pool import map_in_processes
from dsasr.data.shards.sample import BadSample
from dsasr.data.shards.verify import cmvn_sums
from dsasr.data.text.espeak_phonemizer import EspeakPhonemizer
from dsasr.data.text.phoneme_vocab import PhonemeVocab
from dsasr.data.text.phonemizer import MissingPhonemes, Phonemizer, UnknownWord
from dsasr.utils.errors import UserError
from dsasr.utils.progress import Bar


def feature_sums(
    tars: Sequence[Path], mels: int, processes: int | None = None
) -> tuple[CmvnSums, str]:
    """Feature sums of all shards, and in words how many samples were left out for what.

    Raises `UserError` where no frame is found.
    """
    work = partial(cmvn_sums, config=FbankConfig(mels=mels))
    sums, causes = CmvnSums(mels), Counter()
    for part, bad in map_in_processes(work, tars, processes, "features"):
        sums.merge(part)
        causes.update(bad)
    counts = ", ".join(f"{cause} {n}" for cause, n in causes.most_common())
    if not sums.count:
        raise UserError(f"no frames in {len(tars)} shards ({counts or 'all samples are short'})")
    return sums, counts


def unit_vocab(
    tars: Sequence[Path], phonemizer: Phonemizer
) -> tuple[PhonemeVocab, Counter[str], Counter[str]]:
    """(all units of the shards' transcripts, samples left out by cause, samples that espeak-ng
    reads as English for want of rules by their language).

    Raises `UserError` where no unit is found.
    """
    causes: Counter[str] = Counter()
    langs: Counter[str] = Counter()

    def sequences() -> Iterator[list[str]]:
        for tar in Bar(tars, desc="phonemes", unit="shard", delay=1):
            for sample in read_texts(tar):
                try:
                    if isinstance(sample, BadSample):
                        raise sample
                    if isinstance(phonemizer, EspeakPhonemizer):
                        langs[sample.lang] += 1
                    yield phonemizer.for_sample(sample)
                except BadSample as error:
                    causes[error.cause] += 1
                except UnknownWord as error:
                    causes[f"unknown word '{error.word}'"] += 1
                except MissingPhonemes:
                    causes["no stored phonemes"] += 1

    vocab = PhonemeVocab.build(sequences())
    counts = ", ".join(f"{cause} {n}" for cause, n in causes.most_common(10))
    if len(vocab) == 1:  # the blank
        raise UserError(f"no phonemes found ({counts or 'no text'}): try --kind espeak or lexicon")
    unknown = {lang: n for lang, n in langs.items() if lang and not phonemizer.knows(lang)}
    return vocab, causes, Counter(unknown)
