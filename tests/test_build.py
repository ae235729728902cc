"""The recipe's data settings reach the dataloader and the model that a run builds."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch

from dsasr import recipe
from dsasr.build import Builder
from dsasr.data.audio.decoding import decode
from dsasr.data.audio.features import fbank
from dsasr.data.shards.build_index import build_index
from dsasr.data.shards.sample import read_sample
from dsasr.data.text.phoneme_vocab import PhonemeVocab
from dsasr.data.text.train_tokenizer import train_tokenizer
from dsasr.training import preflight
from dsasr.utils.errors import UserError


def load_batches(tiny: Path, stage: str, count: int, *overrides: str) -> list:
    cfg = recipe.load(str(tiny), overrides)
    with Builder(cfg).train_dataloader(cfg.stage(stage), None) as stream:
        return [next(stream) for _ in range(count)]


@pytest.mark.parametrize("workers", [0, 1])
def test_features_are_computed_where_the_recipe_says_and_are_the_same(tiny, workers) -> None:
    """By workers or in the training process: `fbank`'s, normalized, to a thousandth."""
    override = f"data.dataloader.num_workers={workers}"
    by_worker = load_batches(tiny, "pretrain", 6, override, "data.dataloader.features=worker")
    by_device = load_batches(tiny, "pretrain", 6, override, "data.dataloader.features=device")
    cmvn = Builder(recipe.load(str(tiny))).cmvn
    for a, b in zip(by_worker, by_device, strict=True):
        assert a.keys == b.keys and torch.equal(a.feature_lengths_B, b.feature_lengths_B)
        torch.testing.assert_close(a.features_BTF, b.features_BTF, atol=1e-3, rtol=0)
        entry = next(e for e in build_index(a.shards[0]) if e.key == a.keys[0])
        wave = decode(read_sample(a.shards[0], entry).audio)
        expected = cmvn.apply(fbank(wave, recipe.load(str(tiny)).data.fbank))
        for batch in (a, b):
            features = batch.features_BTF[0, : len(expected)]
            torch.testing.assert_close(features, expected, atol=1e-3, rtol=0)
        assert a.stats["feature_s"] > 0


def test_a_stages_mixture_has_its_own_weights_and_sets(tiny) -> None:
    folder = tiny.parent
    sets = [
        {"name": name, "shards": str(folder / split), "weight": weight}
        for name, split, weight in (("a", "train", 1.0), ("b", "valid", 1.0))
    ]
    override = f"data.train={json.dumps(sets)}"
    mixed = load_batches(tiny, "pretrain", 60, override, "stages.pretrain.mixture={a: 3, b: 1}")
    from_valid = Counter(batch.keys[0].startswith("valid") for batch in mixed)
    assert from_valid == {False: 45, True: 15}
    alone = load_batches(tiny, "align", 20, override, "stages.align.mixture={b: 1}")
    assert all(key.startswith("valid") for batch in alone for key in batch.keys)
    # Exactly once an epoch, whatever the weights.
    for name, count in (("train", 52), ("valid", 8)):
        mine = [(b.epoch, k) for b in mixed for k in b.keys if k.startswith(name)]
        first = Counter(key for epoch, key in mine if epoch == 0)
        assert len(first) == count and set(first.values()) == {1}
    with pytest.raises(UserError, match="unknown dataset 'c'"):
        load_batches(tiny, "align", 1, override, "stages.align.mixture={c: 1}")


def test_recorded_noise_comes_from_the_recipes_shards(tiny) -> None:
    noise = f"data.dataloader.noise={{{tiny.parent / 'valid'}: 1.0}}"
    augment = "data.augment={speeds: [1.0], noise_share: 1.0, silence: 0.0, kinds: [recorded]}"
    clean = load_batches(tiny, "pretrain", 3)
    noisy = load_batches(tiny, "pretrain", 3, noise, augment)
    assert [b.keys for b in clean] == [b.keys for b in noisy]
    assert all((a.features_BTF - b.features_BTF).abs().mean() > 0.1
               for a, b in zip(clean, noisy, strict=True))  # fmt: skip
    with pytest.raises(UserError, match=r"dataloader\.noise"):
        load_batches(tiny, "pretrain", 1, augment)


def test_packed_rows_have_the_unpacked_loss(tiny) -> None:
    """`model.llm.pack` end to end: the recipe's model on the stage's own batches."""
    batches = load_batches(tiny, "ia_sft", 3)
    losses = []
    for pack in (0, 90, 400):
        cfg = recipe.load(str(tiny), [f"model.llm.pack={pack}"])
        model = Builder(cfg).speech_llm().eval()
        rows = []
        forward = model.llm.base_model.forward

        def count(*args, inputs_embeds, forward=forward, rows=rows, **kwargs):
            rows.append(inputs_embeds.shape[:2])
            return forward(*args, inputs_embeds=inputs_embeds, **kwargs)

        model.llm.base_model.forward = count
        with torch.no_grad():
            losses.append([float(model(batch).loss) for batch in batches])
        if pack:
            assert all(r < len(b) and n <= pack for (r, n), b in zip(rows, batches, strict=True))
        else:
            assert [r for r, _ in rows] == [len(b) for b in batches]
    for packed in losses[1:]:
        assert packed == pytest.approx(losses[0], abs=1e-5)


def test_token_budgets_bound_the_language_models_rows(tiny) -> None:
    over = "stages.align.batch={frames: 400, tokens: 120, min_seconds: 0.05, prompt_tokens: 20}"
    batches = load_batches(tiny, "align", 20, over)
    assert max(len(b) for b in batches) < max(len(b) for b in load_batches(tiny, "align", 20))
    for batch in batches:
        positions = 20 + -(-batch.feature_lengths_B // 16) + batch.token_lengths_B
        assert len(batch) * int(positions.max()) <= 120


def test_a_token_budget_must_count_speech_and_prompt_as_the_model_does(tiny) -> None:
    over = "stages.align.batch={frames: 400, tokens: 200"
    with pytest.raises(UserError, match=r"batch\.frames_per_token=16"):
        recipe.load(str(tiny), [f"{over}, frames_per_token: 32}}"])
    cfg = recipe.load(str(tiny), [f"{over}, frames_per_token: 32}}", "model.adaptor.stack=8"])
    preflight.check(Builder(cfg))
    with pytest.raises(UserError, match=r"batch\.prompt_tokens"):
        preflight.check(Builder(recipe.load(str(tiny), [f"{over}, prompt_tokens: 1}}"])))


ADAPTORS = [
    "{kind: conv, hidden: 12}",
    "{kind: conv, stack: 3, hidden: 12}",
    "{kind: qformer, hidden: 12, heads: 3, stack: 6, queries: 2}",
    "{kind: ctc, frames: true}",
]


@pytest.mark.parametrize("adaptor", ADAPTORS)
def test_every_adaptor_is_drawn_from_the_seed_whole_or_by_layers(tiny, adaptor) -> None:
    cfg = recipe.load(str(tiny), [f"model.adaptor={adaptor}"])
    preflight.check(Builder(cfg))
    first, again = Builder(cfg).speech_llm(), Builder(cfg).speech_llm(lambda parameters: None)
    other = Builder(recipe.load(str(tiny), [f"model.adaptor={adaptor}", "seed=2"])).speech_llm()
    for (name, a), b, c in zip(
        first.adaptor.named_parameters(),
        again.adaptor.parameters(),
        other.adaptor.parameters(),
        strict=True,
    ):
        assert torch.equal(a, b) and a.isfinite().all(), name
        assert a.dim() == 1 or "project" in name or not torch.equal(a, c), name
    scale = first.llm.get_input_embeddings().weight.square().mean().sqrt()
    assert float(first.adaptor.scale) == pytest.approx(float(scale))
    batch = load_batches(tiny, "align", 1)[0]
    assert first.eval()(batch).loss.isfinite()


def test_a_ctc_that_writes_tokens_is_read_as_the_language_models_own(tiny, tmp_path) -> None:
    settings = ["data.phonemizer={kind: tokens}", f"data.phonemes={tmp_path}/tokens.json"]
    phonemizer = Builder(recipe.load(str(tiny), settings[:1])).phonemizer
    units = phonemizer.phonemes("ba do fi gu")
    PhonemeVocab.build([units]).save(tmp_path / "tokens.json")
    build = Builder(recipe.load(str(tiny), [*settings, "model.adaptor={kind: ctc}"]))
    model = build.speech_llm()
    for unit in units:
        (number,) = (n for n, piece in build.tokenizer.pieces().items() if piece == unit)
        expected = model.llm.get_input_embeddings()(torch.tensor(number))
        row = model.adaptor.table[build.phonemes.encode([unit])[0]]
        torch.testing.assert_close(row, expected, rtol=1e-6, atol=0)
    assert build.speller("BA do", "en") == build.phonemes.encode(phonemizer.phonemes("ba do"))


def test_letters_start_as_the_mean_of_the_tokens_that_write_them(tiny, tmp_path) -> None:
    PhonemeVocab.build([["a", "ʃ", "▁"]]).save(tmp_path / "letters.json")
    build = Builder(recipe.load(str(tiny), [
        "data.phonemizer={kind: characters}", f"data.phonemes={tmp_path}/letters.json",
        "model.adaptor={kind: ctc}",
    ]))  # fmt: skip
    model = build.speech_llm()
    tokens = build.tokenizer.encode("ʃ")
    assert len(tokens) > 1  # bytes
    expected = model.llm.get_input_embeddings()(torch.tensor(tokens)).mean(0)
    row = model.adaptor.table[build.phonemes.encode(["ʃ"])[0]]
    torch.testing.assert_close(row, expected, rtol=1e-5, atol=1e-7)
    assert build.tokenizer.encode(" ") == []
    assert not model.adaptor.table[build.phonemes.encode(["▁"])[0]].any()


def test_the_recipes_prompt_is_the_models(tiny) -> None:
    template = "<|im_start|>play <speech><|im_end|>"
    build = Builder(recipe.load(str(tiny), [f"model.prompt={template}"]))
    model, marker = build.speech_llm(), build.tokenizer.special_id
    assert model.plain.prefix == (marker("<|im_start|>"), *build.tokenizer.encode("play "))
    assert model.plain.suffix == (marker("<|im_end|>"),)
    assert preflight.prompt_lines(build)[0].startswith("PROMPT  ")
    assert preflight.prompt_lines(build)[0].endswith(" <speech> [<|im_end|>]")
    with pytest.raises(UserError, match=r"<speech> 0 times"):
        recipe.load(str(tiny), ["model.prompt=Transcribe."])
    with pytest.raises(UserError, match="no token of the tokenizer"):
        preflight.check(Builder(recipe.load(str(tiny), ["model.prompt=<|en|><speech>"])))


def test_a_recipes_languages_reach_the_prompts_and_the_batches(tiny) -> None:
    over = ["model.prompt=play {lang} <speech>", "model.languages={en: fi, zh: gu}"]
    build = Builder(recipe.load(str(tiny), over))
    hinted, encode = build.speech_llm().hinted, build.tokenizer.encode
    assert {lang: prompt.prefix for lang, prompt in hinted.items()} == {
        "en": tuple(encode("play fi ")), "zh": tuple(encode("play gu "))
    }  # fmt: skip
    shown = " ".join(preflight.prompt_lines(build))
    assert "of 50% of the utterances in en, zh, as en:" in shown
    hints = [h for b in load_batches(tiny, "align", 12, *over) for h in b.hints]
    assert set(hints) == {"", "en"}
    of_pretrain = load_batches(tiny, "pretrain", 3, *over)
    assert {h for b in of_pretrain for h in b.hints} == {""}
    assert {h for b in load_batches(tiny, "align", 3) for h in b.hints} == {""}
    (batch,) = build.validation_batches("sft", utterances=1)[:1]
    assert set(batch.hints) == {""}
    preflight.check(build)
    length = max(len(prompt.prefix) for prompt in hinted.values())
    assert length > sum(map(len, build.prompt()))
    tight = f"data.dataloader.batch.prompt_tokens={length - 1}"
    with pytest.raises(UserError, match=f"prompt has {length} tokens"):
        preflight.check(
            Builder(recipe.load(str(tiny), [*over, tight, "data.dataloader.batch.tokens=4000"]))
        )


def test_joint_ctc_scores_need_units_that_are_parts_of_the_text(tiny) -> None:
    cfg = recipe.load(str(tiny), ["evaluation.decode.ctc_scores=joint"])
    with pytest.raises(UserError, match=r"kind is stored: leave it out, or give rescoring"):
        preflight.check(Builder(cfg))


def test_another_models_tokenizer_ends_before_training(tiny, tmp_path) -> None:
    text, lm = tmp_path / "text", tmp_path / "lm"
    text.write_text("all other words than those of the tones\n" * 9)
    train_tokenizer([text], tmp_path / "other", size=300)
    shutil.copytree(tiny.parent / "lm", lm)
    over = [f"model.llm.path={lm}", f"model.tokenizer={tmp_path / 'other'}"]
    with pytest.raises(UserError, match="not the language model's"):
        preflight.check(Builder(recipe.load(str(tiny), over)))
    preflight.check(Builder(recipe.load(str(tiny), [*over, "model.llm.weights=false"])))
    preflight.check(
        Builder(recipe.load(str(tiny), [over[0], f"model.tokenizer={tiny.parent / 'lm'}"]))
    )
    # A language model whose folder has no tokenizer, and whose texts end with another token.
    (lm / "dsasr_tokenizer.json").unlink()
    (lm / "tokenizer.model").unlink()
    preflight.check(Builder(recipe.load(str(tiny), over)))
    config = json.loads((lm / "config.json").read_text())
    (lm / "config.json").write_text(json.dumps(config | {"eos_token_id": [270, 271]}))
    with pytest.raises(UserError, match="ends a text with token 270"):
        preflight.check(Builder(recipe.load(str(tiny), over)))
