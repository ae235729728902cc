"""Random weights of layers, by torch's rules, from a generator of one's own."""

from __future__ import annotations

import math

import torch
from torch import nn

from dsasr.model.encoders.depthwise_conv import DepthwiseConv


class ResidualLinear(nn.Linear):
    """The last layer of one of a stack's N residual branches.

    Initialized with 1/N of PyTorch's default bound: the sum of N independent branches then has 1/√N
    of the standard deviation of one default branch.
    """

    def __init__(self, inputs: int, outputs: int, branches: int):
        super().__init__(inputs, outputs)
        self.branches = branches
        reset_layer(self)


def reset_parameters(module: nn.Module, generator: torch.Generator | None = None) -> None:
    """Draw the weights of every layer inside ``module`` as torch does, from ``generator``."""
    for layer in module.modules():
        reset_layer(layer, generator)


def reset_layer(layer: nn.Module, generator: torch.Generator | None = None) -> None:
    """Draw the layer's own weights, not those of layers inside it."""
    if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d):
        bound = 1 / math.sqrt(layer.weight[0].numel())
        if isinstance(layer, ResidualLinear):
            bound /= layer.branches
        nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
        if layer.bias is not None:
            nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
    elif isinstance(layer, nn.LayerNorm):
        nn.init.ones_(layer.weight)
        nn.init.zeros_(layer.bias)
    elif isinstance(layer, DepthwiseConv):
        layer.reset_parameters(generator)
