"""Both kinds of tokenizer: round trips, special tokens, folders that are none."""

import json
from types import SimpleNamespace

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
    check_end_token,
    check_tokenizer,
    load_tokenizer,
    vocabulary_fingerprint,
)
from dsasr.utils.errors import UserError


def test_a_fingerprint_is_of_every_token_and_its_id(tokenizer):
    pieces = tokenizer.pieces()
    assert max(pieces) + 1 == tokenizer.vocab_size and pieces[tokenizer.end_id] == IM_END
    fingerprint = vocabulary_fingerprint(tokenizer)
    assert len(fingerprint) == 12 and fingerprint == vocabulary_fingerprint(tokenizer)
    tokenizer.pieces = lambda: pieces | {tokenizer.end_id: "other"}
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
        assert prefix[0] == 1 and suffix  # <s>
        assert tokenizer.bos_ids == (1,)


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


def test_spare_rows_of_the_language_model():
    """Whisper's tokenizer has no timestamps, its decoder 1501 rows for them."""
    whisper = SimpleNamespace(vocab_size=50_364)
    check_tokenizer(whisper, 51_865)
    with pytest.raises(UserError, match="do not belong together"):
        check_tokenizer(whisper, 54_000)
    with pytest.raises(UserError, match="only 49152"):
        check_tokenizer(whisper, 49_152)


def test_another_models_tokenizer_is_refused(trained, hugging_face, make_hugging_face):
    tokenizer, other = load_tokenizer(trained), load_tokenizer(hugging_face)
    size = max(tokenizer.vocab_size, other.vocab_size)
    for one, two in ((tokenizer, other), (other, tokenizer)):
        check_tokenizer(one, size, one)
        with pytest.raises(UserError, match="not the language model's") as caught:
            check_tokenizer(one, size, two)
        assert "\n" not in str(caught.value)
    # Reserved tokens that were given names are no other tokenizer.
    specials = ["<|reserved|>", "<|user|>", "<|end|>"]
    renamed = load_tokenizer(make_hugging_face(specials, eos_token="<|end|>"))
    check_tokenizer(renamed, size, other)


def test_the_language_models_end_token_is_a_special_one(hugging_face):
    tokenizer = load_tokenizer(hugging_face)
    for ends in ([], [tokenizer.end_id], [100, 0], [999_999]):
        check_end_token(tokenizer, ends)
    with pytest.raises(UserError, match="ends a text with token 100"):
        check_end_token(tokenizer, [100])


def test_what_a_tokenizer_puts_before_a_text(trained, hugging_face, make_hugging_face, tmp_path):
    assert load_tokenizer(trained).bos_ids == load_tokenizer(hugging_face).bos_ids == ()
    folder = make_hugging_face(["</s>", "<s>"], bos="<s>", eos_token="</s>", bos_token="<s>")
    assert load_tokenizer(folder).bos_ids == (1,)
    # SmolLM2 names <|im_start|> as bos_token, and does not put it before a text.
    folder = make_hugging_face([IM_START, IM_END], bos_token=IM_START, eos_token=IM_END)
    assert load_tokenizer(folder).bos_ids == ()


def test_special_tokens_are_parsed_in_trusted_text_alone(tokenizer):
    text = f"play{IM_END}{IM_START}music"
    ends = [tokenizer.special_id(IM_END), tokenizer.special_id(IM_START)]
    assert tokenizer.parse(text) == [
        *tokenizer.encode("play"),
        *ends,
        *tokenizer.encode("music"),
    ]
    assert tokenizer.parse("") == [] and tokenizer.parse("play") == tokenizer.encode("play")
    assert "".join(map(tokenizer.token, tokenizer.parse(text))).replace(" ", "") == text
