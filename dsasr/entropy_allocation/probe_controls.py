"""Features that carry nothing to be found: the controls of PAI and CSAI. All of it is **ours**.

``shuffled``: the rows of E permuted within each part of a split, which unties them from all labels
and keeps their distribution.

``phoneme_only``: what E tells of the window of phonemes, plus noise of E's own. Each frame gets the
mean of E given its window (`window_mean`), and the residual of another frame of its part. So it
shows the phonemes as E does, and is independent of the word given them. CSAI of such features is
not zero: they are a second way to phonemes that the context's tables learn only in part. The mean
is that of a regression on the window's phonemes, corrected by what remains in frames with the same
phoneme, the same three, … up to the same window, each shrunk to the one before. Corrections are
means over other utterances, so that no frame's own features come back to it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsasr.entropy_allocation.probe_splits import Split

SHRINKAGE = 4.0  # frames of the coarser mean that a finer one is mixed with
RIDGE = 1.0  # frames' worth of penalty of the regression


def shuffled_rows(split: Split, frames: int, seed: int) -> Tensor:
    """Row indices [N] shuffled within each part, so that no row of one part is seen in another."""
    order_N = torch.arange(frames)
    generator = torch.Generator().manual_seed(seed)
    for rows in (split.train_N.cpu(), split.valid_N.cpu(), split.test_N.cpu()):
        order_N[rows] = rows[torch.randperm(len(rows), generator=generator)]
    return order_N


def window_mean(x_NE: Tensor, context_NK: Tensor, utterance_N: Tensor) -> Tensor:
    """An estimate [N, E] of the mean of features ``x_NE`` given the window ``context_NK`` [N, K] of
    phonemes; ``utterance_N`` as in `FrameSet`."""
    mean_NE = _additive(x_NE, context_NK)
    middle = context_NK.shape[1] // 2
    for reach in range(middle + 1):
        seen_NK = context_NK[:, middle - reach : middle + reach + 1]
        group_N = seen_NK.unique(dim=0, return_inverse=True)[1]
        mean_NE = mean_NE + _of_others(x_NE - mean_NE, group_N, utterance_N)
    return mean_NE


def _additive(x_NE: Tensor, context_NK: Tensor) -> Tensor:
    """Ridge regression of centered features on the one-hot phonemes of the window."""
    symbols = int(context_NK.max()) + 1
    design = torch.nn.functional.one_hot(context_NK, symbols).flatten(1).to(x_NE.dtype)
    center_E = x_NE.mean(0)
    gram = design.T @ design
    gram.diagonal().add_(RIDGE)
    weight = torch.linalg.solve(gram, design.T @ (x_NE - center_E))
    return center_E + design @ weight


def _of_others(residual_NE: Tensor, group_N: Tensor, utterance_N: Tensor) -> Tensor:
    """Per frame the mean residual of its group in other utterances, shrunk to 0."""
    pair_N = (group_N * (int(utterance_N.max()) + 1) + utterance_N).unique(return_inverse=True)[1]
    sums, counts = [], []
    for index_N in (group_N, pair_N):
        size = int(index_N.max()) + 1
        total = residual_NE.new_zeros(size, residual_NE.shape[1])
        total.index_add_(0, index_N, residual_NE)
        sums.append(total[index_N])
        counts.append(torch.bincount(index_N, minlength=size)[index_N])
    others_N1 = (counts[0] - counts[1])[:, None]
    return (sums[0] - sums[1]) / (others_N1 + SHRINKAGE)
