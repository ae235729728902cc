"""Activation checkpointing: full, or selective (recompute only what is cheap).

Selective checkpointing saves the results of matrix products, convolutions and fused attention, and
recomputes the rest in the backward pass (norms, activations, gates, dropout): no product is
computed twice, for about half of the memory that saving everything takes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.utils.checkpoint as torch_checkpoint
from torch import Tensor

from dsasr.utils.errors import UserError, message_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
    """Keyword arguments of torch's ``checkpoint``; ``keep``: save the results of `PRODUCTS`."""
    if not keep:
        return {"use_reentrant": False}
    contexts = partial(torch_checkpoint.create_selective_checkpoint_contexts, PRODUCTS)
    return {"use_reentrant": False, "context_fn": contexts}


def enable(model: PreTrainedModel, keep: bool) -> None:
    """Have transformers recompute each layer of ``model``; ``keep`` as for `options`.

    Raises `UserError` for an architecture whose layers cannot be recomputed.
    """
    # transformers is renaming it, and drops the old name in 6.
    old, new = "gradient_checkpointing_enable", "activation_checkpointing_enable"
    try:
        getattr(model, new if hasattr(model, new) else old)(options(keep))
    except ValueError as error:
        kind = model.config.model_type
        raise UserError(
            f"{kind} has no activation checkpointing in transformers ({message_of(error)}): give "
            "activation_checkpointing=false"
        ) from None


def checkpoint(run: Callable[..., Tensor], *inputs: Any, keep: bool) -> Tensor:
    """``run(*inputs)``, recomputed in the backward pass but for what ``keep`` saves."""
    return torch_checkpoint.checkpoint(run, *inputs, **options(keep))
