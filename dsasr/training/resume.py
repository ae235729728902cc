"""The checkpoint that a run resumes from, and whether its recipe may."""

from __future__ import annotations

from pathlib import Path

from dsasr import config
from dsasr.checkpoint.manager import CheckpointManager
from dsasr.checkpoint.tensor_fragments import FragmentError, FragmentReader
from dsasr.recipe import Recipe, changed_settings
from dsasr.utils import distributed
from dsasr.utils.errors import UserError
from dsasr.utils.io import atomic_write


def find_checkpoint(
    recipe: Recipe, checkpoints: CheckpointManager
) -> tuple[FragmentReader | None, list[str]]:
    """The checkpoint to resume from (None: start afresh), and why newer ones cannot be. Collective.

    Raises `UserError` where ``resume`` names a checkpoint that cannot be read, where it is "never"
    and the folder has one, or where the checkpoint is of another recipe.
    """
    reader, passed_over = _find(recipe, checkpoints)
    if reader is not None and not recipe.allow_changed:
        changed = changed_settings(reader.manifest["recipe"], recipe)
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


def save_recipe(recipe: Recipe) -> None:
    """Write ``recipe.yaml`` into the run folder, or raise `UserError`; collective."""
    try:
        distributed.on_main_rank(
            lambda: atomic_write(recipe.folder / "recipe.yaml", config.dump(recipe))
        )
    except OSError as error:
        raise UserError(f"{recipe.folder} cannot be written: {error}") from None
