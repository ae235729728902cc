"""What a run writes for TensorBoard, read back from its event files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata, plugin_data_pb2

from dsasr.engine.gradient_histograms import EDGES, log10_counts
from dsasr.tracking import tensorboard
from dsasr.tracking.tensorboard import TensorBoard, tag

STAGES = {"pretrain": "pretrain", "align": "sft", "joint": "sft"}


def read(folder: Path, branch: str) -> EventAccumulator:
    return EventAccumulator(str(folder / branch)).Reload()


def curve(board: EventAccumulator, name: str) -> list[tuple[int, float]]:
    return [(e.step, pytest.approx(e.value)) for e in board.Scalars(name)]


def test_a_quantity_is_one_curve_over_all_stages_of_its_branch(tmp_path):
    board = TensorBoard(tmp_path, STAGES)
    for steps, branch, stage, values in (
        (10, "pretrain", "pretrain", {"ctc": 3.0, "lr_encoder": 1e-3}),
        (20, "sft", "align", {"nll": 2.0, "lr_adaptor": 1e-3, "step_seconds": 0.5}),
        (30, "sft", "joint", {"nll": 1.0, "lr_adaptor": 1e-4, "lr_llm": 1e-4}),
    ):
        board.line({"steps": steps, "branch": branch, "stage": stage, "step": 5}, values)
    for stage, steps, rates in (("align", 20, {"wer/en": 0.5}), ("joint", 30, {"wer/en": 0.25})):
        board.line({"steps": steps, "branch": "sft", "stage": f"valid_{stage}"}, rates)
    board.close()
    sft, pretrain = read(tmp_path, "sft"), read(tmp_path, "pretrain")
    assert curve(sft, "train/loss") == [(20, 2.0), (30, 1.0)]
    assert curve(sft, "train/lr/adaptor") == [(20, 1e-3), (30, 1e-4)]
    assert curve(sft, "valid/wer/en") == [(20, 0.5), (30, 0.25)]
    assert curve(sft, "train/stage") == [(20, 2.0), (30, 3.0)]
    assert curve(pretrain, "train/loss") == [(10, 3.0)]
    assert set(pretrain.Tags()["scalars"]) == {"train/loss", "train/lr/encoder", "train/stage"}


@pytest.mark.parametrize(
    "head, name, expected",
    [
        ({"stage": "x", "step": 1}, "ctc", "train/loss"),
        ({"stage": "x", "step": 1}, "consistency", "train/consistency"),
        ({"stage": "drift", "step": 1}, "nll", "train/loss"),  # a stage that a recipe calls so
        ({"stage": "x", "step": 1}, "read_ms_per_s", "data/read_ms_per_s"),
        ({"stage": "x", "step": 1}, "memory_bytes", "memory/memory_bytes"),
        ({"stage": "x", "step": 1}, "encoder_in_use", "swap/encoder_in_use"),
        ({"stage": "encoder"}, "in_use", "swap/encoder_in_use"),
        ({"stage": "valid_x"}, "loss", "valid/loss"),
        ({"stage": "valid_x"}, "wer_low", ""),
        ({"stage": "allocation_x"}, "ctc", "probe/ctc"),
        ({"stage": "drift"}, "cka", "drift/cka"),
        ({"stage": "bad_samples"}, "too_long", "data/bad_samples/too_long"),
    ],
)
def test_tags_have_no_stage_in_them(head, name, expected):
    assert tag(head, name) == expected


def test_stages_and_swaps_are_marks(tmp_path):
    board = TensorBoard(tmp_path, STAGES)
    board.event("stage", {"name": "align", "branch": "sft"}, "align starts", 3)
    board.event("stage_end", {"name": "pretrain"}, "pretrain ends", 8)
    board.event("published", {"snapshot": "encoder-4"}, "published encoder-4", 4)
    board.event("swap", {"snapshot": "encoder-4"}, "swapped", 5)
    board.event("checkpoint", {"name": "step-5"}, "saved", 5)  # no mark
    board.close()
    for branch, expected in (
        ("sft", [(3, b"align starts"), (5, b"swapped")]),
        ("pretrain", [(8, b"pretrain ends"), (4, b"published encoder-4")]),
    ):
        marks = read(tmp_path, branch).Tensors("events/text_summary")
        assert [(m.step, m.tensor_proto.string_val[0]) for m in marks] == expected


def test_the_recipe_is_there_as_hyperparameters(tmp_path):
    recipe = {
        "run": "runs/secret", "seed": 3, "data": {"augment": {"speeds": [0.9, 1.1]}, "cmvn": "x"},
        "model": {"encoder": {"width": 128}, "lora": None},
        "stages": [{"name": "align", "steps": 40, "trains": {"adaptor": 1e-3}, "swaps": False}],
    }  # fmt: skip
    values = tensorboard.hparams(recipe)
    assert values == {
        "seed": 3, "data.augment.speeds": "0.9, 1.1", "model.encoder.width": 128,
        "stages.align.steps": 40, "stages.align.trains.adaptor": 1e-3, "stages.align.swaps": False,
    }  # fmt: skip
    board = TensorBoard(tmp_path, STAGES, values)
    board.text("sft", "x", "y", 1)
    board.close()
    contents = read(tmp_path, "sft").PluginTagToContent(metadata.PLUGIN_NAME)
    started = plugin_data_pb2.HParamsPluginData.FromString(
        contents[metadata.SESSION_START_INFO_TAG]
    )
    written = started.session_start_info.hparams
    assert written["model.encoder.width"].number_value == 128
    assert written["data.augment.speeds"].string_value == "0.9, 1.1"
    about = plugin_data_pb2.HParamsPluginData.FromString(contents[metadata.EXPERIMENT_TAG])
    assert "valid/wer" in [m.name.tag for m in about.experiment.metric_infos]


def test_a_sound_is_read_back_as_it_was(tmp_path):
    import io

    import soundfile

    wave = (0.5 * np.sin(np.arange(1600) / 7)).astype(np.float32)
    board = TensorBoard(tmp_path, STAGES)
    board.audio("sft", "valid/audio_1", wave, 16000, 7)
    board.close()
    [event] = read(tmp_path, "sft").Audio("valid/audio_1")
    back, rate = soundfile.read(io.BytesIO(event.encoded_audio_string), dtype="float32")
    assert event.step == 7 and rate == 16000
    assert back == pytest.approx(wave, abs=1e-4)


def test_what_follows_the_checkpoint_resumed_from_is_hidden(tmp_path):
    head = {"branch": "sft", "stage": "align"}
    board = TensorBoard(tmp_path, STAGES)
    for steps in (5, 10, 15):
        board.line({**head, "steps": steps, "step": steps}, {"nll": 9.0})
    board.close()
    # Files are read by name, which begins with the second of their start.
    [first] = (tmp_path / "sft").iterdir()
    first.rename(first.with_name("events.out.tfevents.0000000001"))
    board = TensorBoard(tmp_path, STAGES, from_steps=10)
    board.line({**head, "steps": 15, "step": 15}, {"nll": 1.0})
    board.close()
    assert curve(read(tmp_path, "sft"), "train/loss") == [(5, 9.0), (10, 9.0), (15, 1.0)]


def test_gradients_are_counted_by_magnitude(tmp_path):
    gradient = torch.tensor([0.0, 1e-20, -1e-3, 1e-3, 1.0, 1e9, float("nan"), float("inf")])
    counts = log10_counts(gradient)
    assert counts.sum() == 6 and len(counts) == len(EDGES) - 1
    in_bin = {value: int(np.searchsorted(EDGES, value, side="right")) - 1 for value in (-3.0, 0.0)}
    assert counts[in_bin[-3.0]] + counts[in_bin[-3.0] - 1] == 2  # log10(1e-3) is −3 but rounded
    assert counts[in_bin[0.0]] == 1 and counts[0] == 2 and counts[-1] == 1
    board = TensorBoard(tmp_path, STAGES)
    board.gradients("sft", {"llm": counts.tolist()}, 4)
    board.close()
    [event] = read(tmp_path, "sft").Histograms("gradient/log10_llm")
    value = event.histogram_value
    assert event.step == 4 and value.num == 6
    assert list(value.bucket) == counts.tolist()
    assert list(value.bucket_limit) == pytest.approx(EDGES[1:].tolist())
