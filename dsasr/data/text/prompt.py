"""LLM tokens, the prompt, and the form of a training text.

`Prompt` is the one place where the prompt's words stand: training, evaluation, transcription and
the demo's language model all build theirs here.
"""

from __future__ import annotations

import json
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from dsasr.data.text.scripts import HAN_SPACES, script_runs
from dsasr.utils.errors import UserError

IM_START, IM_END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
META_NAME = "dsasr_tokenizer.json"
META_FORMAT = "dsasr-tokenizer"
META_VERSION = 1

# ---- normalization


@dataclass(frozen=True)
class TextConfig:
    """The form of training targets. ``case``: keep, lower or upper; ``punctuation``: keep or strip.

    Keep both where the language model knows them and the transcripts have them. ``empty``: drop
    samples without text (as `empty_text`), or keep them: non-speech, whose CTC labels are blanks
    and whose transcript is the end token alone.
    """

    case: str = "keep"  # keep, lower or upper
    punctuation: str = "keep"  # keep or strip
    empty: str = "drop"  # samples without text: drop (counted as empty_text), or keep as non-speech

    def __post_init__(self) -> None:
        if self.case not in ("keep", "lower", "upper"):
            raise UserError(f"text.case {self.case!r}: use keep, lower or upper")
        if self.punctuation not in ("keep", "strip"):
            raise UserError(f"text.punctuation {self.punctuation!r}: use keep or strip")
        if self.empty not in ("drop", "keep"):
            raise UserError(f"text.empty {self.empty!r}: use drop or keep")


def normalize_text(text: str, lang: str = "", config: TextConfig | None = None) -> str:
    """The training target for ``text``: NFKC, single spaces, none between Han characters.

    Control characters become spaces. Case and punctuation as ``config`` says; an apostrophe within
    a word is no punctuation. Not the normalization for scoring, which forgives more.
    """
    config = config or TextConfig()
    as_is = config.case == "keep" and config.punctuation == "keep"
    if as_is and text.isascii() and text.isprintable() and " ".join(text.split()) == text:
        return text
    text = unicodedata.normalize("NFKC", text)
    text = "".join(" " if unicodedata.category(c) == "Cc" else c for c in text)
    if config.case != "keep":
        text = text.lower() if config.case == "lower" else text.upper()
        text = unicodedata.normalize("NFKC", text)  # a change of case may undo it
    if config.punctuation == "strip":
        text = text.replace("’", "'")
        text = "".join(c if c == "'" or unicodedata.category(c)[0] != "P" else " " for c in text)
        text = re.sub(r"(?<!\w)'|'(?!\w)", " ", text)
    return HAN_SPACES.sub("", " ".join(text.split()))


# ---- tokenizers


@runtime_checkable
class Tokenizer(Protocol):
    """What training and decoding need of a tokenizer.

    ``encode`` never yields a special token, whatever the text says: a transcript that contains
    ``<|im_end|>`` is plain characters. Special tokens come from ``special_id`` alone.
    """

    vocab_size: int  # largest id + 1
    end_id: int  # ends a transcript
    pad_id: int
    special_ids: frozenset[int]

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...

    def special_id(self, name: str) -> int | None: ...


class HfTokenizer:
    """A Hugging Face tokenizer folder (``tokenizer.json``…). Remote code is never run."""

    def __init__(self, folder: str | Path) -> None:
        from transformers import AutoTokenizer

        try:
            self._hf = AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
            reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
            raise UserError(f"tokenizer folder {folder} does not load: {reason[0]}") from None
        self.special_ids = frozenset(
            number for number, token in self._hf.added_tokens_decoder.items() if token.special
        ) | frozenset(self._hf.all_special_ids)
        self.vocab_size = max(len(self._hf), max(self._hf.get_vocab().values(), default=-1) + 1)
        end = self.special_id(IM_END)
        self.end_id = end if end is not None else self._hf.eos_token_id
        if self.end_id is None:
            raise UserError(f"tokenizer {folder} has neither {IM_END} nor an end-of-text token")
        pad = self._hf.pad_token_id
        self.pad_id = pad if pad is not None else self.end_id

    def encode(self, text: str) -> list[int]:
        if not text:
            return []
        return list(
            self._hf(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        )

    def decode(self, ids: list[int]) -> str:
        kept = [int(number) for number in ids if int(number) not in self.special_ids]
        return self._hf.decode(kept, clean_up_tokenization_spaces=False).strip()

    def special_id(self, name: str) -> int | None:
        number = self._hf.get_vocab().get(name)
        return number if number in self.special_ids else None


class SentencePieceTokenizer:
    """A sentencepiece model: one of `tools/train_tokenizer.py`, or any other ``.model`` file.

    A trained folder's `META_NAME` names its special pieces, the prompt's sentences that are one
    token each, and says that Latin and Han runs are parted by one space in text and by none in
    pieces (``script_spacing``).
    """

    def __init__(self, model: str | Path, meta: dict | None = None) -> None:
        import sentencepiece

        meta = meta or {}
        try:
            self._sp = sentencepiece.SentencePieceProcessor(model_file=str(model))
        except (OSError, RuntimeError, ValueError):
            raise UserError(f"{model} is not a sentencepiece model") from None
        size = self._sp.get_piece_size()
        self._spacing = bool(meta.get("script_spacing", False))
        self._phrases: dict[str, int] = {}
        self.special_ids = frozenset(i for i in range(size) if self._sp.is_control(i))
        for number, text in enumerate(meta.get("phrases", ()), size):
            self._phrases[str(text)] = number
        self._phrase_of = {number: text for text, number in self._phrases.items()}
        self.vocab_size = size + len(self._phrases)
        end = self.special_id(IM_END)
        end = self._sp.eos_id() if end is None else end
        if end < 0:
            raise UserError(f"sentencepiece model {model} has neither {IM_END} nor </s>")
        self.end_id = end
        pad = self.special_id(PAD)
        pad = self._sp.pad_id() if pad is None else pad
        self.pad_id = pad if pad >= 0 else end

    def encode(self, text: str) -> list[int]:
        if text in self._phrases:
            return [self._phrases[text]]
        if not self._spacing:
            return list(self._sp.encode(text))
        return list(self._sp.encode(to_pieces(text)))

    def decode(self, ids: list[int]) -> str:
        parts: list[str] = []
        run: list[int] = []
        for number in (int(number) for number in ids):
            if number in self._phrase_of:
                parts += [self._sp.decode(run), self._phrase_of[number]]
                run = []
            elif 0 <= number < self._sp.get_piece_size() and number not in self.special_ids:
                run.append(number)
        text = "".join([*parts, self._sp.decode(run)])
        return _from_pieces(text) if self._spacing and not parts else text.strip()

    def special_id(self, name: str) -> int | None:
        number = self._sp.piece_to_id(name)
        return number if number in self.special_ids else None


def to_pieces(text: str) -> str:
    """A space before each Latin run, none around Han: ``打开 wifi 吧`` → ``打开 wifi吧``.

    So ``wifi`` is the piece ``▁wifi`` wherever it stands, and no Han character is ever ``▁吧``.
    """
    runs = [(script, run.strip()) for script, run in script_runs(text)]
    return "".join(run if script == "zh" else " " + run for script, run in runs if run)


def _from_pieces(text: str) -> str:
    return " ".join(run.strip() for _, run in script_runs(text) if run.strip())


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in ``path``: a trained folder, a Hugging Face folder, or a ``.model`` file.

    Raises `UserError` if it is none of these.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix != ".model":
            raise UserError(f"tokenizer {path}: give a folder or a sentencepiece .model file")
        return SentencePieceTokenizer(path)
    if not path.is_dir():
        raise UserError(f"tokenizer {path} is not there")
    if (path / META_NAME).is_file():
        return SentencePieceTokenizer(path / "tokenizer.model", _read_meta(path / META_NAME))
    if (path / "tokenizer.json").is_file() or (path / "tokenizer_config.json").is_file():
        return HfTokenizer(path)
    if (path / "tokenizer.model").is_file():
        return SentencePieceTokenizer(path / "tokenizer.model")
    raise UserError(f"{path} holds no tokenizer (tokenizer.json or tokenizer.model)")


def _read_meta(path: Path) -> dict:
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{path} cannot be read: train the tokenizer again") from None
    if not isinstance(meta, dict) or meta.get("format") != META_FORMAT:
        raise UserError(f"{path} is not a {META_FORMAT} file")
    if meta.get("version") != META_VERSION:
        raise UserError(
            f"{path} has version {meta.get('version')}, this code reads {META_VERSION}: "
            "train the tokenizer again"
        )
    return meta


def check_tokenizer(tokenizer: Tokenizer, llm_vocab_size: int) -> None:
    """Raise `UserError` unless ``tokenizer`` can belong to an LM of ``llm_vocab_size`` embeddings.

    LMs pad their vocabularies (Qwen3: 151,669 tokens, 151,936 rows), so spare rows are fine up to
    1024 or 2%; a token without a row is not.
    """
    size = tokenizer.vocab_size
    if size > llm_vocab_size:
        raise UserError(
            f"the tokenizer has {size} tokens, the language model only {llm_vocab_size} "
            "embeddings: use the tokenizer folder that came with the model"
        )
    if llm_vocab_size - size > max(1024, llm_vocab_size // 50):
        raise UserError(
            f"the tokenizer has {size} tokens, the language model {llm_vocab_size} embeddings: "
            "they do not belong together; use the tokenizer folder that came with the model"
        )


# ---- prompt

SPEECH = "<speech>"
_MARKER = re.compile(r"(<\|[a-z_]+\|>)")


class Prompt:
    """Qwen's chat form around the speech (NIM4-ASR, arXiv 2604.18105).

    Instruction, then speech, then hints: a streaming recognizer computes the part before the
    speech once and appends to it. The whole sequence is
    ``prefix + speech embeddings + suffix + transcript + end_id``.
    """

    template = (
        f"{IM_START}system\nYou are a Multilingual Speech Recognition Model.{IM_END}\n"
        f"{IM_START}user\nTranscribe the speech into text {SPEECH}.{IM_END}\n"
        f"{IM_START}assistant\n"
    )
    hints = " Contextual hints: {context}."

    @classmethod
    def parts(cls, context: str | None = None) -> tuple[list[str], list[str]]:
        """What stands before and after the speech, markers and plain text taking turns.

        Plain text has the even places, markers the odd ones, as `re.split` gives them: so a marker
        among the user's own words in ``context`` stays plain text.
        """
        before, after = cls.template.split(SPEECH)
        if context:
            after = after.replace(".", "." + cls.hints.replace("{context}", "\0"), 1)
        prefix, suffix = _MARKER.split(before), _MARKER.split(after)
        return prefix, [part.replace("\0", context or "") for part in suffix]

    @classmethod
    def phrases(cls) -> list[str]:
        """The plain texts of the prompt without hints, each once: a demo tokenizer's pieces."""
        prefix, suffix = cls.parts()
        return [text for text in dict.fromkeys(prefix[::2] + suffix[::2]) if text]

    @classmethod
    def build(cls, tokenizer: Tokenizer, context: str | None = None) -> tuple[list[int], list[int]]:
        """(prefix ids, suffix ids).

        A tokenizer without the chat markers (not a chat model's) gets them as plain text. Raises
        `UserError` if it knows only one of them.
        """
        markers = {m: tokenizer.special_id(m) for m in (IM_START, IM_END)}
        if len({number is None for number in markers.values()}) > 1:
            raise UserError(f"the tokenizer knows only one of {IM_START} and {IM_END}")
        prefix: list[int] = []
        suffix: list[int] = []
        for ids, side in zip((prefix, suffix), cls.parts(context), strict=True):
            for place, part in enumerate(side):
                number = markers[part] if place % 2 else None
                ids += tokenizer.encode(part) if number is None else [number]
        return prefix, suffix
