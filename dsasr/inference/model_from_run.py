"""Restore a trained model from a checkpoint of a run folder, on one machine, without DeepSpeed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dsasr import config
from dsasr.build import Builder
from dsasr.checkpoint import architecture, stored_recipe, zero_partition
from dsasr.checkpoint.locate import open_run_checkpoint
from dsasr.checkpoint.stored_recipe import RECIPE
from dsasr.checkpoint.tensor_fragments import FragmentError, PrefixReader
from dsasr.data.speech_statistics import SpeechStatistics
from dsasr.evaluation.tuned import Tuned
from dsasr.inference.ctc_head import attach_own_head
from dsasr.model.speech_llm import SpeechLLM
from dsasr.recipe import Recipe
from dsasr.tracking.run_log import SPEECH
from dsasr.utils.distributed import device
from dsasr.utils.errors import UserError


@dataclass(frozen=True)
class RunModel:
    """A `SpeechLLM` restored from a run's ``checkpoint``, with the builder of the run's recipe.

    It scores with the encoder's CTC head, where the run has one. ``speech``: of its training;
    ``tuned``: on its validation set.
    """

    builder: Builder
    model: SpeechLLM
    checkpoint: Path
    speech: SpeechStatistics
    tuned: Tuned

    @classmethod
    def from_run(cls, folder: str | Path, checkpoint: str = "") -> RunModel:
        """Load the newest whole checkpoint of a run folder, or one by name (``step-…``) or path.

        Raises `UserError` if there is none, or if ``checkpoint`` is missing or torn.
        """
        folder = Path(folder)
        builder = Builder(run_recipe(folder))
        reader = open_run_checkpoint(folder, checkpoint)
        model = builder.speech_llm()
        try:
            architecture.check(reader, config.to_plain(builder.recipe.model))
            zero_partition.load_weights(model, PrefixReader(reader, "sft/"))
            attach_own_head(model, builder, reader)
        except FragmentError as error:
            raise UserError(f"{reader.folder} holds no recognizer: {error}") from None
        tuned = Tuned.load(builder.recipe.folder)
        return cls(
            builder, model.to(device()).eval(), reader.folder, speech_statistics(builder), tuned
        )


def speech_statistics(builder: Builder) -> SpeechStatistics:
    """Those that the run wrote at its start; empty where it is of an older release."""
    path = builder.recipe.folder / SPEECH
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return SpeechStatistics()
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}; remove it to do without it") from None
    return config.build(SpeechStatistics, values)


def run_recipe(folder: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe that a run folder was trained with, with ``key=value`` overrides.

    Its `Recipe.folder` is where ``folder`` is now, also for one of the two of a concurrent run, and
    its relative paths lead where they did (`stored_recipe`). Raises `UserError` if it is no run
    folder.
    """
    if not (folder / RECIPE).is_file():
        what = "is no run folder: it has no recipe.yaml" if folder.is_dir() else "does not exist"
        raise UserError(f"{folder} {what}")
    values = stored_recipe.read(folder)
    run = folder if values.get("branch", "both") == "both" else folder.resolve().parent
    return config.build(Recipe, config.override({**values, "run": str(run)}, overrides))
