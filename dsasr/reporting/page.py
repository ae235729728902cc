"""HTML pages that need no network: the templates' frame, style and script."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsasr.tracking.timeline_plot import DPI

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Figure:
    """A picture on a page; ``width`` in CSS pixels shows it at its size in inches, so that the
    text of all has one size."""

    title: str
    caption: str
    data: str
    width: int


def figure(title: str, path: Path, caption: str = "") -> Figure:
    """The PNG of ``path``, as `DPI` sized it."""
    data = path.read_bytes()
    width = 96 * int.from_bytes(data[16:20], "big") // DPI
    return Figure(title, caption, base64.b64encode(data).decode(), width)


def render(template: str, title: str, **values: Any) -> str:
    """The page of ``template``, which extends ``base.html.jinja``; all ``values`` are escaped.

    Its policy allows no script but the templates' own, by the script's digest, and no network.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    scripts = (TEMPLATES / name for name in ("sort.js", "play.js"))
    script = "".join(path.read_text(encoding="utf-8") for path in scripts)
    templates = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return templates.get_template(template).render(
        title=title,
        style=(TEMPLATES / "style.css").read_text(encoding="utf-8"),
        script=script,
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        **values,
    )
