"""ZeRO-3's partitioning of a model's layers, one at a time."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from dsasr.engine.config import EngineConfig, deepspeed_settings, precision
from dsasr.model.layerwise_init import Partition
from dsasr.utils import distributed


@functools.lru_cache(maxsize=1)
def partitioner(config: EngineConfig) -> Partition | None:
    """ZeRO-3's partitioning of a model's layers (`dsasr.model.layerwise_init`); None under ZeRO-1
    and 2.

    Parameters are partitioned and broadcast from rank 0 as by `deepspeed.initialize`, but one layer
    at a time, before the next layer has memory.
    """
    # Where optimizer states are offloaded to makes no difference here.
    ds_config = deepspeed_settings(config, Path(config.nvme or "."))
    if ds_config.get("zero_optimization", {}).get("stage") != 3:
        return None
    import deepspeed

    # Given a module, even an empty one, it also puts in ZeRO-3's linear function, as initialize
    # does for a model that is not yet partitioned.
    zero = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=ds_config)

    def partition(parameters: Sequence[nn.Parameter]) -> None:
        for parameter in parameters:
            parameter.data = parameter.data.to(distributed.device(), precision(config))
            zero._convert_to_zero_parameters([parameter])

    return partition
