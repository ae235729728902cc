"""A branch engine on two ranks: stages, offload, hot-swap and what a step waits for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsasr.engine.config import read_ds_config
from dsasr.utils.errors import UserError

PROGRAM = Path(__file__).parents[1] / "programs" / "branch_engine_laws.py"


def run_program(launch, folder, course, deepspeed="zero3", precision="fp32", offload="none"):
    done = launch(PROGRAM, folder, course, deepspeed, precision, offload)
    assert done.returncode == 0, done.stdout[-3000:]
    return json.loads((folder / f"{course}.json").read_text())


@pytest.mark.launcher
@pytest.mark.parametrize(
    ("deepspeed", "precision", "offload"),
    [
        ("zero3", "fp32", "disk"),
        ("zero3", "bf16", "cpu"),
        ("persistent", "fp32", "none"),
        ("persistent", "bf16", "none"),
        ("zero2", "fp32", "disk"),
    ],
)
def test_branches_do_not_touch_each_other(launch, tmp_path, deepspeed, precision, offload):
    resident = {"zero3": 0, "persistent": 5, "zero2": 6}[deepspeed]
    if deepspeed == "persistent":  # small parameters stay gathered on every rank
        settings = read_ds_config("zero3")
        assert settings["zero_optimization"]["stage3_param_persistence_threshold"] == 0
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 100_000
        deepspeed = tmp_path / "persistent.json"
        deepspeed.write_text(json.dumps(settings))
    results = run_program(launch, tmp_path, "laws", deepspeed, precision, offload)
    # The pretrain branch beside an sft branch, offloaded and swapped from, equals the same branch
    # alone bit for bit: losses, weights, masters and moments.
    assert results["beside"] == results["alone"]
    assert results["frozen"], "a frozen part moved, or a trained one did not"
    assert results["swapped"] and results["resident"] == resident and results["masters"]
    assert results["saved"] and results["continued"]
    assert results["lrs"] and len(set(results["groups"].values())) == 3
    assert list(results["groups"]) == ["encoder", "adaptor", "llm"]
    assert not list(tmp_path.glob("offloaded-pretrain-*")), "the offload file outlived its use"


@pytest.mark.launcher
def test_training_goes_on_bit_for_bit_after_an_error_within_an_evaluation(launch, tmp_path):
    results = run_program(launch, tmp_path, "errors")
    assert results["with"] == results["without"] and len(results["with"]) == 9


@pytest.mark.slow
@pytest.mark.launcher
def test_fifty_stage_switches_leave_nothing_behind(launch, tmp_path):
    results = run_program(launch, tmp_path, "switches")
    assert len(set(results["hooks"])) == 1
    # DeepSpeed's own bookkeeping grows by about 45 KiB a switch; a leaked optimizer of this model
    # would be 3 MiB a switch.
    growth = results["rss"][-1] - results["rss"][1]  # the first ten settle caches
    assert growth < 40 * 100 * 1024, f"resident memory grew by {growth / 2**20:.1f} MiB"


@pytest.mark.launcher
def test_an_encoder_is_published_and_loaded_in_each_ranks_own_slices(launch, tmp_path):
    done = launch(PROGRAM.parent / "sharded_state.py", tmp_path)
    assert done.returncode == 0, done.stdout[-3000:]
    results = json.loads((tmp_path / "found.json").read_text())
    assert results["loaded"] and results["whole"] == 307 * 311
    # No rank ever holds, or reads, more of a parameter than its half.
    assert results["slice"] == -(-results["whole"] // 2)
    assert results["largest_read"] == results["slice"]
    assert results["loading_bytes"] == 4 * results["slice"]
    assert results["publishing_bytes"] == 8 * results["slice"], "checksums are made in int64"
    assert results["read"] == results["encoder"], "every element is read once, by one rank"
    # Where the encoder trains, its masters follow and its moments, no others, begin again.
    assert results["moved"] and results["again"] and results["masters"] and results["moments"]
    assert results["others_kept"] and 0 < results["next_step"] < 0.05


def test_ds_configs_are_read_by_name_and_mistakes_are_named(tmp_path):
    assert read_ds_config("zero3")["zero_optimization"]["stage"] == 3
    with pytest.raises(UserError, match="did you mean 'zero3'"):
        read_ds_config("zero33")
    broken = tmp_path / "x.json"
    broken.write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        read_ds_config(str(broken))


# Functions that read values of tensors on the host, or do so only on a CPU. That no other function
# of the model waits for a GPU is tested in tests/training/test_host_waits.py.
ON_THE_HOST = {
    "dsasr/model/encoders/conformer.py:forward",
    "dsasr/model/sequence_layout.py:<genexpr>",
    "dsasr/model/ctc_model.py:count_targets",
    "dsasr/model/speech_llm.py:count_targets",
    "dsasr/model/speech_llm.py:<listcomp>",
    "dsasr/model/sequence_layout.py:lay_out",
    "dsasr/model/sequence_layout.py:ragged",
    "dsasr/kernels/dispatch.py:_check_cross_entropy",
    "dsasr/kernels/dispatch.py:_check_adaptor",
    # Adam's step count, which a GPU's fused Adam never reads.
    "deepspeed/runtime/zero/stage3.py:step_with_gradscaler",
    "deepspeed/runtime/zero/stage_1_and_2.py:_optimizer_step",
    # Of unpacked rows, once a batch.
    "transformers/masking_utils.py:find_packed_sequence_indices",
}


@pytest.mark.launcher
@pytest.mark.parametrize("zero", ["zero1", "zero3"])
def test_a_step_waits_for_the_device_before_the_optimizer_alone(launch, tiny, tmp_path, zero):
    out = tmp_path / "waits.json"
    done = launch(PROGRAM.parent / "host_waits.py", tiny, out, zero, ranks=1)
    assert done.returncode == 0, done.stdout[-3000:]
    results = json.loads(out.read_text())
    assert list(results) == ["pretrain", "align", "ia_sft", "joint"]
    for stage, waits in results.items():
        asked = {k: n for k, n in waits["asked"].items() if k not in ON_THE_HOST}
        # DeepSpeed checks whether the gradient is finite: all of it at once, or each group's and
        # the norm for clipping. The engine does not read the norm a second time.
        checks = 1 if zero == "zero3" else waits["groups"] + 1
        assert asked == {"deepspeed/runtime/utils.py:is_invalid_grad_norm": checks}, stage
        assert 0 < waits["norm"] < 100
