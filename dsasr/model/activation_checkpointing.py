"""Activation checkpointing, of everything or of what is cheap to make again.

Selective checkpointing keeps what products with weights and fused attention gave and makes the rest
again in the backward pass (norms, activations, gates, dropout): no product is made twice, for about
half of the memory that keeping all takes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.utils.checkpoint as torch_checkpoint
from torch import Tensor

_aten = torch.ops.aten
PRODUCTS = [
    _aten.mm.default,
    _aten.addmm.default,
    _aten.convolution.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
]


def options(keep: bool) -> dict[str, Any]:
    """Keywords of torch's ``checkpoint``; ``keep``: the results of `PRODUCTS`."""
    if not keep:
        return {"use_reentrant": False}
    contexts = partial(torch_checkpoint.create_selective_checkpoint_contexts, PRODUCTS)
    return {"use_reentrant": False, "context_fn": contexts}


def checkpoint(run: Callable[..., Tensor], *inputs: Any, keep: bool) -> Tensor:
    """``run(*inputs)``, whose activations are made again in the backward pass."""
    return torch_checkpoint.checkpoint(run, *inputs, **options(keep))
