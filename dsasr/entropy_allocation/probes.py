"""Linear softmax probes: classifiers of frame labels on frozen features.

A probe models ln q(label | frame) = log_softmax(x W + Σ_k C_k[context_k] + b): x [N, d] features,
whitened by the training frames; context [N, K] optional discrete symbols, each with its own table
of weights (a one-hot without the zeros). Loss: mean nll in nats per frame.

Whitening (centered, each dimension to unit variance, then rotated and scaled to unit covariance;
directions below 1e-6 of the mean variance are dropped) makes the estimate invariant to invertible
linear maps of the features, and lets the descent converge whatever their correlations.

The schedule is fixed (**ours**). The bias alone comes first, in closed form: it is the training
labels' marginal. Then, if there is a context, its tables are fitted without the features; then,
from there, the features' weights together with all the rest. Each of the two walks L2 penalties
½·λ·‖·‖² from strong to weak, λ in `PENALTIES`, with at most `ITERATIONS` full-batch L-BFGS steps
each (strong Wolfe search, 10 pairs kept) from the last solution; in the second walk the tables keep
the λ that won the first. The result is the solution with the lowest nll on validation frames, that
from which the walk started included, and a walk ends once two penalties in a row make it worse. So
a probe that learns nothing from the features scores about as the one without them, not below it:
many useless features cannot hide the information of the context.

Cost: a few hundred passes over the training frames at most, 4·N·d·C operations each.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from dsasr.utils.errors import UserError

PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
ITERATIONS = 25


@dataclass(frozen=True)
class ProbeConfig:
    """The probe family; to be the same for all checkpoints that are compared."""

    penalties: tuple[float, ...] = PENALTIES
    iterations: int = ITERATIONS
    patience: int = 2
    smoothing: float = 0.5

    def __post_init__(self) -> None:
        if not self.penalties or list(self.penalties) != sorted(self.penalties, reverse=True):
            raise UserError("probe: penalties must fall, from strong to weak")
        if self.iterations < 1 or self.patience < 1 or self.smoothing <= 0:
            raise UserError("probe: iterations and patience must be ≥ 1, smoothing > 0")


@dataclass(frozen=True)
class Frames:
    """Frames to train or score on: features [N, d] (d may be 0), labels [N], context [N, K]."""

    x_ND: Tensor
    label_N: Tensor
    context_NK: Tensor | None = None

    def __len__(self) -> int:
        return len(self.label_N)


@dataclass(frozen=True)
class Probe:
    """A fitted probe. ``penalty`` and ``table_penalty`` are the λ that won for the features and for
    the context, None where zero weights did.
    """

    bias_C: Tensor
    weight_RC: Tensor
    tables_KVC: Tensor | None
    mean_D: Tensor
    whiten_DR: Tensor
    penalty: float | None
    table_penalty: float | None

    @torch.no_grad()
    def nll(self, frames: Frames) -> Tensor:
        """−ln q(label | frame) in nats, float64 [N]."""
        x = (frames.x_ND.float() - self.mean_D) @ self.whiten_DR
        parts = []
        for start in range(0, len(frames), 65536):
            rows = slice(start, start + 65536)
            context = None if frames.context_NK is None else frames.context_NK[rows]
            logits = _logits(x[rows], context, self.weight_RC, self.tables_KVC, self.bias_C)
            parts.append(F.cross_entropy(logits, frames.label_N[rows], reduction="none").double())
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def fit(
    train: Frames,
    valid: Frames,
    classes: int,
    *,
    context_symbols: int = 0,
    start: Probe | None = None,
    config: ProbeConfig | None = None,
) -> Probe:
    """Fit a probe of ``classes`` outcomes on ``train``, its penalties chosen on ``valid``.

    ``context_symbols`` is the number of symbols that a context may have. ``start`` is a probe of
    the same frames' context without features, if it is already fitted. Float32 on the features'
    device. Raises ValueError without frames on either side.
    """
    config = config or ProbeConfig()
    if not len(train) or not len(valid):
        raise ValueError(f"a probe needs frames: {len(train)} to train, {len(valid)} to validate")
    none = train.x_ND[:, :0]
    if start is None:
        start = _marginal(train, classes, context_symbols, config)
        if train.context_NK is not None:
            bare = [Frames(s.x_ND[:, :0], s.label_N, s.context_NK) for s in (train, valid)]
            start = _walk(none, *bare, start, config, features=False)
    if not train.x_ND.shape[1]:
        return start
    mean_D, whiten_DR = _whitener(train.x_ND)
    weight_RC = torch.zeros(whiten_DR.shape[1], classes, device=train.x_ND.device)
    start = replace(start, weight_RC=weight_RC, mean_D=mean_D, whiten_DR=whiten_DR)
    x_NR = (train.x_ND.float() - mean_D) @ whiten_DR
    return _walk(x_NR, train, valid, start, config, features=True)


def _marginal(train: Frames, classes: int, symbols: int, config: ProbeConfig) -> Probe:
    """The bias alone: smoothed shares of the labels; tables of zeros if there is a context."""
    device = train.x_ND.device
    counts_C = torch.bincount(train.label_N, minlength=classes).float() + config.smoothing
    tables_KVC = None
    if train.context_NK is not None:
        tables_KVC = torch.zeros(train.context_NK.shape[1], symbols, classes, device=device)
    return Probe(
        bias_C=(counts_C / counts_C.sum()).log(),
        weight_RC=torch.zeros(0, classes, device=device),
        tables_KVC=tables_KVC,
        mean_D=torch.zeros(0, device=device),
        whiten_DR=torch.zeros(0, 0, device=device),
        penalty=None,
        table_penalty=None,
    )


def _walk(
    x_NR: Tensor, train: Frames, valid: Frames, start: Probe, config: ProbeConfig, *, features: bool
) -> Probe:
    """From strong to weak penalties on the features' weights, or else on the tables."""
    best, best_nll = start, float(start.nll(valid).mean())
    current, worse = start, 0
    for penalty in config.penalties:
        if features:
            tables = config.penalties[0] if start.table_penalty is None else start.table_penalty
            current = replace(current, penalty=penalty, table_penalty=tables)
        else:
            current = replace(current, table_penalty=penalty)
        current = _descend(x_NR, train, current, config.iterations)
        nll = float(current.nll(valid).mean())
        if nll < best_nll:
            best, best_nll, worse = current, nll, 0
        else:
            worse += 1
            if worse >= config.patience:
                break
    return best


def _descend(x_NR: Tensor, train: Frames, start: Probe, iterations: int) -> Probe:
    """L-BFGS from a solution, with its penalties. ``x_NR`` is whitened."""
    bias_C = start.bias_C.clone().requires_grad_()
    weight_RC = start.weight_RC.clone().requires_grad_()
    penalized = [(weight_RC, start.penalty)] if weight_RC.numel() else []
    tables_KVC = None
    if start.tables_KVC is not None:
        tables_KVC = start.tables_KVC.clone().requires_grad_()
        penalized.append((tables_KVC, start.table_penalty))
    optimizer = torch.optim.LBFGS(
        [bias_C, *(parameter for parameter, _ in penalized)],
        max_iter=iterations,
        max_eval=2 * iterations,
        history_size=10,
        tolerance_grad=1e-6,
        tolerance_change=1e-6,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = _logits(x_NR, train.context_NK, weight_RC, tables_KVC, bias_C)
        loss = F.cross_entropy(logits, train.label_N)
        loss = loss + sum(0.5 * p.square().sum() * penalty for p, penalty in penalized)
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return replace(
        start,
        bias_C=bias_C.detach(),
        weight_RC=weight_RC.detach(),
        tables_KVC=None if tables_KVC is None else tables_KVC.detach(),
    )


def _logits(
    x_NR: Tensor,
    context_NK: Tensor | None,
    weight_RC: Tensor,
    tables_KVC: Tensor | None,
    bias_C: Tensor,
) -> Tensor:
    logits = torch.addmm(bias_C, x_NR, weight_RC)
    if tables_KVC is not None and context_NK is not None:
        slots, symbols, classes = tables_KVC.shape
        offsets_K = torch.arange(slots, device=context_NK.device) * symbols
        flat = tables_KVC.reshape(slots * symbols, classes)
        logits = logits + F.embedding_bag(context_NK + offsets_K, flat, mode="sum")
    return logits


def _whitener(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [d] and the map [d, r] that whitens centered frames; r ≤ d, constants are dropped."""
    if not x_ND.shape[1]:
        return torch.zeros(0, device=x_ND.device), torch.zeros(0, 0, device=x_ND.device)
    chunks = x_ND.split(65536)
    mean_D = sum(chunk.double().sum(0) for chunk in chunks) / len(x_ND)
    covariance = sum((c := chunk.double() - mean_D).T @ c for chunk in chunks) / len(x_ND)
    std_D = covariance.diagonal().sqrt()
    alive = std_D > 1e-6 * (mean_D.abs() + 1e-12)
    scale_D = torch.where(alive, 1 / std_D.clamp(min=1e-30), torch.zeros_like(std_D))
    values, vectors = torch.linalg.eigh(covariance * torch.outer(scale_D, scale_D))
    significant = values > 1e-6
    whiten_DR = scale_D[:, None] * vectors[:, significant] / values[significant].sqrt()
    return mean_D.float(), whiten_DR.float()


def projection(d: int, width: int, *, seed: int = 0) -> Tensor:
    """The Gaussian projection [d, width] / √width that every checkpoint of width d shares.

    Drawn on the CPU from the seed, so that it does not depend on the device. By the lemma of
    Johnson and Lindenstrauss it preserves distances; its use for probes is **ours**.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(d, width, generator=generator) / width**0.5
