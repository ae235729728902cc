"""What a CTC head writes against what was said: its errors, and which unit it takes for which."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch

from dsasr.analysis.probed_encoders import ProbedEncoder
from dsasr.data.text.characters import BOUNDARY
from dsasr.data.text.ctc_noise import Confusions
from dsasr.data.text.phoneme_vocab import UnknownPhoneme
from dsasr.data.text.phonemizer import UnknownWord
from dsasr.evaluation.error_rate import EditCounts, count_edits
from dsasr.evaluation.eval_sets import Recording
from dsasr.model.ctc import greedy_phonemes
from dsasr.utils.distributed import device
from dsasr.utils.errors import UserError

GROUP = 64  # recordings whose features are in memory at once


@dataclass
class CtcErrors:
    """Errors of greedy CTC; ``words`` is empty unless the units are characters."""

    confusions: Confusions
    units: EditCounts = field(default_factory=EditCounts)
    words: EditCounts = field(default_factory=EditCounts)
    left_out: int = 0  # recordings with a unit or word that the run does not know


def count_ctc_errors(
    encoder: ProbedEncoder,
    recordings: Sequence[Recording],
    progress: Callable[[Iterable], Iterable] = lambda items: items,
) -> CtcErrors:
    """Decode ``recordings`` greedily with the encoder's CTC head and count its errors.

    Raises `UserError` for an encoder without a head.
    """
    if encoder.ctc is None or encoder.builder is None:
        raise UserError(f"{encoder.source.name} has no CTC head: give a run that pretrains")
    vocab = encoder.builder.phonemes
    phonemizer = encoder.builder.phonemizer
    errors = CtcErrors(Confusions.empty(vocab.symbols))
    for start in progress(range(0, len(recordings), GROUP)):
        group = recordings[start : start + GROUP]
        features = encoder.encode(group)
        for recording in group:
            try:
                reference = vocab.encode(phonemizer.for_sample(recording))
            except (UnknownPhoneme, UnknownWord):
                errors.left_out += 1
                continue
            frames_SE = features[recording.key].to(device())
            lengths_B = torch.tensor([len(frames_SE)], device=device())
            with torch.no_grad():
                log_probs_BSP = encoder.ctc(frames_SE[None], lengths_B)
            (written,) = greedy_phonemes(log_probs_BSP, lengths_B)
            errors.confusions.add(reference, written)
            errors.units += count_edits(vocab.decode(reference), vocab.decode(written))
            if BOUNDARY in vocab.symbols:
                words = [_words(vocab.decode(ids)) for ids in (reference, written)]
                errors.words += count_edits(*words)
    return errors


def _words(characters: Sequence[str]) -> list[str]:
    return "".join(characters).replace(BOUNDARY, " ").split()
