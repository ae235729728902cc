"""Find a run's checkpoints, and open them with their checksums verified.

A run folder has its checkpoints in ``checkpoints/step-…``, as `CheckpointManager` publishes them;
the folder of a concurrent run has them in those of its two jobs, ``pretrain/`` and ``sft/``.
"""

from __future__ import annotations

from pathlib import Path

from dsasr.checkpoint import tensor_fragments
from dsasr.checkpoint.tensor_fragments import FragmentError, FragmentReader, on_all_ranks
from dsasr.utils import distributed
from dsasr.utils.errors import UserError


def list_checkpoints(folder: Path) -> list[Path]:
    """The published checkpoints in ``folder``, oldest first; none where it is missing."""
    return sorted(folder.glob("step-*")) if folder.is_dir() else []


def checkpoint_name(steps: int) -> str:
    """The name of the checkpoint after ``steps`` optimizer steps."""
    return f"step-{steps:010d}"


def checkpoint_folder(run: Path) -> Path:
    """The folder of a run's checkpoints; of a concurrent run that of its sft job, or until that has
    any, of its pretrain job."""
    folders = [path / "checkpoints" for path in (run, run / "sft", run / "pretrain")]
    return next((folder for folder in folders if folder.is_dir()), folders[0])


def is_run(path: Path) -> bool:
    """Whether ``path`` is the folder of a run, concurrent or not."""
    return any((path / job / "recipe.yaml").is_file() for job in ("", "sft", "pretrain"))


def recognizer_folder(run: Path) -> Path:
    """``run``, or of a run of two jobs the folder of its sft job, which has the recognizer."""
    own = (run / "recipe.yaml").is_file()
    return run / "sft" if not own and (run / "sft" / "recipe.yaml").is_file() else run


def run_folder(path: Path) -> Path:
    """The run folder that a checkpoint or a snapshot belongs to. Raises `UserError`."""
    for ancestor in (path, *path.resolve().parents[:3]):
        for folder in (ancestor, ancestor / "pretrain", ancestor / "sft"):
            if (folder / "recipe.yaml").is_file():
                return folder
    raise UserError(f"{path} belongs to no run: there is no recipe.yaml at or above it")


def newest_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint in ``folder`` whose checksums match, and why newer ones do not."""
    problems = []
    for path in reversed(list_checkpoints(folder)):
        try:
            tensor_fragments.verify(path)
            return path, problems
        except FragmentError as error:
            problems.append(str(error))
    return None, problems


def open_verified(path: Path) -> FragmentReader:
    """A reader of a checkpoint, a snapshot or an average, after its checksums were verified.

    Raises `FragmentError` when it is missing, torn or altered.
    """
    tensor_fragments.verify(path)
    return FragmentReader(path)


def open_verified_by_one(path: Path) -> FragmentReader:
    """`open_verified` on all ranks, of which the main one verifies; collective.

    Raises `FragmentError` on all ranks.
    """
    reads = open_verified if distributed.is_main_rank() else FragmentReader
    return on_all_ranks(lambda: reads(path))


def open_checkpoint(path: Path) -> FragmentReader:
    """`open_verified` for a path that a user gave: `UserError` in place of `FragmentError`."""
    try:
        return open_verified(path)
    except FragmentError as error:
        raise UserError(f"{error}: give another checkpoint, or copy this one again") from None


def open_run_checkpoint(run: Path, name: str = "") -> FragmentReader:
    """A run's newest whole checkpoint, or the one of ``name`` (``step-…``, or any folder's path).

    Raises `UserError`, which lists what there is, when it is missing or not whole.
    """
    folder = checkpoint_folder(run)
    names = ", ".join(path.name for path in list_checkpoints(folder)) or "none yet"
    if not name:
        path, problems = newest_whole(folder)
        if path is None:
            reason = problems[0] if problems else "train it until its first one is written"
            raise UserError(f"{run} has no whole checkpoint: {reason}")
        return FragmentReader(path)
    path = folder / name if (folder / name).is_dir() else Path(name)
    if not path.is_dir():
        raise UserError(f"there is no checkpoint {name}; {run} has {names}")
    try:
        return open_verified(path)
    except FragmentError as error:
        raise UserError(f"checkpoint {name} is not whole: {error}; {run} has {names}") from None
