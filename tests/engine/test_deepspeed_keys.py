"""Every key of a DeepSpeed JSON is tested here, or refused in one line before training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsasr import recipe
from dsasr.engine import deepspeed_keys
from dsasr.engine.config import DS_CONFIGS, EngineConfig
from dsasr.utils.errors import UserError

PROGRAM = Path(__file__).parents[1] / "programs" / "master_weights_two.py"
# Values that a toy model feels: several buckets and sub-groups, parameters kept and fetched.
SMALL = {"overlap_comm": False, "contiguous_gradients": False, "reduce_scatter": False,
         "reduce_bucket_size": 60}  # fmt: skip
ZERO_1 = {"allgather_partitions": False, "allgather_bucket_size": 60,
          "use_multi_rank_bucket_allreduce": False}  # fmt: skip
ZERO_3 = {"sub_group_size": 100, "stage3_prefetch_bucket_size": 30,
          "stage3_param_persistence_threshold": 20, "stage3_model_persistence_threshold": 1000,
          "stage3_max_live_parameters": 200, "stage3_max_reuse_distance": 50}  # fmt: skip
ON_CPU = {"offload_optimizer": {"device": "cpu", "pin_memory": False, "buffer_count": 5}}
CONFIGS = {
    "one": {"zero_optimization": {"stage": 1, **SMALL, **ZERO_1}},
    "two": {"zero_optimization": {"stage": 2, **SMALL, **ZERO_1}},
    "three": {"zero_optimization": {"stage": 3, **SMALL, **ZERO_3}},
    "three-cpu": {
        "zero_optimization": {"stage": 3, **ON_CPU, "sub_group_size": 100},
        "zero_force_ds_cpu_optimizer": False,
    },
}


def written(folder: Path, settings) -> str:
    path = folder / "ds.json"
    path.write_text(json.dumps(settings))
    return str(path)


@pytest.mark.slow
@pytest.mark.launcher
@pytest.mark.parametrize("name", CONFIGS)
def test_masters_and_swaps_are_exact_under_every_tested_key(launch, tmp_path, name):
    done = launch(PROGRAM, tmp_path, written(tmp_path, CONFIGS[name]))
    assert done.returncode == 0, done.stdout[-3000:]
    results = json.loads((tmp_path / "found.json").read_text())
    assert results["encoder"] == 2 and results["from_live"] and results["equal"] == [True] * 3
    assert results["resumed"] == [2, 2, 2] and results["swapped_live"] and results["kept"]


def test_every_accepted_key_is_among_the_tested():
    zero = [c["zero_optimization"] for c in CONFIGS.values()]
    for stage, keys in deepspeed_keys.STAGE_KEYS.items():
        both = {1, 2} if stage < 3 else {3}
        assert set(keys) == {k for z in zero if z["stage"] in both for k in z}
    assert set(deepspeed_keys.OFFLOAD_KEYS) == set(ON_CPU["offload_optimizer"])
    # Of aio, by tests/programs/nvme_offload.py with the packaged file.
    packaged = json.loads((DS_CONFIGS / "zero3-nvme.json").read_text())
    assert set(deepspeed_keys.AIO_KEYS) == set(packaged["aio"])
    assert {k for c in [packaged, *CONFIGS.values()] for k in c} == set(deepspeed_keys.TOP_KEYS)


def test_packaged_files_and_switched_off_keys_are_accepted(tmp_path):
    for path in DS_CONFIGS.glob("*.json"):
        deepspeed_keys.check_keys(json.loads(path.read_text()), path.stem)
    for settings in CONFIGS.values():
        EngineConfig(deepspeed=written(tmp_path, settings))
    off = {"stage": 3, "round_robin_gradients": False, "zero_hpz_partition_size": 1,
           "offload_param": {"device": "none"}, "memory_efficient_linear": True,
           "offload_optimizer": {"device": "none"}}  # fmt: skip
    top = {"wall_clock_breakdown": False, "fp16": {}}
    EngineConfig(deepspeed=written(tmp_path, {"zero_optimization": off, **top}))
    off = {"stage": 2, "offload_optimizer": {"device": "none"}}
    EngineConfig(deepspeed=written(tmp_path, {"zero_optimization": off}))


@pytest.mark.parametrize(
    ("stage", "zero", "top", "words"),
    [
        (2, {"round_robin_gradients": True}, {}, "round_robin_gradients' orders the masters"),
        (3, {"zero_hpz_partition_size": 8}, {}, "zero_hpz_partition_size' keeps a second copy"),
        (3, {"zero_quantized_weights": True}, {}, "rounds what ranks exchange"),
        (3, {"mics_shard_size": 4}, {}, "partitions weights over some of the ranks"),
        (3, {"compute_grad_norm": False}, {}, "must stay on"),
        (3, {"leaf_module": {"classes": ["x"]}}, {}, "chosen by this package"),
        (1, {"parameter_alignment": True}, {}, "not tested with stages"),
        (2, {"overlap_com": True}, {}, "'zero_optimization.overlap_com' is no key.*'overlap_comm'"),
        (1, {"stage3_max_live_parameters": 9}, {}, "no effect with stage 1"),
        (3, {"allgather_bucket_size": 9}, {}, "no effect with stage 3"),
        (3, {"reduce_bucket_size": "auto"}, {}, "'auto', which it cannot have"),
        (3, {"reduce_bucket_size": float("inf")}, {}, "value inf, which it cannot have"),
        (3, {"stage3_max_live_parameters": float("nan")}, {}, "value nan, which it cannot have"),
        (1, {"allgather_bucket_size": 0}, {}, "value 0, which it cannot have"),
        (3, {"overlap_comm": 1}, {}, "overlap_comm' has the value 1"),
        (0, {}, {}, "stage must be 1, 2 or 3, not 0"),
        (True, {}, {}, "not True"),
        (3, {}, {"train_batch_size": 8}, "follows from data.dataloader.batch"),
        (3, {}, {"gradient_clipping": 1.0}, "engine.max_grad_norm"),
        (3, {}, {"bf16": {"enabled": True}}, "engine.precision"),
        (3, {}, {"optimizer": {"type": "Adam"}}, "engine.betas"),
        (3, {}, {"zero_optimisation": {}}, "'zero_optimisation' is no key.*'zero_optimization'"),
        (3, {}, {"aio": {"block_size": 4096}}, "no effect without"),
        (3, {"offload_optimizer": {"device": "cpu"}}, {}, "zero_force_ds_cpu_optimizer"),
        (3, {"offload_optimizer": {"devise": "cpu"}}, {}, "devise' is no key.*'device'"),
        (3, {"offload_optimizer": {"device": "gpu"}}, {}, "'gpu', which it cannot have"),
        (3, {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}, {}, "ratio' is not tested"),
        (2, {"offload_optimizer": {"device": "cpu"}}, {"zero_force_ds_cpu_optimizer": False},
         "offload_optimizer' needs stage 3"),
    ],
)  # fmt: skip
def test_any_other_key_is_refused_with_its_reason(tmp_path, tiny, stage, zero, top, words):
    path = written(tmp_path, {"zero_optimization": {"stage": stage, **zero}, **top})
    with pytest.raises(UserError, match=words) as caught:
        recipe.load(str(tiny), [f"engine.deepspeed={path}"])
    assert str(caught.value).startswith(f"engine.deepspeed={path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("settings", [[], {}, {"zero_optimization": True}, 3])
def test_a_file_without_zero_is_refused(tmp_path, settings):
    with pytest.raises(UserError, match=r"mapping.*zero_optimization"):
        EngineConfig(deepspeed=written(tmp_path, settings))


def test_keys_that_deepspeed_has_are_known_here():
    """A key that a newer DeepSpeed adds is told from a typo once it is in one of the tables."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig

    known = deepspeed_keys.STAGE_KEYS[1] | deepspeed_keys.STAGE_KEYS[3]
    known |= deepspeed_keys._REFUSED_ZERO | dict.fromkeys(deepspeed_keys._UNTESTED_ZERO)
    fields = {f.alias or name for name, f in DeepSpeedZeroConfig.model_fields.items()}
    assert fields <= set(known)
    known = deepspeed_keys.OFFLOAD_KEYS | deepspeed_keys._REFUSED_OFFLOAD
    known |= dict.fromkeys(deepspeed_keys._UNTESTED_OFFLOAD)
    assert set(DeepSpeedZeroOffloadOptimizerConfig.model_fields) <= set(known)
