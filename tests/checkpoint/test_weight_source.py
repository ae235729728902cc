"""Sources of initial weights: what a path means, whose weights a branch takes, whose settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dsasr.checkpoint import export_folder, tensor_fragments, weight_source
from dsasr.checkpoint.tensor_fragments import Fragment
from dsasr.utils.errors import UserError

A = "llm.layers.0.q_proj.lora_A.default.weight"


def write(folder: Path, tensors: dict[str, torch.Tensor], **info) -> Path:
    fragments = {k: Fragment(tuple(t.shape), 0, t.reshape(-1)) for k, t in tensors.items()}
    tensor_fragments.write_folder(folder, fragments, {"kind": "checkpoint", **info})
    return folder


def filled(value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full((2, 3), value, dtype=dtype)


def test_parts_by_name():
    names = ("encoder.blocks.0.norm.weight", "ctc.project.bias", "adaptor.bias1", "llm.norm", A)
    assert tuple(map(weight_source.part_of, names)) == weight_source.PARTS


def test_each_branch_takes_its_own_encoder_and_the_other_s_where_it_has_none(tmp_path):
    both = {"pretrain/encoder.w": filled(1), "pretrain/ctc.w": filled(2),
            "sft/encoder.w": filled(3), "sft/adaptor.w": filled(4)}  # fmt: skip
    source = weight_source.open_source(write(tmp_path / "both", both))
    assert sorted(source.shapes) == ["adaptor.w", "ctc.w", "encoder.w"]
    values = {b: float(source.readers[b].whole("encoder.w")[0, 0]) for b in ("pretrain", "sft")}
    assert values == {"pretrain": 1.0, "sft": 3.0}
    # A part is never of both: an encoder of the sft branch is not filled up from pretraining's.
    both["pretrain/encoder.more"] = filled(5)
    source = weight_source.open_source(write(tmp_path / "more", both))
    assert "encoder.more" in source.readers["pretrain"]
    assert "encoder.more" not in source.readers["sft"]
    alone = write(tmp_path / "alone", {"pretrain/encoder.w": filled(1)})
    assert "encoder.w" in weight_source.open_source(alone).readers["sft"]


def test_masters_are_those_stored_or_the_float32_weights_themselves(tmp_path):
    low = torch.bfloat16
    tensors = {"sft/adaptor.a": filled(1.0, low), "sft/master/adaptor.a": filled(1.001),
               "sft/adaptor.b": filled(2.0, low), "sft/adaptor.c": filled(3.001),
               "sft/exp_avg/adaptor.a": filled(9.0)}  # fmt: skip
    source = weight_source.open_source(write(tmp_path / "x", tensors))
    reader = source.readers["sft"]
    assert sorted(source.shapes) == ["adaptor.a", "adaptor.b", "adaptor.c"]
    assert torch.equal(reader.whole("master/adaptor.a"), filled(1.001))
    assert "master/adaptor.b" not in reader
    assert torch.equal(reader.read("master/adaptor.c", 1, 3), filled(3.001).reshape(-1)[1:3])


def test_what_a_path_means(tmp_path):
    run = tmp_path / "run"
    with pytest.raises(UserError, match="there is no folder"):
        weight_source.locate_source(run)
    run.mkdir()
    (run / "recipe.yaml").write_text("seed: 1")
    with pytest.raises(UserError, match="no checkpoint yet"):
        weight_source.locate_source(run)
    older, newer = (
        write(run / "checkpoints" / f"step-{n:010d}", {"sft/adaptor.w": filled(n)}) for n in (1, 2)
    )
    assert weight_source.locate_source(run) == newer
    assert weight_source.locate_source(older) == older
    assert weight_source.read_settings(run) == {"seed": 1}
    # The folder of a concurrent run: its sft job, or before that has a checkpoint its other one.
    (tmp_path / "two" / "pretrain").mkdir(parents=True)
    (run / "checkpoints").rename(tmp_path / "two" / "pretrain" / "checkpoints")
    found = weight_source.locate_source(tmp_path / "two")
    assert found == tmp_path / "two" / "pretrain" / "checkpoints" / newer.name


SETTINGS = {
    "data": {"fbank": {"mels": 40}, "cmvn": "their/cmvn.json", "phonemes": "their/phonemes.json"},
    "model": {"encoder": {"width": 64, "heads": 2}, "adaptor": {"stack": 8},
              "llm": {"path": "their/lm", "dropout": 0.5}, "tokenizer": "their/tok"},
}  # fmt: skip


def test_a_part_brings_the_settings_that_a_recipe_leaves_out():
    values = {"seed": 3, "data": {"cmvn": ""}, "model": {"llm": {"path": "", "attn": "eager"}}}
    whole = weight_source.complete_recipe(values, SETTINGS, weight_source.PARTS)
    assert whole == {
        "seed": 3,
        "data": SETTINGS["data"],
        "model": {**SETTINGS["model"], "llm": {"path": "their/lm", "attn": "eager"}},
    }
    own = {"data": {"cmvn": "my/cmvn.json"}, "model": {"encoder": {"heads": 4},
           "llm": {"path": "my/lm"}}}  # fmt: skip
    completed = weight_source.complete_recipe(own, SETTINGS, ("encoder", "llm"))
    assert completed["data"] == {"fbank": {"mels": 40}, "cmvn": "my/cmvn.json"}
    # Another language model does not get their tokenizer, nor a part that is not taken its sizes.
    assert completed["model"] == {"encoder": {"width": 64, "heads": 4}, "llm": {"path": "my/lm"}}
    # Settings that both kinds have belong to theirs.
    theirs = {"model": {"encoder": {"path": "whisper", "layers": 4}}}
    dropped = {"model": {"encoder": {"dropout": 0.1}}}
    found = weight_source.complete_recipe(dropped, theirs, ("encoder",))["model"]["encoder"]
    assert found == {"path": "whisper", "layers": 4, "dropout": 0.1}
    sized = {"model": {"encoder": {"width": 8}}}
    assert weight_source.complete_recipe(sized, theirs, ("encoder",))["model"] == sized["model"]
    # A pretrained encoder has no sizes of a Conformer.
    other = {"model": {"encoder": {"path": "whisper"}, "llm": {"path": "my/lm"}}}
    assert weight_source.complete_recipe(other, SETTINGS, ("encoder",)) == {**other, "data": {}}
    assert weight_source.complete_recipe(own, {}, weight_source.PARTS) == own


def test_the_llm_brings_its_prompt_and_the_head_its_units():
    data = {"phonemes": "p.json", "phonemizer": {"kind": "characters"}, "text": {"case": "lower"}}
    model = {
        "llm": {"path": "lm"}, "prompt": "<a><speech>", "languages": {"en": "English"},
        "adaptor": {"kind": "ctc"}, "pretrain": {"head": {"layers": 3}, "spec": None},
    }  # fmt: skip
    decode = {"beam": 8, "ctc_weight": 0.5}
    settings = {"data": data, "model": model, "evaluation": {"decode": decode}}
    own = {"model": {"pretrain": {"chunks": None}}, "evaluation": {"decode": {"beam": 2}}}
    whole = weight_source.complete_recipe(own, settings, weight_source.PARTS)
    assert whole["data"] == data and whole["evaluation"]["decode"] == decode | {"beam": 2}
    assert whole["model"]["pretrain"] == {"head": {"layers": 3}, "chunks": None}
    own["evaluation"]["decode"] = {"beam": 1}
    whole = weight_source.complete_recipe(own, settings, weight_source.PARTS)
    assert whole["evaluation"]["decode"] == {"beam": 1}
    assert whole["model"]["prompt"] == "<a><speech>"
    assert whole["model"]["languages"] == {"en": "English"}
    # Without their language model neither, and without their head not its weight.
    own_llm = {"model": {"llm": {"path": "mine"}}}
    other = weight_source.complete_recipe(own_llm, settings, weight_source.PARTS)
    assert "prompt" not in other["model"] and "text" not in other["data"]
    whole = weight_source.complete_recipe({}, settings, ("encoder", "llm"))
    assert whole["evaluation"]["decode"] == {"beam": 8}


def test_an_exports_paths_are_its_own_folders(tmp_path):
    """Whatever its config.json says: "Data is not code"."""
    values = {"model_type": "dsasr", "format": 1, "encoder": {"path": "../../etc"}, "adaptor": {}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    settings = weight_source.read_settings(tmp_path)
    assert settings["model"]["encoder"]["path"] == str(tmp_path / export_folder.ENCODER)
    with pytest.raises(UserError, match="has no weights"):
        weight_source.locate_source(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**values, "format": 9}))
    assert weight_source.read_settings(tmp_path) == {}
    with pytest.raises(UserError, match="format 9"):
        weight_source.locate_source(tmp_path)


def test_files_of_a_source_that_is_gone_are_those_of_its_copy(tmp_path):
    model, copy = tmp_path / "model", tmp_path / "run" / "init_from"
    for folder in ("llm", "encoder"):
        (model / folder).mkdir(parents=True)
    names = ("cmvn.json", "encoder/config.json", "encoder/preprocessor_config.json",
             "encoder/processor_config.json", "llm/config.json", "llm/tokenizer.model")  # fmt: skip
    for name in (*names, "llm/model.safetensors"):
        (model / name).write_text(name)
    export_folder.copy_without_weights(model, copy)
    files = sorted(str(p.relative_to(copy)) for p in copy.rglob("*") if p.is_file())
    assert files == sorted(names)
    path, copies = str(model / "llm"), {str(model): copy}
    assert export_folder.original_or_copy(path, copies) == path
    model.rename(tmp_path / "elsewhere")
    assert export_folder.original_or_copy(path, copies) == str(copy / "llm")
    for elsewhere in ("", "gone/llm", str(model / "other")):
        assert export_folder.original_or_copy(elsewhere, copies) == elsewhere
