"""Batches of text: each line once in an epoch, resumable on any number of ranks."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace

import pytest
import torch

from dsasr.data.dataloader.text_dataloader import (
    Line,
    TextDataLoader,
    TextOnlyConfig,
    load_text,
)
from dsasr.data.dataloader.text_encoder import TextEncoder
from dsasr.data.text.characters import CharacterPhonemizer
from dsasr.data.text.phoneme_vocab import PhonemeVocab
from dsasr.utils.errors import UserError

QUIET = {"substitutions": 0.0, "deletions": 0.0, "insertions": 0.0}


class Letters:
    """A tokenizer with one token a letter."""

    vocab_size, end_id, pad_id, special_ids = 200, 1, 0, frozenset({0, 1})

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))

    def special_id(self, name: str) -> int | None:
        return None


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "text.txt"
    words = ["ab", "abc", "b a", "cc", "c ab ba", "a", "bbb", "ca", "ac b", "cab", "b"]
    path.write_text("\n".join([*words, "", "x" * 400]))
    return path


def encoder() -> TextEncoder:
    vocab = PhonemeVocab(["a", "b", "c", "▁"])
    return TextEncoder(None, CharacterPhonemizer(), vocab, Letters())


def loaders(file, world=1, state=None, **settings):
    cfg = TextOnlyConfig(path=str(file), samples=2, **{**QUIET, **settings})
    options = {"seed": 3, "world": world, "state": state}
    return [TextDataLoader(cfg, encoder(), 5, rank=rank, **options) for rank in range(world)]


def lines(batches) -> list[str]:
    return [text for batch in batches for text in batch.texts]


def test_every_line_once_an_epoch_in_one_order_for_any_world(file):
    (loader,) = loaders(file)
    whole = lines(next(loader) for _ in range(11))
    assert sorted(whole[:11]) == sorted(whole[11:22]) == sorted(file.read_text().split("\n")[:11])
    ranks = loaders(file, world=2)
    steps = [[next(rank) for rank in ranks] for _ in range(5)]
    # The two ranks take the lines of a step in turn.
    merged = [t for a, b in steps for pair in zip(a.texts, b.texts, strict=True) for t in pair]
    assert merged == whole[:20]


def test_batches_are_of_a_length_unless_unsorted(tmp_path):
    file = tmp_path / "t.txt"
    file.write_text("\n".join(["a" * n for n in range(1, 65)]))
    spread = {}
    for window in (4096, 1):
        (loader,) = loaders(file, window=window)
        batches = [next(loader) for _ in range(32)]
        assert sorted(map(len, lines(batches))) == list(range(1, 65))
        spread[window] = max(abs(len(b.texts[0]) - len(b.texts[1])) for b in batches)
    assert spread[4096] == 1 and spread[1] > 20


def test_lines_may_be_given_in_the_place_of_files():
    cfg = TextOnlyConfig(path="/nowhere", samples=2, **QUIET)
    given = [Line("ab", "en", "somewhere", 7), Line("c", "", "somewhere", 8)]
    batch = next(TextDataLoader(cfg, encoder(), 5, lines=given))
    assert sorted(batch.texts) == ["ab", "c"] and "somewhere:7" in batch.keys


def test_resumes_exactly_on_another_world(file):
    whole = [next(loader) for loader in loaders(file) for _ in range(6)]
    state = json.loads(json.dumps(whole[1].state))
    (resumed,) = loaders(file, state=state)
    again = next(resumed)
    assert again.texts == whole[2].texts and again.seed == whole[2].seed
    assert torch.equal(again.phonemes_BP, whole[2].phonemes_BP)
    two = [next(loader) for loader in loaders(file, world=2, state=state)]
    assert sorted(lines(two)) == sorted(lines(whole[2:4]))
    (file.parent / "text.txt").write_text("a\nb")
    with pytest.raises(UserError, match="2 sentences, 11 when"):
        loaders(file, state=state)


def test_a_batch_by_hand(file):
    batch = next(loaders(file)[0])
    assert batch.text_only and len(batch) == 2 and batch.features_BTF.shape == (2, 0, 5)
    vocab = {"a": 1, "b": 2, "c": 3, " ": 4}
    for row, text in enumerate(batch.texts):
        units = batch.phonemes_BP[row, : batch.phoneme_lengths_B[row]].tolist()
        tokens = batch.tokens_BU[row, : batch.token_lengths_B[row]].tolist()
        assert units == [vocab[c] for c in text] and tokens == [*map(ord, text), 1]


def test_noise_is_drawn_anew_each_epoch_and_is_the_same_after_a_resume(file):
    (loader,) = loaders(file, substitutions=0.5)
    batches = [next(loader) for _ in range(22)]
    seen: dict[str, set] = {}
    for batch in batches:
        for row, text in enumerate(batch.texts):
            units = tuple(batch.phonemes_BP[row, : batch.phoneme_lengths_B[row]].tolist())
            seen.setdefault(text, set()).add(units)
    assert max(map(len, seen.values())) > 1
    (resumed,) = loaders(file, substitutions=0.5, state=batches[4].state)
    assert torch.equal(next(resumed).phonemes_BP, batches[5].phonemes_BP)


def test_unusable_lines_are_named_and_a_batch_is_never_empty(tmp_path):
    (tmp_path / "t.txt").write_text("a\nzz")
    batch = next(loaders(tmp_path / "t.txt")[0])
    assert batch.texts == ("a",) and batch.bad[0][0] == "unknown_phoneme"
    (tmp_path / "u.txt").write_text("zz\nyy")
    with pytest.raises(UserError, match="unknown_phoneme"):
        next(loaders(tmp_path / "u.txt")[0])


def test_jsonl_and_mistakes(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "ab", "lang": "en"}\n{"text": "c"}\n')
    found = load_text(TextOnlyConfig(path=str(tmp_path / "*.jsonl"), lang="de"))
    assert [(line.text, line.lang, line.number) for line in found] == [
        ("ab", "en", 1),
        ("c", "de", 2),
    ]
    (tmp_path / "b.jsonl").write_text('{"sentence": "ab"}\n')
    with pytest.raises(UserError, match=r"b\.jsonl:1: not a JSON object with a string 'text'"):
        load_text(TextOnlyConfig(path=str(tmp_path / "b.jsonl")))
    with pytest.raises(UserError, match="there is no"):
        load_text(TextOnlyConfig(path=str(tmp_path / "nothing*")))
    (tmp_path / "e.txt").write_text("\n\n")
    with pytest.raises(UserError, match="no sentence"):
        load_text(TextOnlyConfig(path=str(tmp_path / "e.txt")))


@pytest.mark.parametrize("name", ["a.JSONL", "a.ndjson", "a.json"])
def test_json_lines_by_any_of_their_endings(tmp_path, name):
    (tmp_path / name).write_text('{"text": "ab"}\n{"text": "c"}\n')
    found = load_text(TextOnlyConfig(path=str(tmp_path / name)))
    assert [line.text for line in found] == ["ab", "c"]


def test_files_that_are_no_text(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"ab\n"))
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "c.parquet")
    parquet.write_table(pyarrow.table({"words": ["a"]}), tmp_path / "d.parquet")
    for name, says in (
        ("a.txt.gz", "is no UTF-8 text: unpack"),
        ("b.parquet", "cannot be read"),
        ("c.parquet", "column 'text' holds int64, not strings"),
        ("d.parquet", "has no column 'text', but words"),
    ):
        with pytest.raises(UserError, match=says) as caught:
            load_text(TextOnlyConfig(path=str(tmp_path / name)))
        assert name in str(caught.value) and "\n" not in str(caught.value)


def test_a_line_keeps_its_hint_on_any_world_and_gets_another_in_another_epoch(file):
    def hinted(world, share=0.5):
        cfg = TextOnlyConfig(path=str(file), samples=2, lang="en-GB", **QUIET)
        text = replace(encoder(), languages=("en", "zh"), language_share=share)
        ranks = [
            TextDataLoader(cfg, text, 5, seed=3, rank=rank, world=world) for rank in range(world)
        ]
        batches = [next(rank) for _ in range(44 // world) for rank in ranks]
        rows = [row for b in batches for row in zip(b.keys, b.hints, strict=True)]
        return {key: [h for k, h in rows if k == key] for key, _ in rows}

    alone, together = hinted(1), hinted(2)
    assert all(alone[key][: len(own)] == own[: len(alone[key])] for key, own in together.items())
    given = [hint for hints in alone.values() for hint in hints]
    assert set(given) == {"", "en"} and 20 < given.count("en") < 68
    assert any(len(set(hints)) == 2 for hints in alone.values())
    assert {h for hints in hinted(1, 1.0).values() for h in hints} == {"en"}
