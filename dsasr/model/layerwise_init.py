"""Layer-by-layer initialization, so that no rank ever has a whole model in memory.

A module is built on torch's meta device, without memory. Then each layer in turn gets parameters
with memory, which are filled and partitioned (each rank keeps its slices, as under ZeRO-3) before
the next layer's turn. The main rank alone draws or reads values: partitioning broadcasts them, as
DeepSpeed does with a model that is whole on every rank.

The weights equal those of a module that was built whole: one generator draws the same layers in the
same order, at any world size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from dsasr.utils import distributed

# Reduces whole parameters to this rank's slices of the main rank's values. Collective.
Partition = Callable[[Sequence[nn.Parameter]], None]
# Fills a layer's own parameters, which are also given by their full names.
FillLayer = Callable[[nn.Module, Mapping[str, nn.Parameter]], None]


def materialize(
    module: nn.Module, fill_layer: FillLayer, partition: Partition | None = None
) -> None:
    """Give ``module``, built on the meta device, its parameters on the CPU; buffers stay on meta.

    Layers have their turn in the order of ``module.modules()``; a parameter that two of them share
    is filled with the first. Parameters that are not on the meta device are left alone. With
    ``partition``, which makes the call collective, a rank has at most one layer's own parameters in
    memory besides its slices.
    """
    materialized: dict[int, nn.Parameter] = {}
    for path, layer in module.named_modules():
        layer_parameters: dict[str, nn.Parameter] = {}
        for name, parameter in layer._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            if id(parameter) not in materialized:
                materialized[id(parameter)] = nn.Parameter(
                    torch.empty_like(parameter, device="cpu"),
                    requires_grad=parameter.requires_grad,
                )
                full_name = f"{path}.{name}" if path else name
                layer_parameters[full_name] = materialized[id(parameter)]
            layer._parameters[name] = materialized[id(parameter)]
        if not layer_parameters:
            continue
        if partition is None or distributed.is_main_rank():
            with torch.no_grad():
                fill_layer(layer, layer_parameters)
        if partition is not None:
            partition(list(layer_parameters.values()))


def partition_all(module: nn.Module, partition: Partition) -> None:
    """Partition a module that is whole, layer by layer; collective."""
    for layer in module.modules():
        partition([p for p in layer._parameters.values() if p is not None])


def full_shape(parameter: Tensor) -> tuple[int, ...]:
    """The shape of a parameter, also while ZeRO-3 has partitioned it, or of a buffer."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
