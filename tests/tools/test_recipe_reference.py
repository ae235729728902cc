"""The reference page of recipe keys is generated, and current."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from dsasr.utils.errors import UserError

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def reference(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    monkeypatch.delitem(sys.modules, "recipe_reference", raising=False)
    import recipe_reference

    return recipe_reference


def test_the_page_is_current(reference):
    reference.main(["--check"])  # its error names the command that writes the page


def test_a_page_is_written_and_a_stale_one_refused(reference, tmp_path):
    page = tmp_path / "README.md"
    reference.main(["--page", str(page)])
    text = page.read_text()
    row = "| `stages.NAME.min_lr_ratio` | number, from 0 to 1 | `0.0` | learning rate at the end of"
    assert row in text
    # A default of the recipe's, not of the class; a repeated section; a required key.
    assert "| `evaluation.suite.clips` | integer, at least 0 | `2` |" in text
    assert "| `interleave` | [integer, integer], each at least 1 |" in text
    assert text.count(".min_seconds`") == 1 and "(#datadataloaderbatch)" in text
    assert "| `data.train` | list of sections | required |" in text and "| `demo` | " in text
    # Both kinds of an encoder, each with its keys.
    assert "(#modelencoder); see [model.encoder with path](#modelencoder-with-path) |" in text
    assert "### model.encoder with path\n" in text and "| `model.encoder.pad_to` |" in text
    reference.main(["--page", str(page), "--check"])
    page.write_text(text.replace("`0.0`", "`0.1`"))
    with pytest.raises(UserError, match=r"run 'python tools/recipe_reference\.py'"):
        reference.main(["--page", str(page), "--check"])


def test_a_key_without_a_comment_is_refused(reference):
    from dataclasses import dataclass

    @dataclass
    class Silent:
        explained: int = 1  # has a meaning
        silent: int = 2

    with pytest.raises(UserError, match=r"Silent\.silent has no comment"):
        list(reference.sections(Silent, None, "", {}))
