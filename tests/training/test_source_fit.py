"""Weights of another model that do not fit are refused in one line, before training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dsasr import config, recipe
from dsasr.checkpoint import tensor_fragments, zero_partition
from dsasr.checkpoint.export_folder import CHECKSUMS
from dsasr.checkpoint.manifest import DIGEST, MANIFEST
from dsasr.data.text.phoneme_vocab import PhonemeVocab
from dsasr.utils.errors import UserError


def snapshot_of(run: Path) -> Path:
    return run / "snapshots" / "encoder-000000000"


def checkpoint_of(run: Path) -> Path:
    return run / "checkpoints" / "step-0000000000"


def other_phonemes(tiny: Path, folder: Path) -> str:
    """As many symbols as the tiny recipe's, one of them another."""
    symbols = list(PhonemeVocab.load(tiny.parent / "phonemes.json").symbols[1:])
    PhonemeVocab([*symbols[:-1], "ʃ"]).save(folder / "phonemes.json")
    return f"data.phonemes={folder / 'phonemes.json'}"


def more_phonemes(tiny: Path, folder: Path) -> str:
    symbols = PhonemeVocab.load(tiny.parent / "phonemes.json").symbols[1:]
    PhonemeVocab([*symbols, "ʃ"]).save(folder / "phonemes.json")
    return f"data.phonemes={folder / 'phonemes.json'}"


def other_tokens(tiny: Path, folder: Path) -> str:
    """A language model whose tokenizer has as many tokens, one of them another."""
    shutil.copytree(tiny.parent / "lm", folder / "lm")
    meta = folder / "lm" / "dsasr_tokenizer.json"
    values = json.loads(meta.read_text())
    values["phrases"][-1] += "!"
    meta.write_text(json.dumps(values))
    return f"model.llm.path={folder / 'lm'}"


def other_epsilon(tiny: Path, folder: Path) -> str:
    shutil.copytree(tiny.parent / "lm", folder / "lm")
    values = json.loads((folder / "lm" / "config.json").read_text())
    values["rms_norm_eps"] = 0.1
    (folder / "lm" / "config.json").write_text(json.dumps(values))
    return f"model.llm.path={folder / 'lm'}"


@pytest.mark.parametrize(
    ("place", "change", "words"),
    [
        ("run", "model.encoder.ffn=48",
         r"'encoder\.blocks\.0\.ffn1.*' is \[32, 16\] there and \[48, 16\] here.*"
         r"another architecture; give model\.encoder\.ffn=32; .*init_parts=\[head, adaptor, llm\]"),
        ("model", "model.encoder.heads=4", r"other settings.*model\.encoder\.heads=2"),
        ("model", "data.fbank={shift_ms: 12.5}", r"other settings.*data\.fbank\.shift_ms=10\.0"),
        ("run", "model.adaptor.activation=silu", r"model\.adaptor\.activation=gelu"),
        ("run", "model.adaptor={stack: 2, hidden: 16}", r"adaptor\.weight1.*adaptor\.stack=4"),
        ("run", "model.pretrain.head.layers=1",
         r"its head has no 'ctc\.\S+': .*give model\.pretrain\.head\.layers=0;"),
        ("run", more_phonemes, r"'ctc\.\S+' is \[\d+.*\] there.*; give the data\.phonemes"),
        ("run", other_phonemes, r"head was trained with another vocabulary.*as data\.phonemes"),
        ("run", other_tokens, r"llm was trained with another vocabulary.*as model\.tokenizer"),
        ("model", other_tokens, r"llm was trained with another vocabulary"),
        ("model", other_epsilon, r"rms_norm_eps=1e-06.*model\.llm\.path has 0\.1"),
        ("model", "model.init_parts=[lora]", r"no part 'lora'"),
        ("run", "model.init_parts=[adaptor, lora]", r"no part 'lora'.*init_parts=\[adaptor\]"),
        ("lora", "seed=1", r"LoRA.*model\.lora=\{rank: 2, alpha: 32\.0\}.*export"),
        ("corpus", "seed=1", "no exported model, run, checkpoint or snapshot"),
        ("lm", "seed=1", r"Hugging Face model belongs into model\.llm\.path"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line_before_training(
    tiny, source, tmp_path, place, change, words, trainer_of
):
    folder = {"corpus": tiny.parent, "lm": tiny.parent / "lm"}.get(place, source / place)
    override = change if isinstance(change, str) else change(tiny, tmp_path)
    with pytest.raises(UserError, match=words) as caught:
        trainer_of(tmp_path / "run", f"model.init_from={folder}", override)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("model.init_from=")
    assert not (tmp_path / "run" / "recipe.yaml").exists()
    # What the message offers works.
    if "init_parts=[head, adaptor" in words:
        parts = "model.init_parts=[head, adaptor, llm]"
        trainer_of(tmp_path / "run", f"model.init_from={folder}", override, parts).close()


def test_a_head_of_more_layers_is_refused(tiny, source, tmp_path, trainer_of):
    deep = "model.pretrain.head.layers=1"
    trainer = trainer_of(tmp_path / "deep", deep)
    for branch in trainer.recipe.branches:
        trainer.branches.get(branch)
    assert trainer.save()
    given = f"model.init_from={tmp_path / 'deep'}"
    words = (
        r"its head has 'ctc\.\S+', which this model's has not: .*model\.pretrain\.head\.layers=1"
    )
    with pytest.raises(UserError, match=words):
        trainer_of(tmp_path / "run", given, "model.pretrain.head.layers=0")
    # Left out, the settings are the source's.
    assert trainer_of(tmp_path / "run", given).builder.recipe.model.pretrain.head.layers == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [(["rank=4"], r"lora_A.*\[2, 16\] there and \[4, 16\] here.*model\.lora\.rank=2"),
     (["alpha=16"], r"lora was trained with other settings.*model\.lora\.alpha=32"),
     (["targets=[q_proj]"], r"model\.lora has not: give model\.lora=\{rank: 2, alpha")],
)  # fmt: skip
def test_another_lora_is_refused(source, tmp_path, change, words, trainer_of, lora_overrides):
    overrides = [*lora_overrides, *(f"model.lora.{c}" for c in change)]
    with pytest.raises(UserError, match=words):
        trainer_of(tmp_path / "run", f"model.init_from={source / 'lora'}", *overrides)


def test_a_torn_or_altered_source_is_refused(source, tmp_path, trainer_of):
    for name in ("model", "run"):
        shutil.copytree(source / name, tmp_path / name)
    (tmp_path / "run" / "snapshots" / "PUBLISHER").unlink()
    file = tmp_path / "model" / "model.safetensors"
    shutil.copytree(tmp_path / "model", tmp_path / "older")
    (tmp_path / "older" / CHECKSUMS).unlink()
    (tmp_path / "older" / file.name).write_bytes(file.read_bytes()[:-8])
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    snapshot, checkpoint = snapshot_of(tmp_path / "run"), checkpoint_of(tmp_path / "run")
    for folder in (snapshot, checkpoint):
        file = folder / "rank-00000.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1  # a flipped bit
        file.write_bytes(content)
    for override, words in (
        (f"init_from={tmp_path / 'model'}", r"model\.safetensors was altered"),
        (f"init_from={tmp_path / 'older'}", r"model\.safetensors cannot be read"),
        (f"init_from={tmp_path / 'run'}", "no whole checkpoint.*altered"),
        (f"init_from={checkpoint}", "altered"),
        (f"encoder_from={snapshot}", "altered"),
    ):
        with pytest.raises(UserError, match=f"^model.{override.split('=')[0]}=.*{words}") as caught:
            trainer_of(tmp_path / "new", f"model.{override}")
        assert "\n" not in str(caught.value) and not (tmp_path / "new" / "recipe.yaml").exists()


@pytest.mark.parametrize("known", ["manifest", "recipe", "fingerprint"])
def test_a_snapshot_of_another_architecture_is_refused(source, tmp_path, known, trainer_of):
    """By its own settings, by the recipe of its run, or where neither is there by a fingerprint."""
    folder = tmp_path / "runs" / "snapshots" / "encoder-000000000"
    shutil.copytree(snapshot_of(source / "run"), folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    if known != "manifest":
        del manifest["encoder"], manifest[DIGEST]  # an older one has neither
        (folder / MANIFEST).write_text(json.dumps(manifest))
    if known == "recipe":
        shutil.copy(source / "run" / "recipe.yaml", folder.parents[1])
    words = "may be of another architecture" if known == "fingerprint" else r"encoder\.heads=2"
    for branch in ("pretrain", "sft"):
        overrides = [f"model.encoder_from={folder}", f"branch={branch}"]
        with pytest.raises(UserError, match=f"encoder_from=.*{words}"):
            trainer_of(tmp_path / f"{branch}-4", "model.encoder.heads=4", *overrides)
        trainer_of(tmp_path / branch, *overrides).close()
    if known != "fingerprint":
        overrides = [f"model.encoder_from={folder}", "model.encoder.dropout=0.3"]
        trainer_of(tmp_path / "dropout", *overrides).close()
    with pytest.raises(UserError, match=r"'encoder\.blocks\.1.*another architecture"):
        trainer_of(tmp_path / "deeper", f"model.encoder_from={folder}", "model.encoder.layers=2")


def test_weights_that_are_not_finite_are_refused(source, tmp_path, trainer_of):
    trainer = trainer_of(tmp_path / "source")
    module = trainer.branches.get("pretrain").module
    next(module.encoder.parameters()).data.fill_(float("nan"))
    tensor_fragments.write_folder(
        tmp_path / "nan", zero_partition.weight_fragments(module),
        {"kind": "snapshot", "id": "nan", "encoder": config.to_plain(trainer.recipe.model.encoder)},
    )  # fmt: skip
    trainer.close()
    with pytest.raises(UserError, match=r"model\.encoder_from.*not finite"):
        trainer_of(tmp_path / "run", f"model.encoder_from={tmp_path / 'nan'}")


def test_parts_are_named_in_the_recipe_s_words(tiny):
    for words, override in (
        ("did you mean 'encoder'", ["model.init_from=x", "model.init_parts=[encodr]"]),
        ("not given", ["model.init_parts=[encoder]"]),
        ("both give the encoder", ["model.init_from=x", "model.encoder_from=y",
                                   "model.init_parts=[encoder]"]),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words):
            recipe.load(str(tiny), override)
