"""The page of symptoms: every message that names a section finds it, every section is named."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from dsasr.utils.troubleshooting import PAGE, see

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / PAGE).read_text(encoding="utf-8")
ANCHORS = re.findall(r'<a id="([^"]+)"></a>', TEXT)


def linked() -> dict[str, str]:
    """Section → a file with a call of `see` that names it. Each call has a literal."""
    found = {}
    for path in sorted((ROOT / "dsasr").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "see":
                (argument,) = node.args
                assert isinstance(argument, ast.Constant), f"{path}:{node.lineno}"
                found[argument.value] = str(path)
    return found


def test_every_link_has_its_section_and_every_section_a_link():
    assert len(ANCHORS) == len(set(ANCHORS)) > 10
    assert set(linked()) == set(ANCHORS), linked()


def test_links_within_the_page():
    assert set(re.findall(r"\]\(#([^)]+)\)", TEXT)) <= set(ANCHORS)


def test_a_section_has_a_symptom_and_a_fix():
    for section in TEXT.split('<a id="')[1:]:
        assert "### " in section and "*Symptom:*" in section, section[:60]
        assert "*Fix:*" in section or "| fix |" in section, section[:60]


def test_a_message_names_the_page():
    assert see("loops") == "; see dsasr/recipes/TROUBLESHOOTING.md#loops"
