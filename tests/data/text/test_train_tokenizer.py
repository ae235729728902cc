"""Training of the sentencepiece tokenizer."""

import pytest

from dsasr.data.text.train_tokenizer import train_tokenizer
from dsasr.utils.errors import UserError


def test_training_is_repeatable_and_skipped_when_done(tmp_path, sentences):
    (tmp_path / "t.txt").write_text("\n".join(sentences), encoding="utf-8")
    files = [tmp_path / "t.txt"]
    train_tokenizer(files, tmp_path / "a", size=400)
    train_tokenizer(files, tmp_path / "b", size=400)
    model = tmp_path / "a" / "tokenizer.model"
    first = model.read_bytes()
    assert (tmp_path / "b" / "tokenizer.model").read_bytes() == first
    stamp = model.stat().st_mtime_ns
    train_tokenizer(files, tmp_path / "a", size=400)
    assert model.stat().st_mtime_ns == stamp
    train_tokenizer(files, tmp_path / "a", size=400, fresh=True)
    assert model.stat().st_mtime_ns != stamp and model.read_bytes() == first


def test_a_byte_order_mark_is_no_token(tmp_path, sentences):
    (tmp_path / "t.txt").write_text("\n".join(sentences), encoding="utf-8-sig")
    (tmp_path / "u.txt").write_text("\n".join(sentences), encoding="utf-8")
    for name in ("t", "u"):
        train_tokenizer([tmp_path / f"{name}.txt"], tmp_path / name, size=400)
    models = [(tmp_path / name / "tokenizer.model").read_bytes() for name in ("t", "u")]
    assert models[0] == models[1]


def test_training_errors(tmp_path, sentences):
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(UserError, match="empty"):
        train_tokenizer([tmp_path / "empty.txt"], tmp_path / "t")
    with pytest.raises(UserError, match="cannot be read"):
        train_tokenizer([tmp_path / "none.txt"], tmp_path / "t")
    (tmp_path / "t.txt").write_text("\n".join(sentences))
    with pytest.raises(UserError, match="--size"):
        train_tokenizer([tmp_path / "t.txt"], tmp_path / "t", size=100)


def test_long_lines_are_trained_on(tmp_path, sentences):
    rare = "ßþœ" * 8
    (tmp_path / "t.txt").write_text(
        "\n".join([*sentences, " ".join([*["word"] * 2000, rare])]), encoding="utf-8"
    )
    tokenizer = train_tokenizer([tmp_path / "t.txt"], tmp_path / "t", size=500)
    assert len(tokenizer.encode("ßþœ")) <= 4  # letters of their own, not two bytes each
    assert tokenizer.decode(tokenizer.encode(f"word {rare}")) == f"word {rare}"
    for torn in (tmp_path / "t").glob("*.json"):
        torn.write_text("{")
    assert train_tokenizer([tmp_path / "t.txt"], tmp_path / "t", size=500).vocab_size  # again
