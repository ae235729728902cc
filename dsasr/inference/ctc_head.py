"""The CTC head of a recognizer's encoder: where a run keeps it, and the model that scores with it.

An adaptor that reads CTC has the head among its own weights. Of other kinds the head was trained by
the pretrain branch, and scores transcripts and gives their times; a run that took its encoder from
elsewhere keeps the head of that encoder.
"""

from __future__ import annotations

from torch import nn

from dsasr.build import Builder
from dsasr.checkpoint import kept_head, zero_partition
from dsasr.checkpoint.locate import open_verified
from dsasr.checkpoint.tensor_fragments import FragmentError, FragmentReader, PrefixReader, Reader
from dsasr.data.text.phoneme_vocab import PhonemeVocab
from dsasr.data.text.phonemizer import Phonemizer
from dsasr.data.text.speller import Speller
from dsasr.entropy_allocation.frame_labels import word_phonemizer
from dsasr.model.ctc import CtcHead
from dsasr.model.speech_llm import SpeechLLM
from dsasr.utils.errors import UserError

_WEIGHT = "ctc.project.weight"


def find_head(builder: Builder, reader: FragmentReader) -> Reader | None:
    """The weights ``ctc.…`` that belong to the checkpoint's recognizer; None where there are none.

    Of a concurrent run they lie in the newest snapshot of its encoder. Raises `UserError` for a
    kept head that is unreadable.
    """
    try:
        _ = builder.phonemes
    except UserError:  # none are named, or their file is gone
        return None
    return _head_weights(builder, reader)


def _head_weights(builder: Builder, reader: FragmentReader) -> Reader | None:
    for prefix in ("sft/", "pretrain/"):
        if prefix + _WEIGHT in reader.shapes:
            return PrefixReader(reader, prefix)
    for folder in sorted(builder.recipe.store_folder.glob("encoder-*"), reverse=True):
        try:
            snapshot = PrefixReader(open_verified(folder), "")
        except FragmentError:
            continue
        return snapshot if _WEIGHT in snapshot else None
    return kept_head.open_kept(builder.recipe.folder)


def attach_own_head(model: SpeechLLM, builder: Builder, reader: FragmentReader) -> None:
    """Give ``model`` its checkpoint's head for scores of transcripts, unless it has one.

    Raises `FragmentError` where the head does not fit.
    """
    if model.ctc is not None:
        return
    weights = find_head(builder, reader)
    if weights is None:
        return
    units = len(builder.phonemes)
    ctc = CtcHead(model.encoder.width, units, builder.recipe.model.pretrain.head)
    zero_partition.load_weights(nn.ModuleDict({"ctc": ctc}), weights)
    model.attach_ctc_head(ctc.eval(), reading_speller(builder.phonemizer, builder.phonemes))


def reading_speller(phonemizer: Phonemizer, vocab: PhonemeVocab) -> Speller:
    """What spells new text: phonemes stored in shards are those of no new text, so espeak-ng reads
    it then. Where that is not installed, or writes other symbols, the speller knows no text."""
    return Speller(word_phonemizer(phonemizer), vocab)
