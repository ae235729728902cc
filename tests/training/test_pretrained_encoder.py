"""A run with a pretrained encoder: a tiny random Whisper through all stages on two ranks."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import soundfile
import torch

from dsasr import Recognizer, config, recipe
from dsasr.build import Builder
from dsasr.checkpoint import zero_partition
from dsasr.checkpoint.locate import open_run_checkpoint
from dsasr.checkpoint.manifest import MANIFEST
from dsasr.checkpoint.tensor_fragments import FragmentReader
from dsasr.inference import export
from dsasr.inference.model_from_run import RunModel
from dsasr.model import lora
from dsasr.planning.cluster_sizing import estimate_step
from dsasr.planning.memory import Machine
from dsasr.planning.model_parts import count_parts
from dsasr.tracking.run_log import read_events
from dsasr.training import preflight
from dsasr.utils.errors import UserError

TRAIN = Path(__file__).parents[2] / "dsasr" / "train.py"
LAST = "step-0000000042"


def overrides(whisper: Path) -> list[str]:
    """What a recipe of ours changes to start from that encoder."""
    return [
        f"model.encoder={{path: {whisper}}}", "data.cmvn=''", "model.adaptor.stack=8",
        "model.pretrain.chunks=null", "model.sft.chunks=null",
        "data.dataloader.batch.max_seconds=20", "model.pretrain.head.layers=1",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(launch, tiny, whisper, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    done = launch(TRAIN, "--recipe", tiny, f"run={folder}", *overrides(whisper))
    assert done.returncode == 0, done.stdout[-3000:]
    return folder


def checksums(checkpoint: Path) -> dict:
    return json.loads((checkpoint / MANIFEST).read_text())["files"]


@pytest.mark.launcher
def test_four_stages_with_a_swap(trained):
    events = list(read_events(trained))
    assert [e["name"] for e in events if e["event"] == "stage_end"][-1] == "joint"
    assert [e for e in events if e["event"] == "swap"][-1]["cause"] == "final"
    assert (trained / "checkpoints" / LAST).is_dir()


@pytest.mark.launcher
def test_the_head_keeps_the_frames_statistics_of_the_first_step(trained):
    name = "pretrain/ctc.frame_std_E"
    readers = map(FragmentReader, (trained / "checkpoints").glob("step-*"))
    found = [reader.whole(name) for reader in readers if name in reader.shapes]
    assert len(found) > 1 and bool((found[0] > 0).all())
    assert all(torch.equal(std, found[0]) for std in found)


@pytest.mark.launcher
def test_a_resumed_run_ends_in_the_same_bits(trained, launch, tiny, whisper, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    (folder / "snapshots" / "PUBLISHER").unlink()  # the copied run's
    for path in sorted((folder / "checkpoints").glob("step-*"))[-2:]:
        shutil.rmtree(path)
    done = launch(TRAIN, "--recipe", tiny, f"run={folder}", *overrides(whisper))
    assert done.returncode == 0, done.stdout[-3000:]
    assert checksums(folder / "checkpoints" / LAST) == checksums(trained / "checkpoints" / LAST)


@pytest.mark.launcher
def test_the_export_needs_neither_the_encoders_folder_nor_the_run(trained, whisper, tmp_path):
    cfg = config.build(recipe.Recipe, config.read_recipe(str(trained / "recipe.yaml")))
    of_run = RunModel.from_run(trained).model.state_dict()
    model = export.export_run(Builder(cfg), open_run_checkpoint(trained), tmp_path / "model")
    moved = whisper.rename(whisper.parent / "elsewhere")
    try:
        of_export = export.load_export(model).model.state_dict()
        assert of_run.keys() == of_export.keys()
        assert all(torch.equal(of_run[k], of_export[k]) for k in of_run)
        wave = 0.3 * torch.sin(torch.arange(16000) * 0.2)
        soundfile.write(tmp_path / "a.wav", wave.numpy(), 16000)
        recognizer = Recognizer.from_pretrained(model)
        energy = replace(recognizer.segmentation, vad="energy")  # a tone is no speech to silero-vad
        recognizer = replace(recognizer, segmentation=energy)
        assert recognizer.transcribe(tmp_path / "a.wav").segments
    finally:
        moved.rename(whisper)


SFT_ONLY = (
    "stages=[{name: align, branch: sft, trains: {adaptor: 2e-3}, steps: 6}, "
    "{name: joint, branch: sft, trains: {encoder: 1e-4, adaptor: 1e-3, llm: 1e-3}, steps: 6}]"
)


@pytest.mark.launcher
def test_without_pretraining_it_trains_resumes_and_is_exported(launch, tiny, whisper, tmp_path):
    """No pretrain stage, no phonemes, no mean and variance: as recipe whisper-qwen3."""
    options = [*overrides(whisper), "data.phonemes=''", SFT_ONLY, "checkpoint.every_steps=4"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    done = launch(TRAIN, "--recipe", tiny, f"run={whole}", *options)
    assert done.returncode == 0, done.stdout[-3000:]
    events = list(read_events(whole))
    assert [e["name"] for e in events if e["event"] == "stage_end"] == ["align", "joint"]
    shutil.copytree(whole, resumed)
    last = "checkpoints/step-0000000012"
    for path in sorted((resumed / "checkpoints").glob("step-*"))[1:]:
        shutil.rmtree(path)  # back to step 4, within align
    done = launch(TRAIN, "--recipe", tiny, f"run={resumed}", *options)
    assert done.returncode == 0, done.stdout[-3000:]
    assert checksums(resumed / last) == checksums(whole / last)
    cfg = config.build(recipe.Recipe, config.read_recipe(str(whole / "recipe.yaml")))
    model = export.export_run(Builder(cfg), open_run_checkpoint(whole), tmp_path / "model")
    trained, start = export.load_export(model).model, Builder(cfg).speech_llm()
    changed = [n for n, p in start.encoder.named_parameters()
               if not torch.equal(p, trained.encoder.get_parameter(n))]  # fmt: skip
    assert changed
    soundfile.write(tmp_path / "a.wav", torch.zeros(16000).numpy(), 16000)
    assert Recognizer.from_pretrained(model).transcribe(tmp_path / "a.wav") is not None


@pytest.mark.launcher
def test_a_frozen_encoders_sum_over_blocks_is_learned(launch, tiny, whisper, tmp_path):
    align = (
        "stages=[{name: align, branch: sft, trains: {layer_sum: 1e-2, adaptor: 1e-3}, steps: 3}]"
    )
    options = [*overrides(whisper), "data.phonemes=''", "model.encoder.layer_sum=true", align]
    done = launch(TRAIN, "--recipe", tiny, f"run={tmp_path / 'run'}", *options)
    assert done.returncode == 0, done.stdout[-3000:]
    build = Builder(recipe.load(str(tiny), [*options, f"run={tmp_path / 'run'}"]))
    start = dict(build.speech_llm().encoder.named_parameters())
    reader = open_run_checkpoint(tmp_path / "run")
    changed = {n for n, p in start.items() if not torch.equal(reader.whole(f"sft/encoder.{n}"), p)}
    assert changed == {"layer_weights"}
    # Three steps of AdamW move each weight by at most the rate a step.
    assert 0 < reader.whole("sft/encoder.layer_weights").abs().max() <= 3.1e-2
    # The plan: no backward pass through the blocks, whose outputs are kept for the sum's weights.
    plans = {}
    for part in ("layer_sum", "encoder"):
        cfg = recipe.load(str(tiny), [*options, align.replace("layer_sum", part)])
        plans[part] = estimate_step(cfg, cfg.stages[0], Machine(nodes=1, gpus=2))
    assert plans["layer_sum"].flops < plans["encoder"].flops
    blocks, adaptor = len(start["layer_weights"]), count_parts(cfg)["adaptor"].parameters
    assert plans["layer_sum"].memory["optimizer"] == pytest.approx(
        12 * (blocks + adaptor) / 2 / 1e9
    )


MATRICES = [
    "model.encoder_lora={rank: 2, alpha: 6}",
    "stages.pretrain.trains={encoder_lora: 2.0e-2, ctc: 5.0e-3}",
    "stages.joint.trains={encoder_lora: 1.0e-3, adaptor: 1.0e-3, llm: 1.0e-3}",
]


@pytest.mark.slow
@pytest.mark.launcher
def test_with_lora_in_it_the_encoders_own_weights_stay_the_folders(launch, tiny, whisper, tmp_path):
    """Through pretraining, hot-swaps and the joint stage; snapshots hold weights and matrices."""
    folder = tmp_path / "run"
    settings = [*overrides(whisper), *MATRICES]
    done = launch(TRAIN, "--recipe", tiny, f"run={folder}", *settings)
    assert done.returncode == 0, done.stdout[-3000:]
    assert [e for e in read_events(folder) if e["event"] == "swap"][-1]["cause"] == "final"
    build = Builder(recipe.load(str(tiny), settings))
    names = dict(zero_partition.named_parameters(build.speech_llm(), "encoder."))
    matrices = {name for name in names if lora.is_adapter(name)}
    reader = open_run_checkpoint(folder)
    snapshot = FragmentReader(max((folder / "snapshots").glob("encoder-*")))
    stored = {name: reader.whole(f"sft/{name}") for name in names}
    published = {name: snapshot.whole(name) for name in names}
    assert {n for n in snapshot.shapes if n.startswith("encoder.")} == {
        n.removeprefix("sft/") for n in reader.shapes if n.startswith("sft/encoder.")
    }
    for name, parameter in names.items():
        for tensor in (stored[name], published[name]):
            assert torch.equal(tensor, parameter) != (name in matrices), name
        # The joint stage has trained the matrices on.
        assert torch.equal(stored[name], published[name]) != (name in matrices), name
    states = {k.removeprefix("sft/exp_avg/") for k in reader.shapes if "sft/exp_avg/" in k}
    assert {name for name in states if name.startswith("encoder.")} == matrices
    model = export.export_run(build, reader, tmp_path / "model")
    merged = export.load_export(model).model.state_dict()
    for name in names.keys() - matrices:
        expected, (a, b) = stored[name], lora.factors(name)
        if a in matrices:
            expected = lora.merged(expected, stored[a], stored[b], build.recipe.model.encoder_lora)
        assert torch.equal(merged[name], expected), name


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.encoder={path: /nowhere}", "/nowhere"),
        ("model.sft.chunks={}", "sees whole utterances only"),
        ("model.encoder={path: x, width: 3}", "width"),
    ],
)
def test_a_mistake_is_one_line(tiny, whisper, override, message):
    with pytest.raises(UserError, match=message) as caught:
        preflight.check(Builder(recipe.load(str(tiny), [*overrides(whisper), override])))
    assert "\n" not in str(caught.value)
