"""PAI and CSAI: V-information of encoder frames about phonemes, and about words beyond phonemes.

    PAI(E)  = H(P) − H_V(P | E)              V-information (Xu et al. 2020, arXiv 2002.10689)
    CSAI(E) = H_V(S | P) − H_V(S | P, E)     conditional (Hewitt et al. 2021, arXiv 2109.09234)

in nats per frame. E are encoder frames, P their frame-aligned phoneme, S their word or LLM token; V
are linear softmax probes (`probes`), and H_V is a probe's mean nll on held-out utterances. In CSAI
both probes see the same window of phonemes around the frame's (``window`` to each side, in the
phoneme sequence); the first sees E replaced by a constant. Without the window E would merely leak
context. High CSAI: the encoder carries meaning beyond phonemes, that is, it drifts toward text. The
metrics' names are the paper's (arXiv 2604.08003), the formulas are **ours**.

H(P) is estimated as the nll on held-out frames of the training frames' marginal. Held-out speakers
are no training speakers; with few speakers each is held out once (cross-fitting,
`probe_splits.folds`), and the estimate is the mean over all frames. Held-out frames whose phoneme,
or word, no training frame has are left out: no probe can know it. The interval resamples held-out
utterances. An interval below 0 is an underfit or overfit probe (`Estimate.underfit`), not negative
information.

Controls (`probe_controls`) are the same estimate of features that carry nothing to be found: E
``shuffled``, which should be about 0; and for CSAI ``phoneme_only``, features that show the
phonemes of the window as E does, and noise. That is not 0 (see below), and it depends on the noise:
the highest of ``phoneme_only_draws`` counts. Compare checkpoints on the same frames, labels and
seed, and with the random encoder (`reinitialized`).

PAI is a lower bound of the information in the frames: the probe is fitted to few frames, and what
it fails to learn is missing. CSAI is no bound, neither a lower nor an upper one: it is the
difference of two nlls, each above the entropy that it estimates. What the first probe fails to
learn of the context, and the second gets from E by another way, counts as gain, although it is
about phonemes; what the second fails to learn of words is missing. The first error is what
``phoneme_only`` measures. The interval is over other held-out utterances, not over other training
frames. Where validation prefers the probe without E, the estimate is exactly 0, and so is its
interval.

An interval that reaches 0, or a control, has detected nothing (`Estimate.detected` is False), which
does not prove a gain of zero. How often nothing is taken for something,
tools/experiments/csai_nulls.py measures. ``detection_limit`` then is the gain that would have been
detected (**ours**), by standard addition, the way chemists determine what an assay can detect: in a
share q of the frames a code of the label is planted beside E, which is worth q·H_V(label |
context); the limit is the least of `PLANTED_SHARES` that is detected in each of `PLANTED_DRAWS`
draws. (Half the width of the interval of a probe that detected nothing would be no such limit: a
real gain is spread unevenly over utterances, and its interval is wider.)
"""

from __future__ import annotations

import bisect
import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

from dsasr.entropy_allocation.allocation_row import Estimate
from dsasr.entropy_allocation.frame_set import FrameSet
from dsasr.entropy_allocation.probe_controls import shuffled_rows, window_mean
from dsasr.entropy_allocation.probe_splits import Split, folds
from dsasr.entropy_allocation.probes import Frames, Probe, ProbeConfig, fit, projection
from dsasr.utils import bootstrap
from dsasr.utils.errors import UserError

PLANTED_SHARES = (0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32)
PLANTED_DRAWS = 2
CODE_WIDTH = 16  # of a label's random code: enough to separate some hundreds of labels


@dataclass(frozen=True)
class VInformationConfig:
    """How PAI and CSAI are estimated; to be the same for all checkpoints that are compared.

    ``window`` phonemes to each side are CSAI's context; features wider than ``max_width`` are
    projected; at most ``max_frames`` frames are used for PAI and ``semantic_frames`` for CSAI,
    whose many labels cost more (drawn by ``seed``); the ``labels`` most frequent words or tokens
    of the training frames are distinct labels, all rarer ones are one label. ``control`` is whether
    the control of shuffled frames is measured, ``phoneme_only_draws`` how often CSAI's of phonemes
    alone is (0: without it more is found than there is). The interval is of ``level``, from
    ``draws`` bootstrap draws.

    ``folds`` as in `probe_splits.folds`: 0 is 1 with 12 speakers or more, else 4 or as many as
    there are. Probes are fitted anew for each: 4 folds cost 4 times as much as one.

    ``planted_shares`` are the shares of frames tried for the detection limit where nothing is
    detected, rising: about 6 more fits per fold for 8 of them. Without any there is no limit.
    """

    window: int = 2
    max_width: int = 1024
    max_frames: int = 200_000
    semantic_frames: int = 50_000
    labels: int = 300
    folds: int = 0
    control: bool = True
    phoneme_only_draws: int = 3
    level: float = 0.95
    draws: int = 1000
    seed: int = 0
    planted_shares: tuple[float, ...] = PLANTED_SHARES
    probe: ProbeConfig = field(default_factory=ProbeConfig)

    def __post_init__(self) -> None:
        if self.window < 0 or min(self.max_width, self.labels, self.draws) < 1:
            raise UserError("v_information: window must be ≥ 0, the other numbers ≥ 1")
        if min(self.max_frames, self.semantic_frames) < 1:
            raise UserError("v_information: max_frames and semantic_frames must be ≥ 1")
        if self.phoneme_only_draws < 0:
            raise UserError("v_information: phoneme_only_draws must be ≥ 0 (0: no such control)")
        if self.folds < 0:
            raise UserError("v_information: folds must be ≥ 0 (0: by the number of speakers)")
        shares = self.planted_shares
        if list(shares) != sorted(shares) or not all(0 < q <= 1 for q in shares):
            raise UserError("v_information: planted_shares must rise and lie in (0, 1]")
        if not 0 < self.level < 1:
            raise UserError("v_information: level must lie between 0 and 1")


def pai(data: FrameSet, config: VInformationConfig | None = None) -> Estimate:
    """Phonetic accessible information of the frames' features (see the module)."""
    config = config or VInformationConfig()
    data, splits = _prepare(data, config, config.max_frames)
    label_N, classes = data.phoneme_N, int(data.phoneme_N.max()) + 1
    tasks = [_Task(known(split, label_N), label_N, classes) for split in splits]
    return _estimate(data, data.phoneme_N, tasks, config)


def csai(data: FrameSet, config: VInformationConfig | None = None) -> Estimate:
    """Conditional semantic accessible information (see the module).

    The window is the middle of the frame set's. Raises ValueError if that is narrower.
    """
    config = config or VInformationConfig()
    middle = data.window_NK.shape[1] // 2
    if middle < config.window:
        raise ValueError(
            f"the frames have a window of {middle}, less than the {config.window} of the config"
        )
    data, splits = _prepare(data, config, config.semantic_frames)
    context_NK = data.window_NK[:, middle - config.window : middle + config.window + 1].contiguous()
    tasks = []
    for split in splits:
        label_N, classes = frequent(data.word_N, data.word_N[split.train_N], config.labels)
        tasks.append(_Task(known(split, data.word_N), label_N, classes, context_NK))
    return _estimate(data, data.word_N, tasks, config)


def _prepare(
    data: FrameSet, config: VInformationConfig, max_frames: int
) -> tuple[FrameSet, tuple[Split, ...]]:
    """Draw the frames, project wide features, split the utterances."""
    generator = torch.Generator().manual_seed(config.seed)
    if len(data) > max_frames:
        rows = torch.randperm(len(data), generator=generator)[:max_frames].sort().values
        rows = rows.to(data.x_NE.device)
        columns = (data.x_NE, data.phoneme_N, data.window_NK, data.word_N, data.utterance_N)
        data = FrameSet(*(column[rows] for column in columns), data.speakers)
    if data.x_NE.shape[1] > config.max_width:
        matrix = projection(data.x_NE.shape[1], config.max_width, seed=config.seed)
        data = data.with_features(data.x_NE.float() @ matrix.to(data.x_NE.device))
    return data, folds(data.utterance_N, data.speakers, count=config.folds, seed=config.seed)


@dataclass(frozen=True)
class _Task:
    """The task of the probes of one fold: a label [N] out of ``classes``, given its context
    [N, K]."""

    split: Split
    label_N: Tensor
    classes: int
    context_NK: Tensor | None = None


@dataclass(frozen=True)
class _Scored:
    """nll in nats, float64 [N], of one fold's held-out frames: without E (by the probe ``bare``),
    with it, with shuffled E, and [D, N] with D draws of what E shows of phonemes alone. ``won``: a
    probe that uses E won on validation."""

    bare: Probe
    before_N: np.ndarray
    after_N: np.ndarray
    shuffled_N: np.ndarray
    phoneme_only_DN: np.ndarray
    utterance_N: np.ndarray
    won: bool


def _estimate(
    data: FrameSet, label_N: Tensor, tasks: Sequence[_Task], config: VInformationConfig
) -> Estimate:
    """The estimate over all folds, with its detection limit where nothing is detected. ``label_N``
    [N] are the labels whose code is planted."""
    scored = [_score(data, task, config) for task in tasks]
    estimate = _gain(scored, tasks, config)
    shares = config.planted_shares
    if estimate.detected or not data.x_NE.shape[1] or not shares:
        return estimate

    def detected_once(share: float, draw: int) -> bool:
        planted = _planted(data, label_N, share, config.seed + draw)
        pairs = zip(tasks, scored, strict=True)
        rescored = [_score(planted, task, config, measured=fold) for task, fold in pairs]
        return _gain(rescored, tasks, config).detected

    def detected(share: float) -> bool:
        return all(detected_once(share, draw) for draw in range(PLANTED_DRAWS))

    least = bisect.bisect_left(shares, True, key=detected)
    share = shares[least] if least < len(shares) else math.inf
    return replace(estimate, detection_limit=share * estimate.entropy_before)


def _planted(data: FrameSet, label_N: Tensor, share: float, seed: int) -> FrameSet:
    """``data`` with a code of the label beside the features of a share of the frames."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(int(label_N.max()) + 1, CODE_WIDTH, generator=generator)
    shown_N1 = torch.rand(len(data), 1, generator=generator) < share
    code_NC = table[label_N.cpu()] * shown_N1
    return data.with_features(torch.cat([data.x_NE.float(), code_NC.to(data.x_NE.device)], 1))


def _score(
    data: FrameSet, task: _Task, config: VInformationConfig, measured: _Scored | None = None
) -> _Scored:
    """Fit the probes on one fold's training frames and score them on its held-out frames.

    ``measured`` is the fold of the same labels with other features: the probe without E and the
    controls are taken from it.
    """
    split, label_N, context_NK = task.split, task.label_N, task.context_NK
    symbols = 0 if context_NK is None else int(context_NK.max()) + 1

    def fitted(x_NE: Tensor, start: Probe | None) -> tuple[Probe, Frames]:
        train, valid, test = (
            Frames(x_NE[rows], label_N[rows], None if context_NK is None else context_NK[rows])
            for rows in (split.train_N, split.valid_N, split.test_N)
        )
        options = {"context_symbols": symbols, "start": start, "config": config.probe}
        return fit(train, valid, task.classes, **options), test

    def nll(probe: Probe, test: Frames) -> np.ndarray:
        return probe.nll(test).cpu().numpy()

    bare, test = fitted(data.x_NE[:, :0], measured and measured.bare)
    before_N = nll(bare, test)
    probe, test = fitted(data.x_NE, bare)
    after_N, won = nll(probe, test), probe.penalty is not None
    utterance_N = data.utterance_N[split.test_N].cpu().numpy()
    if measured is not None:
        controls = measured.shuffled_N, measured.phoneme_only_DN
        return _Scored(bare, before_N, after_N, *controls, utterance_N, won)

    def order_N(draw: int) -> Tensor:
        return shuffled_rows(split, len(data), config.seed + 1 + draw).to(data.x_NE.device)

    shuffled_N = np.full_like(after_N, math.nan)
    if config.control:
        shuffled_N = nll(*fitted(data.x_NE[order_N(0)], bare))
    phoneme_only = []
    if context_NK is not None and data.x_NE.shape[1] and config.phoneme_only_draws:
        mean_NE = window_mean(data.x_NE.float(), context_NK, data.utterance_N)
        noise_NE = data.x_NE.float() - mean_NE
        for draw in range(config.phoneme_only_draws):
            phoneme_only.append(nll(*fitted(mean_NE + noise_NE[order_N(draw)], bare)))
    phoneme_only_DN = np.stack(phoneme_only or [np.full_like(after_N, math.nan)])
    return _Scored(bare, before_N, after_N, shuffled_N, phoneme_only_DN, utterance_N, won)


def _gain(
    scored: Sequence[_Scored], tasks: Sequence[_Task], config: VInformationConfig
) -> Estimate:
    """Entropy without E minus entropy with E, on all held-out frames."""

    def every(name: str) -> np.ndarray:
        return np.concatenate([getattr(fold, name) for fold in scored], axis=-1)

    before_N, after_N, utterance_N = every("before_N"), every("after_N"), every("utterance_N")
    if not len(before_N):
        raise ValueError("no held-out frame has a label that the training frames have")
    low, high = _interval(before_N - after_N, utterance_N, config)
    return Estimate(
        value=float((before_N - after_N).mean()),
        low=low,
        high=high,
        entropy_before=float(before_N.mean()),
        entropy_after=float(after_N.mean()),
        shuffled=float(before_N.mean() - every("shuffled_N").mean()),
        phoneme_only=float(before_N.mean() - every("phoneme_only_DN").mean(1).min()),
        frames=len(before_N),
        utterances=len(np.unique(utterance_N)),
        split_by=tasks[0].split.by,
        folds=len(scored),
        folds_won=sum(fold.won for fold in scored),
    )


def _interval(
    gain_N: np.ndarray, utterance_N: np.ndarray, config: VInformationConfig
) -> tuple[float, float]:
    """Bootstrap interval of the mean per frame over whole utterances (`utils.bootstrap`)."""
    _, inverse = np.unique(utterance_N, return_inverse=True)
    sums, sizes = np.bincount(inverse, gain_N), np.bincount(inverse).astype(np.float64)
    (means,) = bootstrap.resampled_ratios([sums], sizes, config.draws, config.seed)
    return bootstrap.interval(means, sums, sizes, config.level)


def known(split: Split, label_N: Tensor) -> Split:
    """The split without the frames whose label no training frame has."""
    seen = torch.zeros(int(label_N.max()) + 1, dtype=torch.bool, device=label_N.device)
    seen[label_N[split.train_N]] = True
    valid_N, test_N = (rows[seen[label_N[rows]]] for rows in (split.valid_N, split.test_N))
    return replace(split, valid_N=valid_N, test_N=test_N)


def frequent(label_N: Tensor, train_N: Tensor, limit: int) -> tuple[Tensor, int]:
    """Renumber labels: the ``limit`` most frequent of the training labels get 0, 1, …; all others
    share one further label. Returns (labels, number of classes)."""
    values, counts = train_N.unique(return_counts=True)
    top = values[counts.argsort(descending=True, stable=True)[:limit]]
    table = torch.full(
        (int(label_N.max()) + 1,), len(top), dtype=torch.int64, device=label_N.device
    )
    table[top] = torch.arange(len(top), device=label_N.device)
    return table[label_N], len(top) + 1


def reinitialized(module: nn.Module, *, seed: int = 0) -> nn.Module:
    """A copy of an encoder with random weights: the baseline for PAI and CSAI.

    Submodules with ``reset_parameters`` are reset; other matrices are drawn from a normal
    distribution of their own standard deviation; other vectors and running statistics stay (they
    set scale, not content). The global random state does not change.
    """
    out = copy.deepcopy(module)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for part in out.modules():
            reset = getattr(part, "reset_parameters", None)
            if callable(reset):
                reset()
                continue
            for parameter in part.parameters(recurse=False):
                if parameter.ndim >= 2:
                    noise = torch.randn(parameter.shape) * float(parameter.float().std())
                    parameter.copy_(noise)
    return out.eval().requires_grad_(False)
