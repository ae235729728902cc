"""Chat templates of Hugging Face tokenizers: the prompt that they write, and the end of a turn.

A template is a Jinja program, which transformers runs in its sandbox. What it writes is trusted
text, whose special tokens count, and the same at every call.
"""

from __future__ import annotations

from typing import Any

from dsasr.utils.errors import UserError, message_of

SPEECH = "<speech>"  # stands for the speech in a prompt's text
_SENTINEL = "Xanadu"
# Some templates state today's date, and a model must see the prompt that it was trained with.
_NO_CLOCK = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"


def chat_prompt(hf: Any, system: str, user: str) -> str | None:
    """What a chat model sees of these two messages before it answers; None without a template.

    ``hf`` is a tokenizer of transformers; ``user`` has one `SPEECH`. Where the template takes no
    system message, the user's begins with that text. Raises `UserError` for a template that does
    not show both.
    """
    if not hf.chat_template:
        return None
    reason = "it does not show the messages once each"
    for messages in (
        [{"role": "system", "content": system}, {"role": "user", "content": user}],
        [{"role": "user", "content": f"{system}\n{user}"}],
    ):
        for as_parts in (False, True):
            try:
                text = _render(hf, messages, as_parts, add_generation_prompt=True)
            except Exception as error:  # whatever a program from elsewhere raises
                reason = message_of(error)
                continue
            if text.count(SPEECH) == 1 and text.count(system) == 1:
                return text
    raise UserError(
        f"the tokenizer's chat template gives no prompt ({reason}): give the prompt as model.prompt"
    )


def after_reply(hf: Any) -> str:
    """What the template writes after an assistant's message; empty without an answer to that."""
    if not hf.chat_template:
        return ""
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": _SENTINEL}]
    for as_parts in (False, True):
        try:
            _, found, after = _render(hf, messages, as_parts).rpartition(_SENTINEL)
        except Exception:  # as above; `chat_prompt` says so where the template is needed
            continue
        if found:
            return after
    return ""


def _render(hf: Any, messages: list[dict], as_parts: bool, **options: Any) -> str:
    """``as_parts``: contents as lists, which templates of multimodal models may insist on."""
    if as_parts:
        messages = [
            {**message, "content": [{"type": "text", "text": message["content"]}]}
            for message in messages
        ]
    template = hf.get_chat_template()
    if "strftime_now" in template:
        options["chat_template"] = _NO_CLOCK + template
    return hf.apply_chat_template(messages, tokenize=False, enable_thinking=False, **options)
