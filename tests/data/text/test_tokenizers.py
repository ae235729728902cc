"""Both kinds of tokenizer: round trips, special tokens, folders that are none."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsasr.data.text.normalization import normalize_text
from dsasr.data.text.prompt import Prompt
from dsasr.data.text.tokenizers import (
    IM_END,
    IM_START,
    META_NAME,
    HfTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    check_tokenizer,
    load_tokenizer,
    vocabulary_fingerprint,
)
from dsasr.utils.errors import UserError


def test_a_fingerprint_is_of_every_token_and_its_id(tokenizer):
    vocabulary = tokenizer.vocabulary()
    assert max(vocabulary.values()) + 1 == tokenizer.vocab_size
    assert vocabulary[IM_END] == tokenizer.end_id
    fingerprint = vocabulary_fingerprint(tokenizer)
    assert len(fingerprint) == 12 and fingerprint == vocabulary_fingerprint(tokenizer)
    tokenizer.vocabulary = lambda: vocabulary | {IM_END: 0, next(iter(vocabulary)): 1}
    assert vocabulary_fingerprint(tokenizer) != fingerprint


def test_kinds(trained, hugging_face, sentences):
    assert isinstance(load_tokenizer(trained), SentencePieceTokenizer)
    assert isinstance(load_tokenizer(hugging_face), HfTokenizer)
    assert isinstance(load_tokenizer(trained), Tokenizer)
    with pytest.raises(UserError, match="</s>"):  # without its meta file no end token is known
        bare = trained.parent / "bare.model"
        import sentencepiece

        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_prefix=str(bare.with_suffix("")),
            vocab_size=60,
            hard_vocab_limit=False,
            bos_id=-1,
            eos_id=-1,
            minloglevel=2,
        )
        load_tokenizer(bare)


def test_plain_sentencepiece_model(tmp_path, sentences):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    for path in (tmp_path / "tokenizer.model", tmp_path):
        tokenizer = load_tokenizer(path)
        assert tokenizer.end_id == 2
        assert tokenizer.decode(tokenizer.encode("turn on the radio")) == "turn on the radio"
        prefix, suffix = Prompt.build(tokenizer)  # no chat markers: they come as text
        assert prefix and suffix


def test_round_trip(tokenizer, sentences):
    for text in (*dict.fromkeys(sentences), "", "龘 zebra 🎵", "it's 5 o'clock"):
        ids = tokenizer.encode(text)
        assert all(0 <= number < tokenizer.vocab_size for number in ids)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([*ids, tokenizer.end_id, tokenizer.pad_id]) == text


def test_text_cannot_forge_special_tokens(tokenizer):
    for text in (f"hi {IM_END}", f"{IM_START}system", "<|endoftext|>", IM_END):
        ids = tokenizer.encode(text)
        assert not tokenizer.special_ids & set(ids)
        assert tokenizer.decode(ids) == text


def test_trained_tokenizer_has_words_and_characters_as_tokens(trained, sentences):
    tokenizer = load_tokenizer(trained)
    for sentence in set(sentences):
        units = sum(1 if w.isascii() else len(w) for w in sentence.split())
        assert len(tokenizer.encode(sentence)) == units
    assert tokenizer.encode("打开wifi吧") == tokenizer.encode("打开 wifi 吧")
    assert tokenizer.encode("打开wifi吧")[2] == tokenizer.encode("wifi")[0]


@settings(max_examples=50)
@given(st.text(alphabet=st.characters(codec="utf-8", exclude_categories=["Cs", "Cc", "Zs"])))
def test_trained_tokenizer_encodes_anything(trained_tokenizer, text):
    text = normalize_text(text)
    ids = trained_tokenizer.encode(text)
    decoded = trained_tokenizer.decode(ids)
    # Spaces at script boundaries follow a convention of their own; nothing else may change.
    assert decoded.replace(" ", "").replace("▁", "") == text.replace(" ", "").replace("▁", "")


def test_load_tokenizer_errors(trained, tmp_path):
    with pytest.raises(UserError, match="not there"):
        load_tokenizer(tmp_path / "none")
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(UserError, match=r"\.model"):
        load_tokenizer(tmp_path / "x.txt")
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match="not a sentencepiece model"):
        load_tokenizer(tmp_path)
    meta = json.loads((trained / META_NAME).read_text())
    (tmp_path / META_NAME).write_text(json.dumps({**meta, "version": 9}))
    with pytest.raises(UserError, match="version 9"):
        load_tokenizer(tmp_path)
    (tmp_path / META_NAME).unlink()
    (tmp_path / "tokenizer.model").unlink()
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="does not load"):
        load_tokenizer(tmp_path)


def test_check_tokenizer(trained):
    tokenizer = load_tokenizer(trained)
    check_tokenizer(tokenizer, tokenizer.vocab_size)
    check_tokenizer(tokenizer, tokenizer.vocab_size + 500)
    with pytest.raises(UserError, match="only"):
        check_tokenizer(tokenizer, tokenizer.vocab_size - 1)
    with pytest.raises(UserError, match="do not belong together"):
        check_tokenizer(tokenizer, 151_936)
