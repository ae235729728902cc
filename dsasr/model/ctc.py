"""Phoneme head, CTC and consistency-regularized CTC (CR-CTC, arXiv 2410.05101).

Both losses are sums over utterances divided by the number of phonemes, so that utterances weigh by
their phonemes and the balance between the two terms is the paper's (which also sums both).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from rapidfuzz.distance import Levenshtein
from torch import Tensor, nn

from dsasr.kernels import dispatch
from dsasr.model.encoders.conformer import reset_parameters
from dsasr.model.encoders.protocol import valid_frames

BLANK = 0


class CtcHead(nn.Module):
    """Encoder frames [B, S, E] to phoneme log-probabilities [B, S, P], float32 at least."""

    def __init__(self, width: int, vocab: int):
        super().__init__()
        self.project = nn.Linear(width, vocab)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        reset_parameters(self, generator)

    def forward(self, frames_BSE: Tensor) -> Tensor:
        logits = self.project(frames_BSE)
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


@dataclass(frozen=True)
class CtcLoss:
    """``nll_B`` in nats (0 where infeasible), ``feasible_B``, and the labels' ``lengths_B``.

    An utterance is infeasible if it has fewer frames than its phonemes need (one each, and one
    blank between equal neighbors): its likelihood is 0. It is left out of the loss and counted.
    """

    nll_B: Tensor
    feasible_B: Tensor
    lengths_B: Tensor

    @property
    def phonemes(self) -> Tensor:
        """Phonemes of the feasible utterances, a scalar."""
        return (self.lengths_B * self.feasible_B).sum()


def ctc_loss(
    log_probs_BSP: Tensor,
    frame_lengths_B: Tensor,
    phonemes_BP: Tensor,
    phoneme_lengths_B: Tensor,
    host_lengths: tuple[Tensor, Tensor] | None = None,
) -> CtcLoss:
    """CTC negative log-likelihood of each utterance; see `CtcLoss` for infeasible ones.

    torch's loss reads the lengths on the host: with ``host_lengths``, the same lengths of frames
    and phonemes on the CPU, it does not wait for a GPU.
    """
    frames_B, counts_B = host_lengths or (frame_lengths_B, phoneme_lengths_B)
    if phonemes_BP.shape[1] == 0:
        phonemes_BP = phonemes_BP.new_zeros(len(phonemes_BP), 1)
    nll_B = F.ctc_loss(
        log_probs_BSP.transpose(0, 1),
        phonemes_BP,
        frames_B,
        counts_B,
        blank=BLANK,
        reduction="none",
        zero_infinity=True,
    )
    pairs = valid_frames(phoneme_lengths_B - 1, phonemes_BP.shape[1] - 1)
    repeats_B = ((phonemes_BP[:, 1:] == phonemes_BP[:, :-1]) & pairs).sum(1)
    feasible_B = frame_lengths_B >= phoneme_lengths_B + repeats_B
    return CtcLoss(nll_B, feasible_B, phoneme_lengths_B)


def consistency_loss(log_probs_BSP: Tensor, view2_BSP: Tensor, lengths_B: Tensor) -> Tensor:
    """CR-CTC's term per utterance, in nats: ½ Σ_frames [KL(sg(q)‖p) + KL(sg(p)‖q)].

    p and q are the posteriors of the two views, sg stops the gradient. Frames beyond
    ``lengths_B`` do not count.
    """
    toward = F.kl_div(log_probs_BSP, view2_BSP.detach(), reduction="none", log_target=True)
    back = F.kl_div(view2_BSP, log_probs_BSP.detach(), reduction="none", log_target=True)
    frames_BS = 0.5 * (toward + back).sum(-1)
    return frames_BS.masked_fill(~valid_frames(lengths_B, frames_BS.shape[1]), 0.0).sum(1)


def posterior_entropy(log_probs_BSP: Tensor, lengths_B: Tensor) -> Tensor:
    """Entropy of the posterior summed over the valid frames, in nats; a detached scalar."""
    frames_BS = dispatch.softmax_entropy(log_probs_BSP.detach())
    return frames_BS.masked_fill(~valid_frames(lengths_B, frames_BS.shape[1]), 0.0).sum()


def greedy_phonemes(log_probs_BSP: Tensor, lengths_B: Tensor) -> list[list[int]]:
    """The best path of each utterance, repeats merged and blanks dropped."""
    best_BS = log_probs_BSP.argmax(-1)
    merged_BS = torch.ones_like(best_BS, dtype=torch.bool)
    merged_BS[:, 1:] = best_BS[:, 1:] != best_BS[:, :-1]
    keep_BS = merged_BS & (best_BS != BLANK) & valid_frames(lengths_B, best_BS.shape[1])
    best, keep = best_BS.cpu(), keep_BS.cpu()
    return [row[mask].tolist() for row, mask in zip(best, keep, strict=True)]


def phoneme_errors(
    hypotheses: Sequence[Sequence[int]], phonemes_BP: Tensor, lengths_B: Tensor
) -> tuple[int, int]:
    """(edits, reference phonemes) over the utterances."""
    rows = zip(hypotheses, phonemes_BP.tolist(), lengths_B.tolist(), strict=True)
    edits = sum(Levenshtein.distance(list(ids), row[:length]) for ids, row, length in rows)
    return edits, int(lengths_B.sum())
