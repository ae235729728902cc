"""A run's folder at a start: what it holds already, and whether the recipe may go on with that."""

from __future__ import annotations

from pathlib import Path

from dsasr import config
from dsasr.checkpoint.manager import CheckpointManager
from dsasr.checkpoint.tensor_fragments import FragmentError, FragmentReader
from dsasr.recipe import Recipe, changes
from dsasr.utils import distributed
from dsasr.utils.errors import UserError
from dsasr.utils.io import atomic_write


def choose(
    recipe: Recipe, checkpoints: CheckpointManager
) -> tuple[FragmentReader | None, list[str]]:
    """The checkpoint to go on from, and why not from newer ones; None: a fresh start. Collective.

    Raises `UserError` where there is none to be read, none is to be there, or another recipe's is.
    """
    reader, passed_over = _find(recipe, checkpoints)
    if reader is not None and not recipe.allow_changed:
        changed = changes(reader.manifest["recipe"], recipe)
        if changed:
            raise UserError(
                f"{recipe.folder} was trained with another recipe ({'; '.join(changed)}): "
                "give run=FOLDER for a new run, or allow_changed=true to go on regardless"
            )
    return reader, passed_over


def _find(
    recipe: Recipe, checkpoints: CheckpointManager
) -> tuple[FragmentReader | None, list[str]]:
    if recipe.resume == "auto":
        return checkpoints.newest()
    if recipe.resume != "never":
        try:
            return FragmentReader(Path(recipe.resume)), []
        except FragmentError as error:
            raise UserError(f"resume={recipe.resume}: {error}") from None
    if checkpoints.list():
        raise UserError(
            f"{recipe.folder} holds a run already: resume=auto goes on with it, "
            "run=FOLDER starts another one"
        )
    return None, []


def keep_recipe(recipe: Recipe) -> None:
    """``recipe.yaml`` in the run's folder, or `UserError`; collective."""
    try:
        distributed.on_main_rank(
            lambda: atomic_write(recipe.folder / "recipe.yaml", config.dump(recipe))
        )
    except OSError as error:
        raise UserError(f"{recipe.folder} cannot be written: {error}") from None
