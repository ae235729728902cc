"""The tokenizer.json of a trained tokenizer gives its ids."""

from __future__ import annotations

import random

import pytest

from dsasr.data.text.tokenizer_json import has_trained_tokenizer, write_tokenizer_json
from dsasr.data.text.tokenizers import IM_END, PAD
from dsasr.data.text.train_tokenizer import train_tokenizer

LINES = ["打开 wifi 吧", "turn on the light", "今天 天气 很 好", "play some music now",
         "please call 小明 now", "把 volume 调到 50 percent", "don't stop 3 times"]  # fmt: skip
ODD = ["", " ", "wifi吧", "吧wifi", " 吧 , wifi  ,吧 x", "3 吧", "3", "，。", "½ 打 开", "a  b",
       "打  开", "x\ty", "１２ab中文", "ünknown žluť 龘 🙂", "नमस्ते 打", "tell　him"]  # fmt: skip


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """(the trained tokenizer, transformers' of the tokenizer.json)."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text").write_text("\n".join(LINES * 5))
    trained = train_tokenizer([folder / "text"], folder / "trained", size=400)
    (folder / "json").mkdir()
    assert has_trained_tokenizer(folder / "trained") and not has_trained_tokenizer(folder)
    write_tokenizer_json(folder / "trained", folder / "json")
    return trained, AutoTokenizer.from_pretrained(folder / "json")


def test_ids_are_those_of_the_training(both):
    trained, plain = both
    rng = random.Random(0)
    drawn = [
        "".join(rng.choices("ab 打开好 ,.3é½🙂'wifi", k=rng.randint(2, 14))) for _ in range(999)
    ]
    for text in [*LINES, *ODD, *(text for text in drawn if text.strip() != ".")]:
        ids = plain(text, add_special_tokens=False)["input_ids"]
        assert ids == trained.encode(text), repr(text)
    assert len(plain) == trained.vocab_size


def test_special_tokens_and_sentences_of_the_prompt_keep_their_ids(both):
    trained, plain = both
    assert plain.eos_token_id == trained.end_id == plain.convert_tokens_to_ids(IM_END)
    assert plain.pad_token_id == trained.pad_id == plain.convert_tokens_to_ids(PAD)
    sentence = max(trained.phrases, key=len)
    assert plain(sentence, add_special_tokens=False)["input_ids"] == trained.encode(sentence)


def test_text_is_decoded(both):
    trained, plain = both
    for text in ("turn on the light", "tell ünknown 3"):
        assert plain.decode(trained.encode(text)) == text
