import math
from dataclasses import replace

import pytest
import torch

from dsasr.data.text.characters import CharacterPhonemizer
from dsasr.data.text.prompt import Prompt
from dsasr.data.text.tokenizers import check_tokenizer, load_tokenizer
from dsasr.data.text.train_tokenizer import train_tokenizer
from dsasr.demo.small_lm import (
    SmallLmConfig,
    build_small_lm,
    lm_batch,
    make_small_lm,
    perplexity,
    pretrain,
    reading_batches,
)
from dsasr.utils.errors import UserError

TEXTS = [f"turn {way} the {what}" for way in ("on", "off") for what in ("radio", "lights")] * 20
TINY = SmallLmConfig(
    hidden=32, layers=2, heads=2, kv_heads=1, head_dim=16, ffn=64, steps=60, batch=16, lr=1e-2
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm")
    (folder / "text.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    train_tokenizer([folder / "text.txt"], folder / "tok", size=300)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder / "tok")


def test_batch_layout():
    inputs, targets = lm_batch([[5, 6], [7]], [1, 2], end_id=3, pad_id=0)
    assert inputs.tolist() == [[1, 2, 5, 6], [1, 2, 7, 0]]
    assert targets.tolist() == [[-100, 5, 6, 3], [-100, 7, 3, -100]]
    inputs, targets = lm_batch([[5, 6], [7]], [], end_id=3, pad_id=0)
    assert inputs.tolist() == [[5, 6], [7, 0]]
    assert targets.tolist() == [[6, 3], [3, -100]]


def test_shape(tokenizer):
    llm = build_small_lm(TINY, tokenizer)
    assert llm.config.model_type == "qwen3"
    assert llm.config.vocab_size % 64 == 0
    check_tokenizer(tokenizer, llm.config.vocab_size)
    assert llm.lm_head.weight is llm.model.embed_tokens.weight
    assert llm.config.eos_token_id == tokenizer.end_id


def test_build_is_seeded_and_leaves_torch_alone(tokenizer):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one = build_small_lm(TINY, tokenizer).state_dict()
    assert torch.equal(torch.rand(3), expected)
    two = build_small_lm(TINY, tokenizer).state_dict()
    other = build_small_lm(replace(TINY, seed=1), tokenizer).state_dict()
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert any(not torch.equal(one[k], other[k]) for k in one)


def test_untrained_perplexity_is_the_vocabulary(tokenizer):
    llm = build_small_lm(TINY, tokenizer)
    with torch.no_grad():
        llm.model.embed_tokens.weight.zero_()
    size = llm.config.vocab_size
    assert perplexity(llm, [[5, 6], [7]], [1, 2]) == pytest.approx(size, rel=1e-5)


def test_perplexity_ignores_padding_and_batching(tokenizer):
    llm = build_small_lm(TINY, tokenizer)
    sequences = [[260, 261, 262, 263], [264], [265, 266]]
    prompt, end = [2, 3], llm.config.eos_token_id
    total = 0.0
    for sequence in sequences:
        ids = torch.tensor([[*prompt, *sequence, end]])
        logits = llm(ids).logits.detach().log_softmax(-1)
        total -= sum(float(logits[0, i - 1, ids[0, i]]) for i in range(len(prompt), ids.shape[1]))
    expected = math.exp(total / sum(len(s) + 1 for s in sequences))
    assert perplexity(llm, sequences, prompt) == pytest.approx(expected, rel=1e-5)


def test_it_learns_the_grammar(tokenizer):
    """Four sentences, two choices of two: ln 4 nats over the tokens of a sentence at best."""
    llm = build_small_lm(TINY, tokenizer)
    sequences = [tokenizer.encode(text) for text in TEXTS]
    prefix, suffix = Prompt.build(tokenizer)
    losses = pretrain(llm, sequences, (prefix, suffix), TINY, progress=False)
    assert len(losses) == TINY.steps and losses[-1] < losses[0]
    best = 4 ** (1 / (len(sequences[0]) + 1))
    assert perplexity(llm, sequences, prefix + suffix) < 1.25 * best
    ids = llm.generate(torch.tensor([prefix + suffix]), max_new_tokens=10, do_sample=False)
    assert tokenizer.decode(ids[0, len(prefix + suffix) :].tolist()) in TEXTS


def test_reading_batches_are_text_only_ones(tokenizer):
    batch = next(reading_batches(TEXTS, CharacterPhonemizer(), tokenizer, TINY))
    assert batch.text_only and len(batch) == TINY.batch
    row = batch.tokens_BU[0, : batch.token_lengths_B[0] - 1].tolist()
    assert tokenizer.decode(row) == batch.texts[0] and batch.texts[0] in TEXTS
    spelled = [len(CharacterPhonemizer().phonemes(text, "")) for text in batch.texts]
    assert batch.phoneme_lengths_B.tolist() == spelled


def test_it_learns_to_read(tokenizer):
    """Phonemes say which of the four sentences it is: less than the ln 4 nats of text alone."""
    config = replace(TINY, steps=150, spoken=1.0)
    llm = build_small_lm(config, tokenizer)
    sequences = [tokenizer.encode(text) for text in TEXTS]
    reading = reading_batches(TEXTS, CharacterPhonemizer(), tokenizer, config)
    prompt = Prompt.build(tokenizer)
    losses = pretrain(llm, sequences, prompt, config, reading=reading, progress=False)
    assert sum(losses[-10:]) / 10 < 0.5 * math.log(4) / (len(sequences[0]) + 1)


def test_folder_is_whole_repeatable_and_skipped_when_done(folder):
    from transformers import AutoModelForCausalLM

    config = replace(TINY, steps=5)
    texts = [folder / "text.txt"]
    report = make_small_lm(texts, folder / "tok", folder / "lm", config, progress=False)
    weights = folder / "lm" / "model.safetensors"
    first, stamp = weights.read_bytes(), weights.stat().st_mtime_ns
    assert make_small_lm(texts, folder / "tok", folder / "lm", config, progress=False) == report
    assert weights.stat().st_mtime_ns == stamp
    make_small_lm(texts, folder / "tok", folder / "lm", config, fresh=True, progress=False)
    assert weights.stat().st_mtime_ns != stamp and weights.read_bytes() == first

    llm, info = AutoModelForCausalLM.from_pretrained(folder / "lm", output_loading_info=True)
    assert not any(info.values())
    tokenizer = load_tokenizer(folder / "lm")  # the model's folder is the tokenizer's, too
    check_tokenizer(tokenizer, llm.config.vocab_size)
    prefix, suffix = Prompt.build(tokenizer)
    sequences = [tokenizer.encode(text) for text in TEXTS[::50]]
    assert perplexity(llm, sequences, prefix + suffix) == pytest.approx(
        report["heldout_perplexity"], rel=1e-4
    )


def test_errors(folder, tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        make_small_lm([tmp_path / "none.txt"], folder / "tok", tmp_path / "lm", TINY)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="something else"):
        make_small_lm([folder / "text.txt"], folder / "tok", tmp_path / "mine", TINY)
    with pytest.raises(UserError, match="multiple"):
        SmallLmConfig(heads=3, kv_heads=2)
    with pytest.raises(UserError, match="above 0"):
        SmallLmConfig(layers=0)
