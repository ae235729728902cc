"""Scripts: which characters and languages are Han, where a text changes to another script."""

from __future__ import annotations

import re

# Languages of Han text, and tags of speech that switches between one of them and English.
HAN_LANGS = frozenset(["zh", "cmn", "yue", "wuu", "nan", "hak"])
MIXED_LANGS = frozenset(
    ["zh-en", "en-zh", "cmn-en", "en-cmn", "yue-en", "en-yue", "cs", "mixed", "mix", "code-switch"]
)
# Inside of a character class: zero, extension A, unified, compatibility, planes 2 and 3.
HAN = "\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
HAN_CHARACTER = re.compile(f"[{HAN}]")
# Between two Han characters.
HAN_SPACES = re.compile(f"(?<=[{HAN}])\\s+(?=[{HAN}])")
_RUN = re.compile(f"[{HAN}]|[^\\W\\d_{HAN}]")  # a Han character, or a letter of another script


def script_runs(text: str, lang: str = "") -> list[tuple[str, str]]:
    """Split ``text`` where the script changes: [("zh" | "en", run)…], which join to ``text``.

    Digits, spaces and punctuation go with the run before them, at the start with the one after.
    A text without any letter is one run of ``lang`` (Mandarin if that starts with ``zh``).
    """
    runs: list[tuple[str, str]] = []
    start, current = 0, ""
    for match in _RUN.finditer(text):
        script = "zh" if HAN_CHARACTER.match(match.group()) else "en"
        if current and script != current:
            runs.append((current, text[start : match.start()]))
            start = match.start()
        current = script
    if text:
        runs.append((current or ("zh" if lang.startswith("zh") else "en"), text[start:]))
    return runs
