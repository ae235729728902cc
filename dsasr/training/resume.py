"""The checkpoint that a run resumes from, and whether its recipe may."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsasr import config
from dsasr.build import Builder
from dsasr.checkpoint import architecture, stored_recipe
from dsasr.checkpoint.locate import list_checkpoints, open_verified_by_one
from dsasr.checkpoint.manager import CheckpointManager
from dsasr.checkpoint.manifest import read_manifest
from dsasr.checkpoint.tensor_fragments import FragmentError, FragmentReader, file_digest
from dsasr.data.text.lexicon import lexicon_path
from dsasr.recipe import Recipe, changed_settings
from dsasr.tracking.run_log import ENVIRONMENT
from dsasr.training.stage_position import progress_in
from dsasr.utils import distributed
from dsasr.utils.environment import environment
from dsasr.utils.errors import UserError
from dsasr.utils.io import atomic_write, to_json
from dsasr.utils.troubleshooting import see

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
    _refuse_changes(reader.manifest, recipe)
    try:
        architecture.check(reader, config.to_plain(recipe.model))
    except FragmentError as error:
        raise UserError(
            f"{error}; give the same, or run=FOLDER for a new run{see('resume-refused')}"
        ) from None
    progress_in(reader.manifest, recipe.schedule())
    return reader, passed_over


def check(recipe: Recipe) -> None:
    """`find_checkpoint` before the ranks meet, by manifests alone.

    Raises `UserError` for another recipe, a checkpoint that is missing, or a folder with a run.
    """
    checkpoints = list_checkpoints(recipe.folder / "checkpoints")
    if recipe.resume == "never" and checkpoints:
        _refuse_a_second_run(recipe)
    newest = checkpoints[-1:] if recipe.resume in ("auto", "never") else [Path(recipe.resume)]
    for path in newest:
        try:
            _refuse_changes(read_manifest(path), recipe)
        except FragmentError as error:
            if recipe.resume != "auto":  # else an older one is tried
                raise UserError(f"resume={recipe.resume}: {error}") from None


def starts_afresh(recipe: Recipe) -> bool:
    """Whether a job would start without a checkpoint, going by what lies in its folder."""
    resumes = recipe.resume == "auto" and list_checkpoints(recipe.folder / "checkpoints")
    return not resumes and recipe.resume in ("auto", "never")


def contents(builder: Builder) -> dict[str, str]:
    """Fingerprints of the files that decide what a batch or a step is, by the recipe's keys.

    Raises `UserError` for a file that cannot be read.
    """
    recipe, data = builder.recipe, builder.recipe.data
    files: dict[str, str | Path] = {}
    if Path(recipe.engine.deepspeed).suffix == ".json":
        files["engine.deepspeed"] = recipe.engine.deepspeed
    if recipe.pretrained_encoder is None:
        files["data.cmvn"] = builder.original_or_copy(data.cmvn)
    if "phonemes" in builder.vocabularies:
        files["data.phonemes"] = builder.original_or_copy(data.phonemes)
        if data.phonemizer.kind == "lexicon":
            for number, path in enumerate(data.phonemizer.lexicons):
                files[f"data.phonemizer.lexicons[{number}]"] = lexicon_path(path)
    if data.text_only is not None and data.text_only.confusions:
        files["data.text_only.confusions"] = data.text_only.confusions
    digests = {}
    for key, path in files.items():
        try:
            digests[key] = file_digest(Path(path))[:16]
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    if "tokenizer" in builder.vocabularies:
        digests["model.tokenizer"] = builder.vocabularies["tokenizer"]
    return digests


def check_contents(manifest: Mapping[str, Any], builder: Builder) -> None:
    """Raise `UserError` where a file of the recipe has another content than when the checkpoint was
    written; a checkpoint that knows no contents passes."""
    old, new = manifest.get("contents", {}), contents(builder)
    changed = [key for key, digest in old.items() if new.get(key, digest) != digest]
    if changed and not builder.recipe.allow_changed:
        raise UserError(
            f"{builder.recipe.folder} was trained with another content of {', '.join(changed)}: "
            "put the file back, give run=FOLDER for a new run, or allow_changed=true to go on "
            f"regardless{see('resume-refused')}"
        )


def _refuse_changes(manifest: Mapping[str, Any], recipe: Recipe) -> None:
    if not isinstance(manifest.get("recipe"), dict):
        raise UserError(f"resume={recipe.resume}: it is no checkpoint of a run")
    changed = [] if recipe.allow_changed else changed_settings(manifest["recipe"], recipe)
    if changed:
        raise UserError(
            f"{recipe.folder} was trained with another recipe ({'; '.join(changed)}): "
            "give run=FOLDER for a new run, or allow_changed=true to go on regardless"
            f"{see('resume-refused')}"
        )


def _refuse_a_second_run(recipe: Recipe) -> None:
    raise UserError(
        f"{recipe.folder} holds a run already: resume=auto goes on with it, "
        "run=FOLDER starts another one"
    )


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
        _refuse_a_second_run(recipe)
    return None, []


def save_environment(recipe: Recipe) -> None:
    """Write ``environment.json`` of rank 0 into the run folder, for the report; not collective."""
    if distributed.is_main_rank():
        values = environment() | {"ranks": distributed.world_size()}
        with contextlib.suppress(OSError):
            atomic_write(recipe.folder / ENVIRONMENT, to_json(values, indent=1) + "\n")


def save_recipe(recipe: Recipe) -> None:
    """Write ``recipe.yaml`` into the run folder, or raise `UserError`; collective."""
    try:
        distributed.on_main_rank(lambda: stored_recipe.write(recipe.folder, recipe))
    except OSError as error:
        raise UserError(f"{recipe.folder} cannot be written: {error}") from None
