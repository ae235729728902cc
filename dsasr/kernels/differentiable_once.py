"""Backward passes that refuse to be differentiated, and compute in the precision they are given."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def without_autocast(device: str) -> AbstractContextManager:
    """Autocast off on a type of device; nothing on one that has none, such as meta."""
    if not torch.amp.is_autocast_available(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def differentiable_once(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates the backward pass of ``op``, a `torch.autograd.Function`.

    Under ``create_graph=True`` it raises RuntimeError. torch's `once_differentiable` notices a
    second differentiation only where the upstream gradient needs one: with a mean's it takes the
    first gradient for a constant, and the second one is wrong without an error. Autocast is off.
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(backward)
        def run(ctx: Any, *grads: Any) -> Any:
            if torch.is_grad_enabled():
                raise RuntimeError(
                    f"{op} is differentiable once: leave out create_graph=True, or set "
                    "DSASR_KERNELS=reference"
                )
            device = next((g.device.type for g in grads if g is not None), "cpu")
            with without_autocast(device):
                return backward(ctx, *grads)

        return run

    return decorate
