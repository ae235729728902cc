"""The checkpoint that a run resumes from, and whether its recipe may."""

from __future__ import annotations

from pathlib import Path

from dsasr import config
from dsasr.checkpoint import architecture
from dsasr.checkpoint.locate import open_verified_by_one
from dsasr.checkpoint.manager import CheckpointManager
from dsasr.checkpoint.tensor_fragments import FragmentError, FragmentReader
from dsasr.recipe import Recipe, changed_settings
from dsasr.training.stage_position import progress_in
from dsasr.utils import distributed
from dsasr.utils.errors import UserError
from dsasr.utils.io import atomic_write

# What `Trainer.save` puts into a checkpoint's manifest, and a resume reads.
STATE = (
    "recipe", "progress", "branches", "streams", "stage_seconds", "monitor", "bad_samples",
    "finished", "reference", "last_nll", "swapped_at", "drift_seconds",
)  # fmt: skip


def find_checkpoint(
    recipe: Recipe, checkpoints: CheckpointManager
) -> tuple[FragmentReader | None, list[str]]:
    """The checkpoint to resume from (None: start afresh), and why newer ones cannot be. Collective.

    Raises `UserError` where ``resume`` names a checkpoint that is not whole, where it is "never"
    and the folder has one, or where the checkpoint is of another recipe; ``allow_changed`` does not
    allow another architecture, nor a stage table in which the run has no position.
    """
    reader, passed_over = _find(recipe, checkpoints)
    if reader is None:
        return None, passed_over
    _check_state(reader)
    if not recipe.allow_changed:
        changed = changed_settings(reader.manifest["recipe"], recipe)
        if changed:
            raise UserError(
                f"{recipe.folder} was trained with another recipe ({'; '.join(changed)}): "
                "give run=FOLDER for a new run, or allow_changed=true to go on regardless"
            )
    try:
        architecture.check(reader, config.to_plain(recipe.model))
    except FragmentError as error:
        raise UserError(f"{error}; give the same, or run=FOLDER for a new run") from None
    progress_in(reader.manifest, recipe.schedule())
    return reader, passed_over


def _check_state(reader: FragmentReader) -> None:
    """Raise `UserError` where a folder is no checkpoint of a training run."""
    manifest = reader.manifest
    if manifest.get("kind") != "checkpoint":
        kind = manifest.get("kind", "another folder")
        raise UserError(
            f"{reader.folder} is no checkpoint to resume from ({kind}): give it as "
            "model.init_from, which starts a new run with its weights"
        )
    missing = [key for key in STATE if key not in manifest]
    if missing:
        raise UserError(f"{reader.folder} has no '{missing[0]}': resume from another checkpoint")


def _find(
    recipe: Recipe, checkpoints: CheckpointManager
) -> tuple[FragmentReader | None, list[str]]:
    if recipe.resume == "auto":
        return checkpoints.newest()
    if recipe.resume != "never":
        try:
            return open_verified_by_one(Path(recipe.resume)), []
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
