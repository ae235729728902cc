"""Fused ops: the LM head with cross-entropy and entropy, softmax entropy, the adaptor.

Each op has these implementations of the same function:

    triton              kernels for a GPU (or, under TRITON_INTERPRET=1, for tests on a CPU)
    triton-persistent   the same, but for the head: a product of our own that keeps its statistics
                        and not its logits (`triton_head_statistics`); not timed on any GPU
    torch               torch operations in tiles, as frugal with memory, on any device
    reference           plain torch, whole tensors (`dsasr.kernels.reference`)

``auto`` takes `ON_CUDA` on CUDA and torch elsewhere (and for float64). The choice is made once per
op and device, and logged. The environment variable DSASR_KERNELS forces one for all ops, else
`select` does (the recipe's ``kernels``). A kernel that fails is an error: nothing falls back.
Importing this module does not import Triton.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from dsasr.kernels import adaptor as adaptor_op
from dsasr.kernels import linear_cross_entropy as cross_entropy_op
from dsasr.kernels import reference, torch_logit_tiles
from dsasr.kernels import softmax_entropy as entropy_op
from dsasr.kernels.adaptor import ACTIVATIONS, AdaptorWeights
from dsasr.kernels.differentiable_once import without_autocast
from dsasr.kernels.kernel_launch import KernelError as KernelError
from dsasr.utils.errors import UserError

NAMES = ("auto", "triton", "triton-persistent", "torch", "reference")
# What "auto" takes on CUDA: the faster of the two by tools/bench/kernels.py, which no GPU has run.
ON_CUDA = "triton"
_log = logging.getLogger(__name__)
_selected = "auto"
_implementations: dict[tuple[str, str, str, str], str] = {}


def select(name: str) -> None:
    """Choose the implementation of all ops in this process; DSASR_KERNELS, if set, outranks it.

    Raises `UserError` for a name that is none of `NAMES`.
    """
    global _selected
    _selected = _checked(name, "kernels")
    _implementations.clear()


def implementation(op: str, device: torch.device | str, dtype: torch.dtype = torch.float32) -> str:
    """The implementation of ``op`` for tensors of a device: one of `NAMES`, but "auto"."""
    kind = torch.device(device).type
    requested = _checked(os.environ.get("DSASR_KERNELS") or _selected, "DSASR_KERNELS")
    key = op, kind, str(dtype), requested
    if key not in _implementations:
        _implementations[key] = _resolve(op, requested, kind, dtype)
        _log.info("%s on %s (%s): %s", op, kind, dtype, _implementations[key])
    return _implementations[key]


def _checked(name: str, origin: str) -> str:
    if name not in NAMES:
        raise UserError(f"{origin}={name!r}: choose one of {', '.join(NAMES)}")
    return name


def _resolve(op: str, requested: str, kind: str, dtype: torch.dtype) -> str:
    # The kernels compute in float32.
    if requested == "auto":
        requested = ON_CUDA if kind == "cuda" and dtype != torch.float64 else "torch"
    if not requested.startswith("triton"):
        return requested
    if dtype == torch.float64:
        raise UserError("the Triton kernels take no float64: set DSASR_KERNELS=torch")
    if importlib.util.find_spec("triton") is None:
        raise UserError("Triton is not installed: pip install triton, or set DSASR_KERNELS=torch")
    if kind != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError(f"the Triton kernels do not run on {kind}: set DSASR_KERNELS=torch")
    return requested if op == "linear_cross_entropy" else "triton"


def _logit_tiles(name: str) -> ModuleType:
    if name == "torch":
        return torch_logit_tiles
    from dsasr.kernels import triton_logit_tiles

    return triton_logit_tiles


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    ignore_index: int = -100,
    bias_V: Tensor | None = None,
    soft_cap: float | None = None,
    label_smoothing: float = 0.0,
    return_entropy: bool = False,
    return_accuracy: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Cross-entropy of softmax(hidden · weightᵀ + bias) per row, without the [N, V] logits.

    Returns nll_N; with ``return_entropy`` or ``return_accuracy`` a tuple that begins with it,
    followed by entropy_N and then by correct_N, each if requested:

        nll = (1 − ε) (ln Z − z_target) + ε (ln Z − mean z)     ε: ``label_smoothing``
        entropy = −Σ p ln p                                      of p = softmax(z), unsmoothed
        correct (bool): no logit of the row is above its target's, greedy prediction is right

    with z soft-capped to ``soft_cap`` · tanh(z / ``soft_cap``) if given. nll and entropy are in
    nats, float32 (float64 for float64 inputs). Rows whose target is ``ignore_index`` are 0 and
    False. Both are differentiable once (RuntimeError under create_graph=True), with any upstream
    gradient per row: ∂nll/∂z = p − (1 − ε) [target] − ε/V, and ∂entropy/∂z = −p (ln p + entropy).
    Fastest is that of a sum, one number for all rows: divide a sum by N, a mean has N numbers.
    Autocast does not apply.

    Ignored rows cost as much as others: pass only rows that have a target. Raises ValueError for
    shapes and dtypes that do not fit, IndexError for a target outside the vocabulary (on the CPU).
    """
    _check_cross_entropy(hidden_ND, weight_VD, targets_N, bias_V, ignore_index)
    if (soft_cap or 0) < 0 or not 0 <= label_smoothing < 1:
        raise ValueError(f"soft_cap {soft_cap} or label_smoothing {label_smoothing} out of range")
    hidden_ND = hidden_ND.to(weight_VD.dtype)
    name = implementation("linear_cross_entropy", hidden_ND.device, hidden_ND.dtype)
    run = reference.linear_cross_entropy
    if name != "reference":
        persistent = name == "triton-persistent"
        run = partial(cross_entropy_op.run, _logit_tiles(name), persistent=persistent)
    with without_autocast(hidden_ND.device.type):
        return run(
            hidden_ND,
            weight_VD,
            targets_N,
            ignore_index=ignore_index,
            bias_V=bias_V,
            soft_cap=soft_cap,
            label_smoothing=label_smoothing,
            return_entropy=return_entropy,
            return_accuracy=return_accuracy,
        )


def _check_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    bias_V: Tensor | None,
    ignore_index: int,
) -> None:
    shapes = [tuple(x.shape) for x in (hidden_ND, weight_VD, targets_N)]
    fits = hidden_ND.ndim == 2 and weight_VD.ndim == 2 and targets_N.ndim == 1
    fits = fits and shapes[0] == (len(targets_N), shapes[1][1]) and shapes[1][0] > 0
    if not fits or (bias_V is not None and bias_V.shape != (shapes[1][0],)):
        raise ValueError(
            f"hidden {shapes[0]}, weight {shapes[1]}, targets {shapes[2]}"
            f"{'' if bias_V is None else f', bias {tuple(bias_V.shape)}'}:"
            " need [N, D], [V, D], [N], [V] (an empty weight is one that ZeRO-3 has not gathered)"
        )
    if not weight_VD.is_floating_point() or targets_N.is_floating_point():
        raise ValueError(f"weight is {weight_VD.dtype}, targets {targets_N.dtype}")
    if targets_N.device.type == "cpu" and len(targets_N):
        low, high = targets_N.aminmax()
        if low < 0 or high >= shapes[1][0]:
            outside_N = (targets_N < 0) | (targets_N >= shapes[1][0])
            if (outside_N & (targets_N != ignore_index)).any():
                raise IndexError(f"a target is outside the vocabulary of {shapes[1][0]}")


def softmax_entropy(logits: Tensor) -> Tensor:
    """−Σ p ln p of p = softmax(logits) over the last axis: [..., V] → [...], in nats.

    float32 (float64 for float64). Entries of −inf add nothing; a row of them alone is NaN.
    Differentiable once.
    """
    if logits.ndim == 0 or not logits.shape[-1] or not logits.is_floating_point():
        raise ValueError(
            f"logits {tuple(logits.shape)} {logits.dtype}: need floats [..., V], V > 0"
        )
    name = implementation("softmax_entropy", logits.device, logits.dtype)
    if name == "reference":
        return reference.softmax_entropy(logits)
    return entropy_op.run(_logit_tiles(name), logits)


def adaptor(
    frames_BSE: Tensor,
    lengths_B: Tensor,
    weights: AdaptorWeights,
    *,
    out_LD: Tensor | None = None,
    index_N: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Stack frames and run two linear layers over the valid ones: (packed [N, D], lengths_B).

    Utterance b has ceil(lengths_B[b] / stack) embeddings, N in all, in utterance order; the
    frames that a partial last stack lacks count as zeros. Padded frames are not read and not
    computed, and get zero gradients.

    With ``out_LD`` the embeddings are written to its rows ``index_N`` (distinct) in place, and
    ``out_LD`` is returned, in the autograd graph, instead of the packed embeddings.

    N comes from the lengths: with ``lengths_B`` on the CPU the host does not wait for a GPU.
    Raises ValueError for shapes and options that do not fit.
    """
    _check_adaptor(frames_BSE, lengths_B, weights)
    if (out_LD is None) != (index_N is None):
        raise ValueError("out_LD and index_N belong together")
    width = len(weights.w2_DH)
    if out_LD is not None and (out_LD.ndim != 2 or out_LD.shape[1] != width):
        raise ValueError(f"out_LD {tuple(out_LD.shape)}: need [L, {width}]")
    name = implementation("adaptor", frames_BSE.device, frames_BSE.dtype)
    run = {"reference": reference.adaptor, "torch": adaptor_op.run}.get(name)
    if run is None:
        from dsasr.kernels import triton_adaptor

        run = triton_adaptor.run
    return run(frames_BSE, lengths_B, weights, out_LD=out_LD, index_N=index_N)


def _check_adaptor(frames_BSE: Tensor, lengths_B: Tensor, weights: AdaptorWeights) -> None:
    stack, activation = weights.stack, weights.activation
    shapes = [tuple(x.shape) for x in (frames_BSE, lengths_B, weights.w1_HK, weights.w2_DH)]
    fits = [len(shape) for shape in shapes] == [3, 1, 2, 2] and stack >= 1
    fits = fits and shapes[1][0] == shapes[0][0]
    if not fits or shapes[2][1] != stack * shapes[0][2] or shapes[3][1] != shapes[2][0]:
        raise ValueError(
            f"frames {shapes[0]}, lengths {shapes[1]}, w1 {shapes[2]}, w2 {shapes[3]}, stack"
            f" {stack}: need [B, S, E], [B], [H, stack * E], [D, H]"
        )
    if lengths_B.device.type == "cpu" and len(lengths_B):
        low, high = lengths_B.aminmax()
        if low < 0 or high > shapes[0][1]:
            raise ValueError(f"lengths from {low} to {high} for {shapes[0][1]} frames")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r}: choose one of {', '.join(ACTIVATIONS)}")
