"""PAI and CSAI: what a linear reader gets from encoder frames about phonemes, and beyond them.

    PAI(E)  = H(P) − H_V(P | E)              V-information (Xu et al. 2020, arXiv 2002.10689)
    CSAI(E) = H_V(S | P) − H_V(S | P, E)     conditional (Hewitt et al. 2021, arXiv 2109.09234)

in nats per frame. E are encoder frames, P their frame-aligned phoneme, S their word or LLM token; V
are linear softmax probes (`probes`), and H_V is a probe's mean nll on held-out utterances. In CSAI
both probes see the same window of phonemes around the frame's (``window`` to each side, in the
phoneme sequence); the first sees E replaced by a constant. Without the window E would merely leak
context. High CSAI: the encoder carries meaning beyond phonemes, that is, it drifts toward text. The
metrics' names are the paper's (arXiv 2604.08003), the formulas are ours (method page).

H(P) is estimated as the nll on held-out frames of the training frames' marginal. Held-out speakers
are no training speakers; with few speakers each is held out once (cross-fitting, `splits.folds`),
and the estimate is the mean over all frames. The interval resamples held-out utterances. The
control ``shuffled`` is the same estimate with the rows of E permuted within each part, which unties
them from the labels and keeps both distributions: it should be about 0. A negative value is an
underfit or overfit probe (``sound`` is False), not negative information. Compare checkpoints on the
same frames, labels and seed, and with the random encoder (`reinitialised`).

Where validation prefers the probe without E, the estimate is exactly 0, and so is its interval.
That is no certain zero: ``limit`` says what would have stood out (ours). It is half the width of
the interval of the best probe that does use E: a gain below it could not be told from none.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from dsasr.allocation.probes import Frames, Probe, ProbeConfig, fit, projection
from dsasr.allocation.splits import Split, folds
from dsasr.errors import UserError


@dataclass(frozen=True)
class AccessibleConfig:
    """How PAI and CSAI are estimated; to be the same for all checkpoints that are compared.

    ``window`` phonemes to each side are CSAI's context; features wider than ``max_width`` are
    projected; at most ``max_frames`` frames are used for PAI and ``semantic_frames`` for CSAI,
    whose many labels cost more (drawn by ``seed``); the ``labels`` most frequent words or tokens
    of the training frames are told apart, rarer ones are one label.

    ``folds`` as in `splits.folds`: 0 takes 1 with 12 speakers or more, else 4 or as many as there
    are. Probes are fitted anew for each: 4 folds cost 4 times the one, in which 65% of the frames
    train too.
    """

    window: int = 2
    max_width: int = 1024
    max_frames: int = 200_000
    semantic_frames: int = 50_000
    labels: int = 300
    folds: int = 0
    control: bool = True
    level: float = 0.95
    draws: int = 1000
    seed: int = 0
    probe: ProbeConfig = field(default_factory=ProbeConfig)

    def __post_init__(self) -> None:
        if self.window < 0 or min(self.max_width, self.labels, self.draws) < 1:
            raise UserError("accessible: window must be ≥ 0, the other numbers ≥ 1")
        if min(self.max_frames, self.semantic_frames) < 1:
            raise UserError("accessible: max_frames and semantic_frames must be ≥ 1")
        if self.folds < 0:
            raise UserError("accessible: folds must be ≥ 0 (0: by the number of speakers)")
        if not 0 < self.level < 1:
            raise UserError("accessible: level must lie between 0 and 1")


@dataclass(frozen=True)
class Accessible:
    """An estimate in nats per frame with its bootstrap interval.

    ``given`` is the entropy before E (H(P), or H_V(S | P)), ``left`` the entropy after it,
    ``share`` = value / given. ``split`` is ``"speaker"`` where held-out speakers are new.
    ``shuffled`` is NaN if the control was left out. ``limit``: the gain that would have stood out
    (the module's text), NaN if no probe could use E. ``wins`` of ``folds`` is in how many of them a
    probe that uses E won on validation.
    """

    value: float
    low: float
    high: float
    given: float
    left: float
    shuffled: float
    frames: int
    utterances: int
    split: str
    limit: float = math.nan
    folds: int = 1
    wins: int = 1

    @property
    def found(self) -> bool:
        """False where the probe without E won in all folds: the value is 0 by decision."""
        return self.wins > 0

    @property
    def share(self) -> float:
        return self.value / self.given if self.given else math.nan

    @property
    def sound(self) -> bool:
        """False for a negative estimate, which only says that the probe failed."""
        return self.value >= 0


@dataclass(frozen=True)
class FrameSet:
    """Labelled frames of a probe set, on one device.

    x_NE float; phoneme_N int64 ids; window_NK int64, column K//2 being the frame's own phoneme;
    word_N int64 ids of words or LLM tokens; utterance_N int64 into ``speakers``.
    """

    x_NE: Tensor
    phoneme_N: Tensor
    window_NK: Tensor
    word_N: Tensor
    utterance_N: Tensor
    speakers: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.phoneme_N)

    def with_features(self, x_NE: Tensor) -> FrameSet:
        """The same frames and labels seen by another encoder. Raises ValueError on other N."""
        if len(x_NE) != len(self):
            raise ValueError(f"{len(x_NE)} frames of features for {len(self)} labelled frames")
        rest = (self.phoneme_N, self.window_NK, self.word_N, self.utterance_N, self.speakers)
        return FrameSet(x_NE, *rest)


class FrameSetBuilder:
    """Collects utterances into a `FrameSet`; frames in silence are left out (they have no P)."""

    def __init__(self, window: int = 2) -> None:
        self.window = window
        self.parts: list[tuple[Tensor, ...]] = []
        self.speakers: list[str] = []

    def add(
        self,
        x_SE: Tensor,
        positions_S: Tensor,
        phonemes: Sequence[int],
        words_S: Tensor,
        speaker: str,
    ) -> None:
        """One utterance: frames, the place of each in ``phonemes`` (−1: silence) and its word id.

        Frames without a word (−1) are left out as well. Raises ValueError on other lengths.
        """
        if not len(x_SE) == len(positions_S) == len(words_S):
            raise ValueError(
                f"{len(x_SE)} frames, {len(positions_S)} positions, {len(words_S)} words"
            )
        keep = (positions_S >= 0) & (words_S >= 0)
        window_SK = phoneme_window(positions_S[keep], phonemes, self.window)
        utterance = torch.full((int(keep.sum()),), len(self.speakers), dtype=torch.int64)
        phoneme_S = window_SK[:, self.window]
        x = x_SE.detach()[keep.to(x_SE.device)]
        self.parts.append((x, phoneme_S, window_SK, words_S[keep], utterance))
        self.speakers.append(speaker)

    def build(self) -> FrameSet:
        """All that was added, on the features' device. Raises ValueError if that is nothing."""
        if not self.parts:
            raise ValueError("no utterance was added")
        columns = [torch.cat(column) for column in zip(*self.parts, strict=True)]
        device = columns[0].device
        return FrameSet(*(column.to(device) for column in columns), tuple(self.speakers))


def phoneme_window(positions_N: Tensor, phonemes: Sequence[int], window: int) -> Tensor:
    """Phoneme ids [N, 2·window + 1] around each place; 0 (the blank's id) beyond either end."""
    padded = torch.tensor([0] * window + list(phonemes) + [0] * window, dtype=torch.int64)
    offsets_K = torch.arange(2 * window + 1)
    return padded[positions_N.cpu()[:, None] + offsets_K]


def pai(data: FrameSet, config: AccessibleConfig | None = None) -> Accessible:
    """Phonetic accessible information of the frames' features (see the module's text)."""
    config = config or AccessibleConfig()
    data, parted = _prepare(data, config, config.max_frames)
    label_N, classes = data.phoneme_N, int(data.phoneme_N.max()) + 1
    scored = [_score(data, parts, label_N, classes, None, config) for parts in parted]
    return _gain(scored, parted, config)


def csai(data: FrameSet, config: AccessibleConfig | None = None) -> Accessible:
    """Conditional semantic accessible information (see the module's text).

    The window is the middle of the frame set's. Raises ValueError if that one is narrower.
    """
    config = config or AccessibleConfig()
    middle = data.window_NK.shape[1] // 2
    if middle < config.window:
        raise ValueError(f"the frames hold a window of {middle}, {config.window} is asked for")
    data, parted = _prepare(data, config, config.semantic_frames)
    context_NK = data.window_NK[:, middle - config.window : middle + config.window + 1].contiguous()
    scored = []
    for parts in parted:
        label_N, classes = frequent(data.word_N, data.word_N[parts.train_N], config.labels)
        scored.append(_score(data, parts, label_N, classes, context_NK, config))
    return _gain(scored, parted, config)


def _prepare(
    data: FrameSet, config: AccessibleConfig, most: int
) -> tuple[FrameSet, tuple[Split, ...]]:
    """Draw the frames, project wide features, part the utterances."""
    generator = torch.Generator().manual_seed(config.seed)
    if len(data) > most:
        rows = torch.randperm(len(data), generator=generator)[:most].sort().values
        rows = rows.to(data.x_NE.device)
        columns = (data.x_NE, data.phoneme_N, data.window_NK, data.word_N, data.utterance_N)
        data = FrameSet(*(column[rows] for column in columns), data.speakers)
    if data.x_NE.shape[1] > config.max_width:
        matrix = projection(data.x_NE.shape[1], config.max_width, seed=config.seed)
        data = data.with_features(data.x_NE.float() @ matrix.to(data.x_NE.device))
    return data, folds(data.utterance_N, data.speakers, count=config.folds, seed=config.seed)


@dataclass(frozen=True)
class _Scored:
    """nll in nats, float64 [N], of one fold's held-out frames: without E, with it, of the best
    probe that uses it, of the control. ``won``: a probe that uses E won on validation."""

    before_N: np.ndarray
    after_N: np.ndarray
    tried_N: np.ndarray
    control_N: np.ndarray
    utterance_N: np.ndarray
    won: bool


def _score(
    data: FrameSet,
    parts: Split,
    label_N: Tensor,
    classes: int,
    context_NK: Tensor | None,
    config: AccessibleConfig,
) -> _Scored:
    """Fit the probes on one fold's training frames and score them on its held-out frames."""
    symbols = 0 if context_NK is None else int(context_NK.max()) + 1

    def fitted(x_NE: Tensor, start: Probe | None) -> tuple[Probe, Frames]:
        train, valid, test = (
            Frames(x_NE[rows], label_N[rows], None if context_NK is None else context_NK[rows])
            for rows in (parts.train_N, parts.valid_N, parts.test_N)
        )
        given = {"context_symbols": symbols, "start": start, "config": config.probe}
        return fit(train, valid, classes, **given), test

    def nll(probe: Probe, test: Frames) -> np.ndarray:
        return probe.nll(test).cpu().numpy()

    bare, test = fitted(data.x_NE[:, :0], None)
    before_N = nll(bare, test)
    probe, test = fitted(data.x_NE, bare)
    after_N, won = nll(probe, test), probe.penalty is not None
    tried_N = after_N if won else np.full_like(after_N, math.nan)
    if not won and probe.tried is not None:
        tried_N = nll(probe.tried, test)
    control_N = np.full_like(after_N, math.nan)
    if config.control:
        order_N = _untied(parts, len(data), config.seed + 1)
        control_N = nll(*fitted(data.x_NE[order_N.to(data.x_NE.device)], bare))
    utterance_N = data.utterance_N[parts.test_N].cpu().numpy()
    return _Scored(before_N, after_N, tried_N, control_N, utterance_N, won)


def _untied(parts: Split, frames: int, seed: int) -> Tensor:
    """Rows in an order drawn within each part, so that no row of one part is seen in another."""
    order_N = torch.arange(frames)
    generator = torch.Generator().manual_seed(seed)
    for rows in (parts.train_N.cpu(), parts.valid_N.cpu(), parts.test_N.cpu()):
        order_N[rows] = rows[torch.randperm(len(rows), generator=generator)]
    return order_N


def _gain(
    scored: Sequence[_Scored], parted: Sequence[Split], config: AccessibleConfig
) -> Accessible:
    """Entropy without E minus entropy with E, on all held-out frames."""

    def every(name: str) -> np.ndarray:
        return np.concatenate([getattr(one, name) for one in scored])

    before_N, after_N, utterance_N = every("before_N"), every("after_N"), every("utterance_N")
    low, high = _interval(before_N - after_N, utterance_N, config)
    tried_low, tried_high = _interval(before_N - every("tried_N"), utterance_N, config)
    return Accessible(
        value=float((before_N - after_N).mean()),
        low=low,
        high=high,
        given=float(before_N.mean()),
        left=float(after_N.mean()),
        shuffled=float(before_N.mean() - every("control_N").mean()),
        frames=len(before_N),
        utterances=len(np.unique(utterance_N)),
        split=parted[0].by,
        limit=(tried_high - tried_low) / 2,
        folds=len(scored),
        wins=sum(one.won for one in scored),
    )


def _interval(
    gain_N: np.ndarray, utterance_N: np.ndarray, config: AccessibleConfig
) -> tuple[float, float]:
    """Percentile bootstrap of the mean per frame over whole utterances."""
    _, inverse = np.unique(utterance_N, return_inverse=True)
    sums, sizes = np.bincount(inverse, gain_N), np.bincount(inverse)
    rng = np.random.default_rng(config.seed)
    means = []
    for _ in range(config.draws):
        picks = rng.integers(0, len(sums), len(sums))
        means.append(sums[picks].sum() / sizes[picks].sum())
    low, high = np.quantile(means, [(1 - config.level) / 2, (1 + config.level) / 2])
    return float(low), float(high)


def frequent(label_N: Tensor, train_N: Tensor, limit: int) -> tuple[Tensor, int]:
    """Renumber labels: the ``limit`` most frequent of the training labels get 0, 1, …; all others
    share one further label. Returns (labels, number of classes)."""
    values, counts = train_N.unique(return_counts=True)
    kept = values[counts.argsort(descending=True, stable=True)[:limit]]
    table = torch.full(
        (int(label_N.max()) + 1,), len(kept), dtype=torch.int64, device=label_N.device
    )
    table[kept] = torch.arange(len(kept), device=label_N.device)
    return table[label_N], len(kept) + 1


def reinitialised(module: nn.Module, *, seed: int = 0) -> nn.Module:
    """A copy of an encoder with random weights: the baseline for PAI and CSAI.

    Submodules with ``reset_parameters`` are reset; other matrices are drawn normal at their own
    standard deviation; other vectors and running statistics stay (they set scale, not content). The
    global random state is left as it was.
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
