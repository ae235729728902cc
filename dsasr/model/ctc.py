"""Phoneme head, CTC and consistency-regularized CTC (CR-CTC, arXiv 2410.05101).

Both losses are summed over utterances, and the engine divides by the number of phonemes, so that
utterances weigh by their phonemes and the balance between the two terms is the paper's (which also
sums both).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from rapidfuzz.distance import Levenshtein
from torch import Tensor, nn

from dsasr.kernels import dispatch
from dsasr.model.encoders.protocol import valid_frames
from dsasr.model.weight_init import reset_parameters
from dsasr.utils import ranges
from dsasr.utils.errors import UserError
from dsasr.utils.ranges import Dropout, Range

BLANK = 0


@dataclass(frozen=True)
class CtcHeadConfig:
    """The CTC head: a linear layer, or convolutions before it."""

    # convolutions over time before the linear layer; 0: none. On a frozen pretrained
    # encoder, three of them leave CTC's plateau where a linear layer stays on it
    layers: Annotated[int, Range(0, 1024)] = 0
    # channels of the convolutions; 0: the encoder's width
    width: Annotated[int, Range(0, 65_536)] = 0
    kernel: Annotated[int, Range(1, 1025)] = 3  # frames that a convolution sees; odd
    dropout: Dropout = 0.1  # after each convolution

    def __post_init__(self) -> None:
        ranges.check(self)
        if self.kernel % 2 == 0:
            raise UserError(f"model.pretrain.head.kernel must be odd, not {self.kernel}")


class HeadLayer(nn.Module):
    """LayerNorm, a convolution over time and GELU; padding is kept out.

    Without a residual path: with one, a head on Whisper's frames stays on CTC's plateau far longer.
    """

    def __init__(self, width: int, out_width: int, cfg: CtcHeadConfig):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.conv = nn.Conv1d(width, out_width, cfg.kernel, padding=cfg.kernel // 2)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, frames_BSE: Tensor, valid_BS1: Tensor) -> Tensor:
        x = self.norm(frames_BSE) * valid_BS1
        return self.dropout(F.gelu(self.conv(x.transpose(1, 2)).transpose(1, 2)))


class CtcHead(nn.Module):
    """Encoder frames [B, S, E] to log-probabilities of units [B, S, P], float32 at least.

    Before convolutions each channel is brought to mean 0 and deviation 1 (**ours**). A few channels
    of a pretrained encoder are many times larger than all others, as they are in large
    transformers (massive activations, arXiv 2402.17762), and LayerNorm shrinks those others: some
    seeds then stay on CTC's plateau. `dsasr.training.frame_statistics` measures mean and deviation
    at the first step; 0 where they are not known.
    """

    def __init__(self, width: int, vocab: int, cfg: CtcHeadConfig | None = None):
        super().__init__()
        cfg = cfg or CtcHeadConfig()
        widths = [width, *[cfg.width or width] * cfg.layers]
        self.layers = nn.ModuleList(HeadLayer(*pair, cfg) for pair in itertools.pairwise(widths))
        self.project = nn.Linear(widths[-1], vocab)
        if self.layers:
            # Never on the meta device: nothing draws them.
            for name in ("frame_mean_E", "frame_std_E"):
                self.register_buffer(name, torch.zeros(width, dtype=torch.float32, device="cpu"))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        reset_parameters(self, generator)

    def forward(self, frames_BSE: Tensor, lengths_B: Tensor) -> Tensor:
        """``lengths_B``: valid frames, on the device of the frames."""
        valid_BS1 = valid_frames(lengths_B, frames_BSE.shape[1]).unsqueeze(2)
        if self.layers:
            frames_BSE = self._standardized(frames_BSE)
        for layer in self.layers:
            frames_BSE = layer(frames_BSE, valid_BS1)
        logits = self.project(frames_BSE)
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)

    def _standardized(self, frames_BSE: Tensor) -> Tensor:
        mean_E, std_E = (x.to(frames_BSE.device) for x in (self.frame_mean_E, self.frame_std_E))
        return ((frames_BSE - mean_E) / std_E.masked_fill(std_E == 0, 1.0)).to(frames_BSE.dtype)


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
    feasible_B = feasible(frame_lengths_B, phonemes_BP, phoneme_lengths_B)
    return CtcLoss(nll_B, feasible_B, phoneme_lengths_B)


def feasible(frame_lengths_B: Tensor, phonemes_BP: Tensor, phoneme_lengths_B: Tensor) -> Tensor:
    """Which utterances have as many frames as their phonemes need (`CtcLoss`): bool [B]."""
    pairs = valid_frames(phoneme_lengths_B - 1, max(phonemes_BP.shape[1] - 1, 0))
    repeats_B = ((phonemes_BP[:, 1:] == phonemes_BP[:, :-1]) & pairs).sum(1)
    return frame_lengths_B >= phoneme_lengths_B + repeats_B


def ctc_log_prob(log_probs_SP: Tensor, units: Sequence[int]) -> float:
    """The log-probability (nats) of writing ``units``; -inf where there are too few frames."""
    frames = torch.tensor([len(log_probs_SP)])
    targets_BP = torch.tensor([list(units)], device=log_probs_SP.device)
    counts = torch.tensor([len(units)])
    nll = F.ctc_loss(
        log_probs_SP[:, None], targets_BP, frames, counts, blank=BLANK, reduction="none"
    )
    return -float(nll[0])


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


def unit_starts(best_BS: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
    """Where the best path ``best_BS`` begins to write a unit, and where it writes one: bool [B, S].

    Consecutive frames with the same unit write it once; blanks and padding write nothing.
    """
    valid_BS = valid_frames(lengths_B.to(best_BS.device), best_BS.shape[1])
    written_BS = (best_BS != BLANK) & valid_BS
    changed_BS = torch.ones_like(written_BS)
    changed_BS[:, 1:] = best_BS[:, 1:] != best_BS[:, :-1]
    return written_BS & changed_BS, written_BS


def greedy_phonemes(log_probs_BSP: Tensor, lengths_B: Tensor) -> list[list[int]]:
    """The best path of each utterance, repeats merged and blanks dropped."""
    best_BS = log_probs_BSP.argmax(-1)
    best, keep = best_BS.cpu(), unit_starts(best_BS, lengths_B)[0].cpu()
    return [row[mask].tolist() for row, mask in zip(best, keep, strict=True)]


def phoneme_errors(
    hypotheses: Sequence[Sequence[int]], phonemes_BP: Tensor, lengths_B: Tensor
) -> tuple[int, int]:
    """(edits, reference phonemes) over the utterances."""
    rows = zip(hypotheses, phonemes_BP.tolist(), lengths_B.tolist(), strict=True)
    edits = sum(Levenshtein.distance(list(ids), row[:length]) for ids, row, length in rows)
    return edits, int(lengths_B.sum())
