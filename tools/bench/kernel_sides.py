"""What `kernels.py` compares: ours, eager, torch.compile, torch's own, Liger and CCE."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from dsasr.kernels import dispatch, reference
from dsasr.kernels.adaptor import AdaptorWeights

# A side takes the inputs and returns what is differentiated: nll_N, entropies or embeddings.
Side = Callable[..., Tensor]


def eager_head(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """As a training loop has it: the loss, and the entropy for the log without its graph."""
    logits_NV = F.linear(hidden_ND, weight_VD).float()
    nll_N = F.cross_entropy(logits_NV, targets_N, reduction="none")
    with torch.no_grad():
        log_p_NV = logits_NV.log_softmax(-1)
        _entropy_N = -(log_p_NV.exp() * log_p_NV).sum(-1)
    return nll_N


def eager_loss(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden_ND, weight_VD).float(), targets_N, reduction="none")


def our_head(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *, name: str = "") -> Tensor:
    """``name`` forces an implementation."""
    if name:
        dispatch.select(name)
    nll_N, _entropy_N = dispatch.linear_cross_entropy(
        hidden_ND, weight_VD, targets_N, return_entropy=True
    )
    if name:
        dispatch.select("auto")
    return nll_N


def torch_head(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    return F.linear_cross_entropy(hidden_ND, weight_VD, targets_N, reduction="mean")


def head_sides(device: str) -> dict[str, Side]:
    sides = {"ours": our_head, "eager": eager_head, "eager_no_entropy": eager_loss}
    sides["compile"] = torch.compile(eager_head, dynamic=False)
    if hasattr(F, "linear_cross_entropy"):
        sides["torch_no_entropy"] = torch_head
    if device == "cuda":
        # Whichever of the two is faster belongs into dispatch.ON_CUDA; "ours" is what that names.
        for name in ("triton", "triton-persistent"):
            sides[f"ours_{name}"] = partial(our_head, name=name)
        sides |= _liger() | _cce()
    return sides


def _liger() -> dict[str, Side]:
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        return _missing("liger-kernel")
    loss = LigerFusedLinearCrossEntropyLoss()
    return {"liger_no_entropy": lambda hidden, weight, targets: loss(weight, hidden, targets)}


def _cce() -> dict[str, Side]:
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError:
        return _missing("cut-cross-entropy")
    # "cce" leaves out small gradients; "cce_exact" is what ours must be compared with.
    return {
        f"{name}_no_entropy": partial(linear_cross_entropy, impl="cce", filter_eps=eps)
        for name, eps in (("cce", "high"), ("cce_exact", None))
    }


def _missing(name: str) -> dict[str, Side]:
    print(f"not compared: {name} is not installed (pip install {name})", file=sys.stderr)
    return {}


def eager_entropy(logits_NV: Tensor) -> Tensor:
    log_p_NV = logits_NV.float().log_softmax(-1)
    return -(log_p_NV.exp() * log_p_NV).sum(-1)


def padded_adaptor(frames, lengths, w1, b1, w2, b2, *, stack, index, positions) -> Tensor:
    """Every frame is computed, then the valid ones are copied into the packed embeddings."""
    weights = AdaptorWeights(w1, b1, w2, b2, stack)
    padded, _ = reference.adaptor_padded(frames, lengths, weights)
    buffer = padded.new_zeros(positions, padded.shape[-1])
    return buffer.index_copy(0, index[0], padded.flatten(0, 1).index_select(0, index[1]))


def our_adaptor(frames, lengths, w1, b1, w2, b2, *, stack, index, positions, name="") -> Tensor:
    """Valid frames alone, straight into the embeddings; ``name`` forces an implementation."""
    if name:
        dispatch.select(name)
    buffer = frames.new_zeros(positions, len(w2))
    weights = AdaptorWeights(w1, b1, w2, b2, stack)
    out, _ = dispatch.adaptor(frames, lengths, weights, out_LD=buffer, index_N=index[0])
    dispatch.select("auto")
    return out


def entropy_sides(device: str) -> dict[str, Side]:
    return {
        "ours": dispatch.softmax_entropy,
        "eager": eager_entropy,
        "compile": torch.compile(eager_entropy, dynamic=False),
    }


def adaptor_sides(device: str) -> dict[str, Side]:
    sides = {"ours": our_adaptor, "eager": padded_adaptor}
    sides["compile"] = torch.compile(padded_adaptor, dynamic=False)
    if device == "cuda":  # cuBLAS on gathered frames: what the kernel has to beat
        sides["ours_torch"] = partial(our_adaptor, name="torch")
    return sides


SIDES = {
    "linear_cross_entropy": head_sides,
    "softmax_entropy": entropy_sides,
    "adaptor": adaptor_sides,
}
