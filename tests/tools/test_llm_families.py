"""The page of language model families is generated, and current."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from dsasr.utils.errors import UserError

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def families(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    monkeypatch.delitem(sys.modules, "llm_families", raising=False)
    import llm_families

    return llm_families


@pytest.mark.slow
def test_the_page_is_current(families):
    families.main(["--check"])  # its error names the command that writes the page


def test_a_page_is_written_and_a_stale_one_refused(families, tmp_path, monkeypatch, capsys):
    few = {name: families.FAMILIES[name] for name in ("qwen3", "bloom", "mamba2")}
    monkeypatch.setattr(families, "FAMILIES", few)
    page = tmp_path / "page.md"
    families.main(["--page", str(page)])
    text = page.read_text()
    assert "| qwen3 | sdpa, eager | yes | yes | yes |\n" in text
    assert "| bloom | sdpa | refused: bloom does not run" in text
    assert "| bloom | eager | off | yes | yes |\n" in text
    assert "| mamba2 | eager | off | yes | no: peft refuses" in text
    families.main(["--page", str(page), "--check"])
    page.write_text(text.replace("| off |", "| yes |"))
    with pytest.raises(UserError, match=r"run 'python tools/llm_families\.py'"):
        families.main(["--page", str(page), "--check"])
    page.write_text(text.replace("transformers ", "transformers 0."))
    families.main(["--page", str(page), "--check"])
    assert "another release" in capsys.readouterr().out
