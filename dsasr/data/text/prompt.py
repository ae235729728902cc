"""The prompt around the speech, as text and as token ids.

`Prompt` is the only place that states the prompt's words: training, evaluation, transcription and
the demo's language model all build their prompt here.
"""

from __future__ import annotations

import re

from dsasr.data.text.tokenizers import IM_END, IM_START, Tokenizer
from dsasr.utils.errors import UserError

SPEECH = "<speech>"
_MARKER = re.compile(r"(<\|[a-z_]+\|>)")


class Prompt:
    """Qwen's chat format around the speech (NIM4-ASR, arXiv 2604.18105).

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
        """The parts before and after the speech, plain text and markers alternating.

        Plain text has the even indices, markers the odd ones, as `re.split` returns them. A marker
        within ``context``, which comes from the user, stays plain text.
        """
        before, after = cls.template.split(SPEECH)
        if context:
            after = after.replace(".", "." + cls.hints.replace("{context}", "\0"), 1)
        prefix, suffix = _MARKER.split(before), _MARKER.split(after)
        return prefix, [part.replace("\0", context or "") for part in suffix]

    @classmethod
    def phrases(cls) -> list[str]:
        """The distinct plain texts of the prompt without hints: tokens of a trained tokenizer."""
        prefix, suffix = cls.parts()
        return [text for text in dict.fromkeys(prefix[::2] + suffix[::2]) if text]

    @classmethod
    def build(cls, tokenizer: Tokenizer, context: str | None = None) -> tuple[list[int], list[int]]:
        """(prefix ids, suffix ids).

        If the tokenizer has no chat markers (it is not a chat model's), they are encoded as plain
        text. Raises `UserError` if it has only one of them.
        """
        markers = {m: tokenizer.special_id(m) for m in (IM_START, IM_END)}
        if len({number is None for number in markers.values()}) > 1:
            raise UserError(f"the tokenizer knows only one of {IM_START} and {IM_END}")
        prefix: list[int] = []
        suffix: list[int] = []
        for ids, side in zip((prefix, suffix), cls.parts(context), strict=True):
            for i, part in enumerate(side):
                number = markers[part] if i % 2 else None
                ids += tokenizer.encode(part) if number is None else [number]
        return prefix, suffix
