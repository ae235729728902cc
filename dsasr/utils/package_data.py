"""Folders that stand beside the package in a checkout and inside it in a wheel."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).parents[1]
RECIPES = PACKAGE / "recipes"
CODE = PACKAGE.parent  # the folder to import dsasr from: a checkout's root, or site-packages


def packaged_folder(name: str) -> Path:
    """``ds_configs`` or ``slurm``: inside the package where it is installed (pyproject.toml), else
    at the top of the checkout."""
    installed = PACKAGE / name
    return installed if installed.is_dir() else CODE / name
