"""The CTC head of an encoder that a run took from elsewhere, where no branch of the run has one.

A fine-tuning has no pretrain branch, but its transcripts are scored and timed by the head that
belongs to its encoder. The run keeps that head beside its checkpoints, in ``RUN/ctc_head``.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from safetensors.torch import save_file

from dsasr.checkpoint.named_tensors import NamedTensors
from dsasr.model.hf_weights import TensorFiles
from dsasr.utils.io import atomic_path

FOLDER = "ctc_head"


def remove(run: Path) -> None:
    """Forget the head of an earlier start of ``run``, whose encoder is not this one's."""
    shutil.rmtree(run / FOLDER, ignore_errors=True)


def save(reader: NamedTensors, names: Iterable[str], run: Path) -> None:
    """Copy the tensors ``names`` of ``reader`` into the run folder ``run``."""
    tensors = {name: reader.whole(name) for name in sorted(names)}
    with atomic_path(run / FOLDER / "model.safetensors") as temporary:
        save_file(tensors, temporary)


def open_kept(run: Path) -> NamedTensors | None:
    """The head that ``run`` keeps; None where it keeps none. Raises `UserError` if it is
    unreadable."""
    files = TensorFiles(run / FOLDER)
    return NamedTensors.of_files(files) if files.shapes else None
