"""A trained tokenizer as tokenizer.json, for programs that know transformers but not this package.

It gives the ids of `SentencePieceTokenizer` for transcripts. Three things differ: special tokens
are parsed wherever their text stands, as transformers does; ids are decoded without the space
between a Han and a Latin run; and the prompt's punctuation, which has tokens of its own there, is
spelled as in a transcript (the config.json of an export has the prompt's ids).
"""

from __future__ import annotations

import json
from pathlib import Path

from dsasr.data.text.scripts import HAN
from dsasr.data.text.tokenizers import (
    IM_END,
    META_NAME,
    PAD,
    SentencePieceTokenizer,
    load_tokenizer,
)
from dsasr.utils.io import atomic_write

_HAN = f"[{HAN}]"
# Of other scripts, as Python's str.isalnum has them; what is neither joins the run before it.
_LETTER = f"[\\p{{L}}\\p{{Nl}}\\p{{No}}&&[^{HAN}]]"
_OTHER = "[^\\p{L}\\p{Nl}\\p{No}]"
# `to_pieces` as replacements, in this order; \K: what stands before it is kept.
_SPACING = (
    ("\\A\\s+|\\s+\\z", ""),
    (f"\\A(?={_OTHER}*+(?:{_LETTER}|\\z))(?=.)", " "),
    (f"{_HAN}{_OTHER}*?\\K\\s*(?={_LETTER})", " "),
    (f"{_LETTER}{_OTHER}*?\\K\\s+(?={_HAN})", ""),
)


def has_trained_tokenizer(folder: Path) -> bool:
    """Whether `dsasr data tokenizer` trained the tokenizer in ``folder``."""
    return (folder / META_NAME).is_file()


def write_tokenizer_json(folder: Path, target: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json of the trained tokenizer in ``folder``."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

    trained = load_tokenizer(folder)
    assert isinstance(trained, SentencePieceTokenizer)
    pieces, scores, unknown = trained.vocabulary()
    # With a space, which no normalized text has: of "." the piece is not found in transcripts.
    sentences = [text for text in trained.phrases if any(map(str.isalpha, text))]
    pieces += [text if text in sentences else f" {text}" for text in trained.phrases]
    scores += [min(scores)] * len(trained.phrases)
    tokenizer = Tokenizer(models.Unigram(list(zip(pieces, scores, strict=True)), unknown, True))
    steps = [normalizers.Replace(Regex(p), by) for p, by in _SPACING if trained.script_spacing]
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Fuse(), decoders.Replace("▁", " "),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    special = sorted(trained.special_ids)
    tokenizer.add_special_tokens(
        [AddedToken(pieces[number], special=True, normalized=False) for number in special]
    )
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in sentences])
    atomic_write(target / "tokenizer.json", tokenizer.to_str(pretty=True))
    names = {IM_END: "eos_token", PAD: "pad_token"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {role: name for name, role in names.items() if trained.special_id(name) is not None}
    atomic_write(target / "tokenizer_config.json", json.dumps(config, indent=1) + "\n")
