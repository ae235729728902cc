"""Models filled layer by layer, so that no rank ever holds one whole.

A module is built on torch's meta device, without memory. Then each layer in turn gets real
parameters, is filled, and is handed to ``cut``, which leaves a rank its own slices (what ZeRO-3
keeps), before the next layer's turn. The main rank alone draws or reads: cutting sends what it has
to the others, as DeepSpeed does with a model that is whole on every rank.

The weights are those of a module that was built whole: one generator draws the same layers in the
same order, at any world size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from dsasr.utils import distributed

# Leaves this rank its slices of parameters, given whole: the main rank's values. Collective.
Cut = Callable[[Sequence[nn.Parameter]], None]
# Fills a layer's own parameters, of these full names.
Draw = Callable[[nn.Module, Mapping[str, nn.Parameter]], None]


def fill(module: nn.Module, draw: Draw, cut: Cut | None = None) -> None:
    """Give ``module``, built on the meta device, its weights; parameters only, on the CPU.

    Layers have their turn in the order of ``module.modules()``; a parameter that two of them share
    is drawn with the first. Parameters that are real already are left alone. With ``cut`` the most
    that a rank holds besides its slices is one layer's own parameters. Collective then.
    """
    made: dict[int, nn.Parameter] = {}
    for path, layer in module.named_modules():
        fresh: dict[str, nn.Parameter] = {}
        for name, parameter in layer._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            if id(parameter) not in made:
                real = torch.empty_like(parameter, device="cpu")
                made[id(parameter)] = nn.Parameter(real, requires_grad=parameter.requires_grad)
                fresh[f"{path}.{name}" if path else name] = made[id(parameter)]
            layer._parameters[name] = made[id(parameter)]
        if not fresh:
            continue
        if cut is None or distributed.is_main_rank():
            with torch.no_grad():
                draw(layer, fresh)
        if cut is not None:
            cut(list(fresh.values()))


def partition_all(module: nn.Module, cut: Cut) -> None:
    """Cut a module that is whole, layer by layer; collective."""
    for layer in module.modules():
        cut([p for p in layer._parameters.values() if p is not None])
