"""Modules and names that documentation refers to exist."""

from __future__ import annotations

import re
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
REFERENCE = re.compile(r"`(dsasr(?:\.\w+)+)`")


def exists(reference: str) -> bool:
    """Whether a dotted name is a package, a module, or a name that its module has."""
    parts = reference.split(".")
    for count in range(len(parts), 0, -1):
        module = ROOT.joinpath(*parts[:count])
        if module.is_dir() and count == len(parts):
            return True
        file = module / "__init__.py" if module.is_dir() else module.with_suffix(".py")
        if file.exists():
            source = file.read_text(encoding="utf-8")
            return all(re.search(rf"\b{name}\b", source) for name in parts[count:])
    return False


@pytest.mark.parametrize("folder", ["dsasr", "tests", "tools"])
def test_references_to_modules_resolve(folder) -> None:
    found, stale = 0, []
    for path in chain((ROOT / folder).rglob("*.py"), (ROOT / folder).rglob("*.md")):
        for reference in REFERENCE.findall(path.read_text(encoding="utf-8")):
            found += 1
            if not exists(reference):
                stale.append(f"{path.relative_to(ROOT)}: {reference}")
    assert not stale, stale
    assert found or folder != "dsasr"


def test_a_stale_reference_is_seen() -> None:
    assert exists("dsasr.model.adaptors.ctc.CtcAdaptor") and exists("dsasr.kernels")
    assert not exists("dsasr.data.text_batches") and not exists("dsasr.model.ctc.NoSuchName")
