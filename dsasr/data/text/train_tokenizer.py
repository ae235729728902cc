"""Trains the sentencepiece tokenizer of a small language model."""

from __future__ import annotations

import hashlib
import io
import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from dsasr.data.text.normalization import normalize_text
from dsasr.data.text.prompt import Prompt
from dsasr.data.text.scripts import HAN_CHARACTER
from dsasr.data.text.tokenizers import (
    IM_END,
    IM_START,
    META_FORMAT,
    META_NAME,
    META_VERSION,
    PAD,
    Tokenizer,
    load_tokenizer,
    to_pieces,
)
from dsasr.utils.errors import UserError
from dsasr.utils.io import atomic_write

_BYTES = 256
_MAX_PIECE_CHARS = 16  # what sentencepiece allows
_MAX_SEEDS = 500_000
_MARKERS = (PAD, IM_START, IM_END)


def train_tokenizer(
    files: Sequence[str | Path], out: str | Path, *, size: int = 1100, fresh: bool = False
) -> Tokenizer:
    """Train on ``files`` (UTF-8, one sentence a line) and write the folder ``out``.

    A unigram model with byte fallback: any text encodes. Each Han character is a piece of its own,
    and each plain text of the prompt is one token. ``size`` counts all of these; it is an upper
    bound, as a small text does not fill it. If ``out`` already has a tokenizer trained from the
    same text and size, it is loaded and not trained again, unless ``fresh``. Raises `UserError`.
    """
    out = Path(out)
    lines = list(_read(files))
    if not lines:
        raise UserError("the text to train a tokenizer on is empty")
    phrases = Prompt.phrases()
    pieces = size - len(phrases)
    minimum = 1 + len(_MARKERS) + _BYTES + len({c for line in lines for c in line}) + 1
    if pieces < minimum:
        raise UserError(f"a tokenizer of {size} cannot hold this text: give --size {minimum + 100}")
    source = _fingerprint(lines, size)
    meta_path = out / META_NAME
    trained = (out / "tokenizer.model").is_file() and _source_of(meta_path) == source
    if trained and not fresh:
        return load_tokenizer(out)
    model = _train(lines, pieces)
    meta = {
        "format": META_FORMAT,
        "version": META_VERSION,
        "script_spacing": True,
        "phrases": phrases,
        "source": source,
    }
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(out / "tokenizer.model", model)
    # Last: the folder is a tokenizer from here on.
    atomic_write(meta_path, json.dumps(meta, ensure_ascii=False, indent=1) + "\n")
    return load_tokenizer(out)


def _source_of(meta_path: Path) -> str | None:
    """What a tokenizer was trained on; None where that cannot be read, and it is trained again."""
    try:
        return json.loads(meta_path.read_text(encoding="utf-8"))["source"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _read(files: Sequence[str | Path]) -> Iterable[str]:
    for path in files:
        try:
            with open(path, encoding="utf-8-sig") as lines:
                for line in lines:
                    if line.strip():
                        yield normalize_text(line)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"text {path} cannot be read: {error}") from None


def _fingerprint(lines: list[str], size: int) -> str:
    digest = hashlib.sha256(f"{META_FORMAT} {META_VERSION} unigram {size}\n".encode())
    for line in lines:
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()[:16]


def _train(lines: list[str], pieces: int) -> bytes:
    import sentencepiece

    # The delimiter keeps Han characters apart without a space that would become part of a piece.
    marked = [HAN_CHARACTER.sub("\t\\g<0>\t", to_pieces(line)) for line in lines]
    model = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder:
        seeds = Path(folder) / "seeds.tsv"
        seeds.write_text(_seeds(marked), encoding="utf-8")
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(marked),
                model_writer=model,
                model_type="unigram",
                vocab_size=pieces,
                hard_vocab_limit=False,
                seed_sentencepieces_file=str(seeds),
                byte_fallback=True,
                character_coverage=1.0,
                pretokenization_delimiter="\t",
                control_symbols=list(_MARKERS),
                unk_id=0,
                bos_id=-1,
                eos_id=-1,
                pad_id=-1,
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                normalization_rule_name="identity",
                num_threads=1,
                # In bytes; by default longer lines are dropped without a word.
                max_sentence_length=max(len(line.encode()) for line in marked) + 1,
                minloglevel=2,
            )
        except RuntimeError as error:
            why = (str(error).strip().splitlines() or ["no reason given"])[-1]
            raise UserError(f"sentencepiece cannot train {pieces} pieces: {why}") from None
    return _without_path(model.getvalue())


def _without_path(model: bytes) -> bytes:
    """The model without the seeds' path among its trainer's arguments: equal texts, equal bytes."""
    from sentencepiece import sentencepiece_model_pb2

    message = sentencepiece_model_pb2.ModelProto.FromString(model)
    message.trainer_spec.ClearField("seed_sentencepieces_file")
    return message.SerializeToString(deterministic=True)


def _seeds(marked: list[str]) -> str:
    """Candidate pieces with a score each, one a line: whole words, and parts of several words.

    Sentencepiece's own candidates are substrings of two words or more, so that a word of a text
    with few words would never be one piece.
    """
    words: Counter = Counter()
    for line in marked:
        words.update("▁" + word for part in line.split("\t") for word in part.split())
    scores: Counter = Counter()
    word_counts: Counter = Counter()
    for word, count in words.items():
        if HAN_CHARACTER.search(word):
            continue
        parts = {
            word[i:j]
            for i in range(len(word))
            for j in range(i + 2, min(len(word), i + _MAX_PIECE_CHARS) + 1)
        }
        for part in parts:
            scores[part] += count * len(part)
            word_counts[part] += 1
    seeds = [part for part in scores if word_counts[part] > 1 or part in words]
    seeds.sort(key=lambda part: (-scores[part], part))
    return "".join(f"{part}\t{scores[part]}\n" for part in seeds[:_MAX_SEEDS])
