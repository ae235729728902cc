"""Plans of a recipe with a pretrained encoder, without its weights and without a network."""

from __future__ import annotations

from dataclasses import replace

import huggingface_hub
import pytest

from dsasr import recipe
from dsasr.planning import cluster_sizing, timeline
from dsasr.planning.memory import Machine, MicroBatch, Traffic, step_memory
from dsasr.planning.model_parts import assumptions, count_parts
from dsasr.utils.errors import UserError


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        cache = tmp_path_factory.mktemp("cache")
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
        yield


@pytest.fixture(scope="module")
def whisper() -> recipe.Recipe:
    return recipe.load("whisper-qwen3")


@pytest.fixture(scope="module")
def parts(whisper):
    return count_parts(whisper)


def changed(cfg: recipe.Recipe, **encoder) -> recipe.Recipe:
    return replace(cfg, model=replace(cfg.model, encoder=replace(cfg.model.encoder, **encoder)))


def test_frames_are_the_encoders(whisper, parts):
    at = MicroBatch.of(whisper, whisper.stage("sft"), Traffic(8.0, 4.0), parts)
    # 100 Hz in, 50 Hz out, stacks of 8; 40 of prompt and 32 of text around the speech.
    assert (at.rows, at.frames, at.positions, at.views) == (800, 400, 40 + 50 + 32, 1)
    waves = changed(whisper, path="facebook/hubert-large-ll60k")
    at = MicroBatch.of(waves, waves.stage("sft"), Traffic(8.0, 4.0), count_parts(waves))
    assert (at.rows, at.frames) == (128_000, 399)
    assert at.positions == pytest.approx(40 + 399 / 8 + 32)


def test_flops_are_two_a_weight_and_frame_and_attention(whisper, parts):
    stage = whisper.stage("sft")
    at = MicroBatch.of(whisper, stage, Traffic(8.0, 4.0), parts)
    work = cluster_sizing.micro_batch_flops(whisper, stage, at, parts)
    layers, width, frames = 32, 1280, 400
    front = 800 * 3 * 128 * width + frames * 3 * width * width
    linear = layers * (4 * width * width + 8 * width * width) * frames + front
    attention = layers * 2 * frames * frames * width
    assert work["encoder"].forward == pytest.approx(2 * (linear + attention) * at.utterances)
    assert work["encoder"].backward == 0 and work["lora"].backward > 0
    # Padded to 30 s, the encoder computes 1500 frames of each utterance, the model no more.
    padded = changed(whisper, pad_to=30.0)
    again = count_parts(padded)
    assert MicroBatch.of(padded, stage, Traffic(8.0, 4.0), again) == at
    more = cluster_sizing.micro_batch_flops(padded, stage, at, again)
    assert 3.7 < more["encoder"].forward / work["encoder"].forward < 4.3
    assert more["llm"] == work["llm"]


def test_memory_of_a_frozen_and_of_a_trained_encoder(whisper, parts):
    one, stage = Machine(nodes=1, gpus=1), whisper.stage("sft")
    frozen = step_memory(whisper, stage, one, parts)
    assert 10 < sum(frozen.values()) < 20
    assert sum(step_memory(whisper, stage, Machine(nodes=1, gpus=8), parts).values()) < 10
    joint = replace(stage, trains={"encoder": 1e-5, "adaptor": 1e-4, "lora": 1e-4})
    trained = step_memory(whisper, joint, one, parts)
    assert trained["optimizer"] - frozen["optimizer"] == pytest.approx(12 * 0.635, rel=0.01)
    assert trained["activations"] > 5 * frozen["activations"]
    checkpointed = changed(whisper, activation_checkpointing=True)
    less = step_memory(checkpointed, joint, one, count_parts(checkpointed))
    assert frozen["activations"] < less["activations"] < trained["activations"] / 3


def test_what_is_taken_for_granted_is_said(whisper, tiny, command):
    lines = list(assumptions(whisper))
    assert len(lines) == 2 and "openai/whisper-large-v3" in lines[0] and "Qwen3" in lines[1]
    ctc = recipe.load("whisper-qwen3", ["model.adaptor={kind: ctc}", "model.init_from=x"])
    assert [x for x in assumptions(ctc) if "256 phonemes" in x or "12 a second" in x] != []
    at = MicroBatch.of(ctc, ctc.stage("sft"), Traffic(8.0, 4.0), count_parts(ctc))
    assert at.adaptor_inputs == 96 and at.positions == 40 + 96 + 32
    assert list(assumptions(recipe.load(str(tiny)))) == []
    done = command("plan", "cluster", "--recipe", "whisper-qwen3", "--nodes", 1, "--gpus", 1)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("assumed: ") == 3 and "ctc" not in done.stdout
    assert "utterances of 8 s" in done.stdout and "GPU-hours" in done.stdout
    done = command("plan", "cluster", "--recipe", "nim-2.3b", "--nodes", 1)
    assert "for 256 phonemes" in done.stdout


def test_an_encoder_that_nobody_knows(whisper, command):
    unknown = changed(whisper, path="someone/else")
    with pytest.raises(UserError, match=r"model\.encoder\.path.*someone/else"):
        count_parts(unknown)
    table = timeline.stage_table(unknown)
    assert "not known: model.encoder.path not there" in table
    assert "GB a rank" in timeline.stage_table(whisper)
