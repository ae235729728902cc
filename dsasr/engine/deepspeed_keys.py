"""Keys of a DeepSpeed JSON: those that training is tested with, and why others are refused.

DeepSpeed ignores keys that it does not know, and some that it knows change where weights and
masters lie, which offloads, hot-swaps and checkpoints would not find.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from dsasr.config import nearest
from dsasr.utils.errors import UserError

_ZERO = "zero_optimization"
_OFFLOAD = "offload_optimizer"
_OWN_CHECKPOINTS = "is of DeepSpeed's checkpoints, and this package writes its own"
_PARTITION = "partitions weights over some of the ranks, and a resume or hot-swap over all of them"
_ROUNDS = "rounds what ranks exchange, and a resumed run would not repeat an uninterrupted one"


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _number(value: Any) -> bool:
    number = not isinstance(value, bool) and isinstance(value, (int, float))
    return number and 0 <= value <= sys.maxsize  # which is DeepSpeed's word for no limit


def _positive(value: Any) -> bool:
    return _number(value) and value >= 1


def _name(value: Any) -> bool:
    return isinstance(value, str)


# Keys that training is tested with (tests/engine/test_deepspeed_keys.py), and their values.
_BOTH = {
    "stage": lambda value: value in (1, 2, 3) and not _flag(value),
    "overlap_comm": _flag,
    "contiguous_gradients": _flag,
    "reduce_scatter": _flag,
    "reduce_bucket_size": _positive,
}
STAGE_KEYS: dict[int, dict[str, Callable[[Any], bool]]] = {
    1: _BOTH
    | {
        "allgather_partitions": _flag,
        "allgather_bucket_size": _positive,
        "use_multi_rank_bucket_allreduce": _flag,
    },
    3: _BOTH
    | {
        _OFFLOAD: lambda value: value is None or isinstance(value, Mapping),
        "sub_group_size": _positive,
        "stage3_prefetch_bucket_size": _number,
        "stage3_param_persistence_threshold": _number,
        "stage3_model_persistence_threshold": _number,
        "stage3_max_live_parameters": _number,
        "stage3_max_reuse_distance": _number,
    },
}
STAGE_KEYS[2] = STAGE_KEYS[1]
OFFLOAD_KEYS: dict[str, Callable[[Any], bool]] = {
    "device": lambda value: value in ("none", "cpu", "nvme"),
    "pin_memory": _flag,
    "buffer_count": _positive,
}
AIO_KEYS: dict[str, Callable[[Any], bool]] = {
    "block_size": _positive,
    "queue_depth": _positive,
    "overlap_events": _flag,
}
TOP_KEYS: dict[str, Callable[[Any], bool]] = {
    _ZERO: lambda value: isinstance(value, Mapping),
    "aio": lambda value: isinstance(value, Mapping),
    "zero_force_ds_cpu_optimizer": _flag,
}

# Key → the reason why it is refused unless it is off.
_REFUSED_TOP = {
    "train_batch_size": "follows from data.dataloader.batch and stages.NAME.grad_accum_steps",
    "train_micro_batch_size_per_gpu": "follows from data.dataloader.batch",
    "gradient_accumulation_steps": "is a stage's: give stages.NAME.grad_accum_steps",
    "gradient_clipping": "is the recipe's: give engine.max_grad_norm",
    "optimizer": "is the recipe's: give engine.betas, engine.eps and rates in stages.NAME.trains",
    "scheduler": "is a stage's: give stages.NAME.warmup_steps and stages.NAME.decay",
    "activation_checkpointing": "is the model's: give model.llm.activation_checkpointing",
    "steps_per_print": "is the recipe's: give monitor.every",
    "checkpoint": _OWN_CHECKPOINTS,
    **dict.fromkeys(("bf16", "bfloat16", "fp16", "amp", "torch_autocast", "data_types"),
                    "is the recipe's: give engine.precision"),
    **dict.fromkeys(("tensorboard", "wandb", "csv_monitor", "comet", "monitor_config"),
                    "is the recipe's: give monitor"),
}  # fmt: skip
_UNTESTED_TOP = (
    "zero_allow_untested_optimizer", "communication_data_type", "prescale_gradients",
    "seq_parallel_communication_data_type", "gradient_predivide_factor", "gradient_allreduce_op",
    "sparse_gradients", "disable_allgather", "disable_python_gc", "managed_gradient_accumulation",
    "check_overflow", "dump_state", "wall_clock_breakdown", "memory_breakdown", "comms_logger",
    "flops_profiler", "compile", "elasticity", "autotuning", "compression_training",
    "data_efficiency", "curriculum_learning", "hybrid_engine", "pipeline", "tensor_parallel",
    "sequence_parallel_size", "eigenvalue", "progressive_layer_drop", "nebula", "timers",
    "quantize_training", "dataloader_drop_last", "use_data_before_expert_parallelism",
    "graph_harvesting", "load_universal_checkpoint", "use_node_local_storage", "log_level",
)  # fmt: skip
_REFUSED_ZERO = {
    "round_robin_gradients": "orders the masters otherwise than the weights, and a hot-swap or "
    "checkpoint would give them to other parameters",
    "zero_hpz_partition_size": "keeps a second copy of the weights, which a resume or a hot-swap "
    "does not replace",
    "mics_shard_size": _PARTITION,
    "mics_hierarchical_params_gather": _PARTITION,
    "zero_quantized_weights": _ROUNDS,
    "zero_quantized_nontrainable_weights": _ROUNDS,
    "zero_quantized_gradients": _ROUNDS,
    "offload_param": "moves weights away from where a hot-swap writes them",
    "elastic_checkpoint": _OWN_CHECKPOINTS,
    "load_from_fp32_weights": _OWN_CHECKPOINTS,
    "pipeline_loading_checkpoint": _OWN_CHECKPOINTS,
    "stage3_gather_16bit_weights_on_model_save": _OWN_CHECKPOINTS,
    "stage3_gather_fp16_weights_on_model_save": _OWN_CHECKPOINTS,
    "gather_16bit_weights_on_model_save": _OWN_CHECKPOINTS,
    **dict.fromkeys(("cpu_offload", "cpu_offload_param", "cpu_offload_use_pin_memory"),
                    "is DeepSpeed's old name: give offload_optimizer"),
    "compute_grad_norm": "must stay on: gradients are clipped by their norm, and it is logged",
    "leaf_module": "is chosen by this package",
}  # fmt: skip
_UNTESTED_ZERO = (
    "legacy_stage1", "parameter_alignment", "ignore_unused_parameters", "zenflow",
    "memory_efficient_linear", "override_module_apply", "log_trace_cache_warnings",
    "enable_sanity_checks", "save_muon_momentum_buffer_in_memory",
    "stage3_module_granularity_threshold", "stage3_use_all_reduce_for_fetch_params",
    "stage3_allgather_sequential",
)  # fmt: skip
_REFUSED_OFFLOAD = {"nvme_path": "is the recipe's: give engine.nvme"}
_UNTESTED_OFFLOAD = (
    "pipeline_read", "pipeline_write", "fast_init", "ratio", "super_offload", "cpuadam_cores_perc",
)  # fmt: skip
_UNTESTED_AIO = ("intra_op_parallelism", "single_submit", "use_gds", "thread_count")
_UNTESTED = "is not tested with stages, hot-swaps and resumes: leave it out"
# DeepSpeed's defaults of refused keys that are on by default, or have another value for off.
_OFF = {
    "zero_hpz_partition_size": 1, "load_from_fp32_weights": True, "compute_grad_norm": True,
    "memory_efficient_linear": True, "override_module_apply": True, "ratio": 1.0,
    "ignore_unused_parameters": True, "zero_allow_untested_optimizer": True,
    "offload_param": {"device": "none"}, _OFFLOAD: {"device": "none"},
    "sequence_parallel_size": 1, "mics_shard_size": -1,
    "gradient_predivide_factor": 1.0,
}  # fmt: skip


def check_keys(settings: Any, name: str) -> None:
    """Raise `UserError` for a DeepSpeed JSON with a key or value that training is not tested with.

    ``name``: the recipe's engine.deepspeed, for the message.
    """
    if not isinstance(settings, Mapping) or not isinstance(settings.get(_ZERO), Mapping):
        raise UserError(f"engine.deepspeed={name}: it has no mapping '{_ZERO}' with a 'stage'")
    zero = settings[_ZERO]
    stage = zero.get("stage")
    if not _BOTH["stage"](stage):
        raise UserError(f"engine.deepspeed={name}: {_ZERO}.stage must be 1, 2 or 3, not {stage!r}")
    elsewhere = STAGE_KEYS[1 if stage == 3 else 3].keys() - STAGE_KEYS[stage].keys()
    top = _REFUSED_TOP | dict.fromkeys(_UNTESTED_TOP, _UNTESTED)
    _check(name, "", settings, TOP_KEYS, top)
    zero_refused = _REFUSED_ZERO | dict.fromkeys(_UNTESTED_ZERO, _UNTESTED)
    zero_refused |= dict.fromkeys(elsewhere, f"has no effect with stage {stage}")
    if _OFFLOAD in elsewhere:
        zero_refused[_OFFLOAD] = "needs stage 3: with 1 and 2 DeepSpeed 0.19 loses track of masters"
    _check(name, f"{_ZERO}.", zero, STAGE_KEYS[stage], zero_refused)
    offload = (zero.get(_OFFLOAD) or {}) if stage == 3 else {}
    refused = _REFUSED_OFFLOAD | dict.fromkeys(_UNTESTED_OFFLOAD, _UNTESTED)
    _check(name, f"{_ZERO}.{_OFFLOAD}.", offload, OFFLOAD_KEYS, refused)
    _check(name, "aio.", settings.get("aio", {}), AIO_KEYS, dict.fromkeys(_UNTESTED_AIO, _UNTESTED))
    _check_offload(name, settings, offload.get("device", "none"))


def _check(
    name: str,
    path: str,
    values: Mapping[str, Any],
    tested: Mapping[str, Callable[[Any], bool]],
    refused: Mapping[str, str],
) -> None:
    for key, value in values.items():
        where = f"engine.deepspeed={name}: '{path}{key}'"
        if key in tested:
            if not tested[key](value):
                raise UserError(f"{where} has the value {value!r}, which it cannot have")
        elif key not in refused:
            raise UserError(f"{where} is no key of DeepSpeed's{nearest(key, [*tested, *refused])}")
        elif (value and value != _OFF.get(key)) or (value is False and _OFF.get(key) is True):
            raise UserError(f"{where} {refused[key]}")


def _check_offload(name: str, settings: Mapping[str, Any], device: str) -> None:
    where = f"engine.deepspeed={name}:"
    if device != "none" and settings.get("zero_force_ds_cpu_optimizer", True):
        raise UserError(
            f'{where} with {_OFFLOAD} it needs "zero_force_ds_cpu_optimizer": false: the '
            "optimizer is torch's AdamW, not DeepSpeed's"
        )
    if "aio" in settings and device != "nvme":
        raise UserError(f"{where} 'aio' has no effect without {_OFFLOAD}.device=nvme")
