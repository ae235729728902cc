"""Models that are partitioned while they are loaded equal models that are loaded whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsasr import recipe
from dsasr.build import Builder
from dsasr.data.text.phoneme_vocab import PhonemeVocab
from dsasr.engine.config import EngineConfig, read_ds_config
from dsasr.engine.partitioner import partitioner
from dsasr.model import layerwise_init
from dsasr.model.llm import load_llm
from dsasr.model.llm_sharded_load import TensorFiles, draw_llm, match_tensors
from dsasr.utils.errors import UserError

PROGRAM = Path(__file__).parents[1] / "programs" / "sharded_load.py"


def copy_lm(tiny: Path, to: Path, **config) -> dict[str, torch.Tensor]:
    """The tiny language model's folder without its weights, which are returned."""
    source = tiny.parent / "lm"
    shutil.copytree(source, to, ignore=shutil.ignore_patterns("*.safetensors"))
    merged = json.loads((to / "config.json").read_text()) | config
    (to / "config.json").write_text(json.dumps(merged))
    return load_file(source / "model.safetensors")


def two_shards(tiny: Path, to: Path, tied: bool = False) -> Path:
    """The tiny language model in bf16 and two files, with a tied head or another."""
    weights = copy_lm(tiny, to, tie_word_embeddings=tied, dtype="bfloat16")
    if not tied:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].flip(0).contiguous()
    names = sorted(weights)
    files = {n: f"model-{1 + (i % 2):05d}-of-00002.safetensors" for i, n in enumerate(names)}
    for file in set(files.values()):
        part = {n: weights[n].bfloat16() for n in names if files[n] == file}
        save_file(part, to / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": files}
    (to / "model.safetensors.index.json").write_text(json.dumps(index))
    return to


def unprefixed(tiny: Path, to: Path) -> Path:
    """The tiny language model as its base model saves itself: names that are not the whole's."""
    weights = {n.removeprefix("model."): w for n, w in copy_lm(tiny, to).items()}
    save_file(weights, to / "model.safetensors", metadata={"format": "pt"})
    return to


def token_units(tiny: Path) -> list[str]:
    return Builder(recipe.load(str(tiny), ["data.phonemizer={kind: tokens}"])).phonemizer.phonemes(
        "ba do fi gu"
    )


@pytest.mark.launcher
def test_partitioned_models_equal_whole_ones(launch, tiny, tmp_path):
    settings = read_ds_config("zero3")
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 200
    persistent = tmp_path / "persistent.json"
    persistent.write_text(json.dumps(settings))
    shards = two_shards(tiny, tmp_path / "shards")
    lora = ["model.lora={rank: 2}",
            "stages.joint.trains={encoder: 1.0e-4, adaptor: 1.0e-3, lora: 1.0e-3}"]  # fmt: skip
    PhonemeVocab.build([token_units(tiny)]).save(tmp_path / "tokens.json")
    tokens = [f"data.phonemes={tmp_path}/tokens.json", "data.phonemizer={kind: tokens}",
              "model.adaptor={kind: ctc}"]  # fmt: skip
    cases = {
        "plain": ["engine.precision=fp32"],
        "shards": ["engine.precision=bf16", f"model.llm.path={shards}", *lora],
        "random": ["engine.precision=bf16", "model.llm.weights=false",
                   f"engine.deepspeed={persistent}"],
        "tokens": ["engine.precision=fp32", *tokens],
        "other_names": [f"model.llm.path={unprefixed(tiny, tmp_path / 'base')}"],
    }  # fmt: skip
    words = [word for name, overrides in cases.items() for word in (f"{name}:", *overrides)]
    process = launch(PROGRAM, tiny, tmp_path, *words)
    assert process.returncode == 0, process.stdout[-3000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report.keys() == cases.keys() and report["plain"].keys() == {"pretrain", "sft"}
    for case, branches in report.items():
        for name, branch in branches.items():
            for check in ("initial", "losses", "final", "trained", "buffers"):
                assert branch[check], f"{case}, {name}: {check}"
            if case != "other_names":  # loaded whole, with a message
                assert branch["peak"] < 0.6 * branch["total"], f"{case}, {name}: too much in memory"
    assert "loads it whole" in process.stdout
    assert any("lora_B" in name for name in report["shards"]["sft"]["names"])
    assert "sft/llm.lm_head.weight" in report["shards"]["sft"]["names"]
    assert "sft/llm.lm_head.weight" not in report["plain"]["sft"]["names"]  # tied


def test_zero_1_and_2_build_whole_models():
    assert partitioner(EngineConfig(deepspeed="zero2")) is None
    assert partitioner(EngineConfig(deepspeed="zero1")) is None


def test_layers_are_filled_in_turn_and_shared_weights_once():
    with torch.device("meta"):
        model = torch.nn.Sequential(
            torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Linear(3, 4, bias=False)
        )
    model[2].weight = model[0].weight
    filled, partitioned = [], []
    layerwise_init.materialize(
        model,
        lambda _, layer: [filled.append(name) or p.fill_(len(filled)) for name, p in layer.items()],
        partitioned.append,
    )
    assert filled == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert [len(layer) for layer in partitioned] == [2, 2]
    assert model[2].weight is model[0].weight is partitioned[0][0]
    assert [float(p.detach().mean()) for p in model.parameters()] == [1, 2, 3, 4]


def test_a_folder_in_two_files_is_read_by_name(tiny, tmp_path):
    tied = two_shards(tiny, tmp_path / "tied", tied=True)
    files = TensorFiles(tied)
    whole = load_llm(tied)
    file_names = match_tensors(whole, files)
    assert file_names["lm_head.weight"] == file_names["model.embed_tokens.weight"]
    for name, parameter in whole.named_parameters():
        actual = torch.empty(parameter.shape)
        files.read(file_names[name], actual)
        assert torch.equal(actual, parameter)
    assert match_tensors(whole, TensorFiles(unprefixed(tiny, tmp_path / "base"))) is None
    truncated = tied / "model-00002-of-00002.safetensors"
    whole_file = truncated.read_bytes()
    truncated.write_bytes(whole_file[:-20])
    with pytest.raises(UserError, match="00002-of-00002"):
        TensorFiles(tied)
    truncated.unlink()
    with pytest.raises(UserError, match="lacks model-00002-of-00002"):
        TensorFiles(tied)
    (tied / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match=r"index\.json"):
        TensorFiles(tied)


def test_a_recipe_takes_a_folder_in_two_files(tiny, tmp_path):
    shards = two_shards(tiny, tmp_path / "shards")
    model = Builder(recipe.load(str(tiny), [f"model.llm.path={shards}"])).speech_llm()
    embeddings = load_file(tiny.parent / "lm" / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(model.llm.lm_head.weight, embeddings.flip(0).bfloat16().float())


def test_random_weights_come_from_the_recipes_seed(tiny):
    folder = tiny.parent / "lm"
    state = torch.get_rng_state()
    first, rms = draw_llm(folder, 1, None, attn="sdpa", dropout=0.0)
    again, _ = draw_llm(folder, 1, None, attn="sdpa", dropout=0.0)
    second_seed, _ = draw_llm(folder, 2, None, attn="sdpa", dropout=0.0)
    assert torch.equal(torch.get_rng_state(), state)
    pairs = list(zip(first.parameters(), again.parameters(), second_seed.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert any(not torch.equal(a, c) for a, _, c in pairs)
    assert rms == pytest.approx(first.config.initializer_range, rel=0.05)
    assert first.lm_head.weight is first.model.embed_tokens.weight
    ids = torch.arange(4)[None]
    reference = load_llm(folder).eval()
    reference.load_state_dict(first.state_dict())
    torch.testing.assert_close(first.eval()(ids).logits, reference(ids).logits, atol=0, rtol=0)
