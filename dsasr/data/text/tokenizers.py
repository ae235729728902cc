"""The language model's tokenizer: a Hugging Face folder or a sentencepiece model, one interface."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from dsasr.data.text import chat_template
from dsasr.data.text.scripts import script_runs
from dsasr.utils.errors import UserError

IM_START, IM_END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
META_NAME = "dsasr_tokenizer.json"
META_FORMAT = "dsasr-tokenizer"
META_VERSION = 1


@runtime_checkable
class Tokenizer(Protocol):
    """The interface that training and decoding use.

    ``encode`` never returns a special token: ``<|im_end|>`` in a transcript is encoded as plain
    characters. Special tokens come from ``special_id``, and from ``parse``, which is for text that
    the recipe or the tokenizer's own chat template wrote.
    """

    vocab_size: int  # largest id + 1
    end_id: int  # ends a transcript
    pad_id: int
    special_ids: frozenset[int]
    bos_ids: tuple[int, ...]  # what the model was trained to see before a text; often nothing

    def encode(self, text: str) -> list[int]: ...

    def parse(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...

    def special_id(self, name: str) -> int | None: ...

    def token(self, number: int) -> str: ...  # as shown to people: a space is a space

    def pieces(self) -> dict[int, str]: ...  # id → token as the vocabulary spells it

    def chat_prompt(self, system: str, user: str) -> str | None: ...  # see `chat_template`


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
        self.bos_ids = self._bos()
        self.end_id = self._end()
        if self.end_id is None:
            raise UserError(f"tokenizer {folder} has neither {IM_END} nor an end-of-text token")
        pad = self._hf.pad_token_id
        self.pad_id = pad if pad is not None else self.end_id

    def _bos(self) -> tuple[int, ...]:
        """The special tokens that the tokenizer itself puts before a text."""
        plain, whole = self.encode("a"), list(self._hf("a")["input_ids"])
        starts = (i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
        return tuple(whole[: next(starts, 0)])

    def _end(self) -> int | None:
        """ChatML's end of a message; or that of the chat template; or the end of a text."""
        number = self.special_id(IM_END)
        if number is not None:
            return number
        reply = self.parse(chat_template.after_reply(self._hf))
        return next((i for i in reply if i in self.special_ids), self._hf.eos_token_id)

    def encode(self, text: str) -> list[int]:
        return self._ids(text, split_special_tokens=True)

    def parse(self, text: str) -> list[int]:
        return self._ids(text, split_special_tokens=False)

    def _ids(self, text: str, split_special_tokens: bool) -> list[int]:
        if not text:
            return []
        options = {"add_special_tokens": False, "split_special_tokens": split_special_tokens}
        return list(self._hf(text, **options)["input_ids"])

    def decode(self, ids: list[int]) -> str:
        plain = [int(number) for number in ids if int(number) not in self.special_ids]
        return self._hf.decode(plain, clean_up_tokenization_spaces=False).strip()

    def special_id(self, name: str) -> int | None:
        number = self._hf.get_vocab().get(name)
        return number if number in self.special_ids else None

    def token(self, number: int) -> str:
        if number in self.special_ids:
            return str(self._hf.convert_ids_to_tokens(number))
        return self._hf.decode([number], clean_up_tokenization_spaces=False)

    def pieces(self) -> dict[int, str]:
        return {number: token for token, number in self._hf.get_vocab().items()}

    def chat_prompt(self, system: str, user: str) -> str | None:
        return chat_template.chat_prompt(self._hf, system, user)


class SentencePieceTokenizer:
    """A sentencepiece model: one of `dsasr data tokenizer`, or any other ``.model`` file.

    A trained folder's `META_NAME` lists the prompt's sentences that are one token each
    (``phrases``), and sets ``script_spacing``: Latin and Han runs are separated by a space in text,
    but not in pieces.
    """

    def __init__(self, model: str | Path, meta: dict | None = None) -> None:
        import sentencepiece

        meta = meta or {}
        try:
            self._sp = sentencepiece.SentencePieceProcessor(model_file=str(model))
        except (OSError, RuntimeError, ValueError):
            raise UserError(f"{model} is not a sentencepiece model") from None
        size = self._sp.get_piece_size()
        self.script_spacing = bool(meta.get("script_spacing", False))
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
        # Models that come with such a file alone (Llama, Gemma) read its <s> before every text.
        self.bos_ids = (self._sp.bos_id(),) if self._sp.bos_id() >= 0 else ()
        pad = self.special_id(PAD)
        pad = self._sp.pad_id() if pad is None else pad
        self.pad_id = pad if pad >= 0 else end

    def encode(self, text: str) -> list[int]:
        if text in self._phrases:
            return [self._phrases[text]]
        if not self.script_spacing:
            return list(self._sp.encode(text))
        return list(self._sp.encode(to_pieces(text)))

    def parse(self, text: str) -> list[int]:
        names = {self._sp.id_to_piece(number): number for number in self.special_ids}
        longest_first = sorted(map(re.escape, names), key=len, reverse=True)
        parts = re.split(f"({'|'.join(longest_first)})", text) if names else [text]
        return [
            number
            for part in parts
            for number in ([names[part]] if part in names else self.encode(part))
        ]

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
        return _from_pieces(text) if self.script_spacing and not parts else text.strip()

    def special_id(self, name: str) -> int | None:
        number = self._sp.piece_to_id(name)
        return number if number in self.special_ids else None

    def token(self, number: int) -> str:
        if number in self._phrase_of:
            return self._phrase_of[number]
        return self._sp.id_to_piece(number).replace("▁", " ")

    def pieces(self) -> dict[int, str]:
        own = {number: self._sp.id_to_piece(number) for number in range(self._sp.get_piece_size())}
        return own | self._phrase_of

    def chat_prompt(self, system: str, user: str) -> str | None:
        return None

    @property
    def phrases(self) -> list[str]:
        """The sentences that are one token each, in the order of their ids."""
        return list(self._phrases)

    def vocabulary(self) -> tuple[list[str], list[float], int]:
        """Sentencepiece's pieces by id, their log-probabilities (of what is no text, the lowest),
        and the id of the unknown piece."""
        sp, numbers = self._sp, range(self._sp.get_piece_size())
        text = [not (sp.is_control(i) or sp.is_byte(i) or sp.is_unknown(i)) for i in numbers]
        lowest = min(sp.get_score(i) for i in numbers if text[i])
        scores = [sp.get_score(i) if text[i] else lowest for i in numbers]
        return [sp.id_to_piece(i) for i in numbers], scores, sp.unk_id()


def to_pieces(text: str) -> str:
    """A space before each Latin run, none around Han: ``打开 wifi 吧`` → ``打开 wifi吧``.

    So ``wifi`` is the piece ``▁wifi`` at any position, and no Han character has a piece ``▁吧``.
    """
    runs = [(script, run.strip()) for script, run in script_runs(text)]
    return "".join(run if script == "zh" else " " + run for script, run in runs if run)


def _from_pieces(text: str) -> str:
    return " ".join(run.strip() for _, run in script_runs(text) if run.strip())


_FILES = (META_NAME, "tokenizer.json", "tokenizer_config.json", "tokenizer.model")


def has_tokenizer(folder: Path) -> bool:
    """Whether `load_tokenizer` finds one in ``folder``."""
    return any((folder / name).is_file() for name in _FILES)


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


def vocabulary_fingerprint(tokenizer: Tokenizer) -> str:
    """Twelve hex digits that two tokenizers share only if their tokens have the same ids."""
    rows = sorted(tokenizer.pieces().items())
    text = json.dumps(rows, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]


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


def check_tokenizer(
    tokenizer: Tokenizer, llm_vocab_size: int, llm_tokenizer: Tokenizer | None = None
) -> None:
    """Raise `UserError` unless ``tokenizer`` can belong to an LM of ``llm_vocab_size`` embeddings.

    LMs pad their vocabularies (Qwen3: 151,669 tokens, 151,936 rows), and a tokenizer may leave out
    tokens that are not text (Whisper's timestamps), so spare rows are fine up to 2048 or 5%; a
    token without a row is not. ``llm_tokenizer``, which came with the model, must have the same
    tokens, but for special ones.
    """
    size, fix = tokenizer.vocab_size, "use the tokenizer folder that came with the model"
    if size > llm_vocab_size:
        raise UserError(
            f"the tokenizer has {size} tokens, the language model only {llm_vocab_size} "
            f"embeddings: {fix}"
        )
    if llm_vocab_size - size > max(2048, llm_vocab_size // 20):
        raise UserError(
            f"the tokenizer has {size} tokens, the language model {llm_vocab_size} embeddings: "
            f"they do not belong together; {fix}"
        )
    if llm_tokenizer is None:
        return
    special = tokenizer.special_ids | llm_tokenizer.special_ids
    ours, theirs = tokenizer.pieces(), llm_tokenizer.pieces()
    common = sorted((ours.keys() & theirs.keys()) - special)
    differ = [number for number in common if ours[number] != theirs[number]]
    if len(differ) > len(common) // 100:
        first = differ[0]
        raise UserError(
            f"the tokenizer is not the language model's: {len(differ)} of {len(common)} tokens "
            f"differ, such as {first}, {ours[first]!r} instead of {theirs[first]!r}; {fix}"
        )


def check_end_token(tokenizer: Tokenizer, end_ids: Sequence[int]) -> None:
    """Raise `UserError` where none of the LM's end tokens is a special one of the tokenizer.

    For a tokenizer from elsewhere than the LM's folder, which has none of its own to compare with.
    """
    known = [number for number in end_ids if 0 <= number < tokenizer.vocab_size]
    if known and not tokenizer.special_ids & set(known):
        raise UserError(
            f"the language model ends a text with token {known[0]}, which is "
            f"{tokenizer.token(known[0])!r} to the tokenizer: use the tokenizer folder that came "
            "with the model"
        )
