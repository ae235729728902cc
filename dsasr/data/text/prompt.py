"""The prompt around the speech, as text and as token ids.

`Prompt` is the only place that states the prompt's words: training, evaluation, transcription and
the demo's language model all build their prompt here.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from dsasr.data.text.chat_template import SPEECH
from dsasr.data.text.scripts import MIXED_LANGS
from dsasr.data.text.tokenizers import IM_END, IM_START, Tokenizer
from dsasr.utils.errors import UserError
from dsasr.utils.names import is_language

CONTEXT = "{context}"
LANG = "{lang}"
_SYSTEM = "You are a Multilingual Speech Recognition Model."
_USER = f"Transcribe the speech into text {SPEECH}."
_MARKER = re.compile(r"(<\|[a-z_]+\|>)")
_ANY_MARKER = re.compile(r"<\|[^<>|]+\|>")
# A place that stays empty, with the space that parted its text from its neighbor.
_EMPTY_LANG = re.compile(r"(?<![^\n])\{lang\} ?| ?\{lang\}")


@dataclass(frozen=True)
class PromptIds:
    """Token ids of the prompt before and after the speech embeddings."""

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]


class Prompt:
    """The instruction, the speech, hints: in the form that the language model was trained with.

    The order is NIM4-ASR's (arXiv 2604.18105): a streaming recognizer computes the part before the
    speech once and appends to it. The whole sequence is
    ``prefix + speech embeddings + suffix + transcript + end_id``.

    The form is, by the tokenizer:

    - Qwen's chat format (ChatML), where it has those markers and no other template;
    - its chat template, where it has one;
    - else the beginning-of-text token, if it has one, and the instruction in plain words.
    """

    template = (
        f"{IM_START}system\n{_SYSTEM}{IM_END}\n"
        f"{IM_START}user\n{_USER}{IM_END}\n"
        f"{IM_START}assistant\n"
    )
    language = f" Language: {LANG}."
    hints = f" Contextual hints: {CONTEXT}."

    @classmethod
    def parts(cls, context: str | None = None, language: str = "") -> tuple[list[str], list[str]]:
        """ChatML before and after the speech, plain text and markers alternating.

        Plain text has the even indices, markers the odd ones, as `re.split` returns them. A marker
        within ``context``, which comes from the user, stays plain text.
        """
        before, after = cls.template.split(SPEECH)
        told = cls.language.replace(LANG, language) if language else ""
        if context:
            told += cls.hints.replace(CONTEXT, "\0")
        after = after.replace(".", "." + told, 1)
        prefix, suffix = _MARKER.split(before), _MARKER.split(after)
        return prefix, [part.replace("\0", context or "") for part in suffix]

    @classmethod
    def phrases(cls) -> list[str]:
        """The distinct plain texts of the prompt without hints: tokens of a trained tokenizer."""
        prefix, suffix = cls.parts()
        return [text for text in dict.fromkeys(prefix[::2] + suffix[::2]) if text]

    @classmethod
    def build(
        cls,
        tokenizer: Tokenizer,
        context: str | None = None,
        template: str = "",
        language: str = "",
    ) -> tuple[list[int], list[int]]:
        """(prefix ids, suffix ids).

        ``template`` (the recipe's ``model.prompt``) takes the place of all forms above: text with
        one ``<speech>``, whose special tokens are parsed, a ``{lang}`` where it takes a language,
        and a ``{context}`` where it takes hints. ``language`` is a text of ``model.languages``, "":
        the prompt names none; ``context`` is always plain text. Raises `UserError` for a template
        that does not fit the tokenizer, and for a tokenizer that has only one of ChatML's markers.
        """
        if template:
            return cls._of_template(tokenizer, with_language(template, language), context)
        user = _USER + (cls.language.replace(LANG, language) if language else "")
        user += cls.hints if context else ""
        markers = [m for m in (IM_START, IM_END) if tokenizer.special_id(m) is not None]
        try:
            text = tokenizer.chat_prompt(_SYSTEM, user)
        except UserError:
            if len(markers) < 2:
                raise
            text = None
        if len(markers) == 2 and (text is None or f"{IM_START}user\n" in text):
            prefix, suffix = _encode_chatml(tokenizer, cls.parts(context, language))
        elif text is not None:
            return _encode_sides(tokenizer, text, context)
        elif markers:
            raise UserError(f"the tokenizer knows only {markers[0]} of {IM_START} and {IM_END}")
        else:
            prefix, suffix = _encode_sides(tokenizer, f"{_SYSTEM}\n{user}\n", context)
        bos = list(tokenizer.bos_ids)
        return (prefix if prefix[: len(bos)] == bos else bos + prefix), suffix

    @classmethod
    def _of_template(
        cls, tokenizer: Tokenizer, template: str, context: str | None
    ) -> tuple[list[int], list[int]]:
        check_template(template)
        for marker in _ANY_MARKER.findall(template):
            if len(tokenizer.parse(marker)) != 1:
                raise UserError(
                    f"model.prompt has {marker}, which is no token of the tokenizer: see the "
                    "special tokens in its tokenizer.json"
                )
        if context and CONTEXT not in template:
            raise UserError(f"model.prompt takes no hints: put {CONTEXT} where they belong")
        prefix, suffix = _encode_sides(tokenizer, template, context)
        if not prefix and not suffix:
            raise UserError(
                f"model.prompt has no token besides {SPEECH}: give at least one, which the first "
                "token of a transcript is predicted from"
            )
        return prefix, suffix


def check_template(template: str) -> None:
    """Raise `UserError` unless ``template`` has exactly one ``<speech>``."""
    count = template.count(SPEECH)
    if count != 1:
        raise UserError(f"model.prompt has {SPEECH} {count} times: it needs it once, for speech")


def with_language(template: str, language: str) -> str:
    """``template`` with ``language`` in its place for one; "": without the place, and without the
    space before it, or after it at the beginning of a line."""
    return template.replace(LANG, language) if language else _EMPTY_LANG.sub("", template)


def check_languages(template: str, languages: Mapping[str, str], share: float) -> None:
    """Raise `UserError` where ``model.languages`` does not go with ``model.prompt``."""
    if LANG in template and not languages:
        raise UserError(
            f"model.prompt has {LANG}: say what stands there with "
            "model.languages={en: English, zh: Chinese}"
        )
    if not languages:
        return
    if template and LANG not in template:
        raise UserError(f"model.prompt has no place for model.languages: put {LANG} into it")
    if not share:
        raise UserError(
            "model.language_share is 0, so that no prompt names a language: give a share, or leave "
            "out model.languages"
        )
    for lang, text in languages.items():
        if not lang or not is_language(lang):
            raise UserError(f"model.languages: {lang[:80]!r} is no name of a language")
        if not text.strip():
            raise UserError(f"model.languages.{lang} is empty: give its text in the prompt")
        if not template and _ANY_MARKER.search(text):
            raise UserError(
                f"model.languages.{lang} is a token: say where it stands, with a model.prompt that "
                f"has {LANG}"
            )


def find_language(lang: str, known: Collection[str]) -> str:
    """The tag among ``known`` that ``lang`` means; "" for none.

    It is the same one (in any case, with - or _), or that of its primary language: en of en-US.
    A tag of mixed speech (zh-en) means nothing but itself.
    """
    tag = lang.lower().replace("_", "-")
    tags = {name.lower().replace("_", "-"): name for name in known}
    if tag in tags or tag in MIXED_LANGS:
        return tags.get(tag, "")
    return tags.get(tag.partition("-")[0], "")


def describe(tokenizer: Tokenizer, prefix: Sequence[int], suffix: Sequence[int]) -> list[str]:
    """Two lines for people: the prompt's tokens, each in brackets, and the end of a transcript."""

    def shown(ids: Sequence[int]) -> str:
        return "".join(f"[{tokenizer.token(number)}]" for number in ids).replace("\n", "\\n")

    sides = " ".join(text for text in (shown(prefix), SPEECH, shown(suffix)) if text)
    return [
        f"{len(prefix) + len(suffix)} tokens: {sides}",
        f"a transcript ends with {shown([tokenizer.end_id])}",
    ]


def _encode_chatml(
    tokenizer: Tokenizer, parts: tuple[list[str], list[str]]
) -> tuple[list[int], list[int]]:
    """Part by part: a trained tokenizer has the prompt's sentences as tokens."""
    prefix: list[int] = []
    suffix: list[int] = []
    for ids, side in zip((prefix, suffix), parts, strict=True):
        for i, part in enumerate(side):
            ids += [tokenizer.special_id(part)] if i % 2 else tokenizer.encode(part)
    return prefix, suffix


def _encode_sides(
    tokenizer: Tokenizer, text: str, context: str | None
) -> tuple[list[int], list[int]]:
    """Trusted ``text`` with one `SPEECH`: special tokens are parsed in it, not in ``context``."""
    if not context:
        text = text.replace(CONTEXT, "")
    before, after = (_encode_side(tokenizer, side, context or "") for side in text.split(SPEECH))
    return before, after


def _encode_side(tokenizer: Tokenizer, text: str, context: str) -> list[int]:
    first, *others = text.split(CONTEXT)
    ids: list[int] = []
    for following in others:
        # A space belongs to the word after it, as in most vocabularies.
        spaced = first.endswith(" ")
        ids += tokenizer.parse(first.removesuffix(" ")) + tokenizer.encode(" " * spaced + context)
        first = following
    return ids + tokenizer.parse(first)
