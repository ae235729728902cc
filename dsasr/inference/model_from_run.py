"""Restore a trained model from a checkpoint of a run folder, on one machine, without DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dsasr import config
from dsasr.build import Builder
from dsasr.checkpoint import architecture, zero_partition
from dsasr.checkpoint.locate import open_run_checkpoint
from dsasr.checkpoint.tensor_fragments import FragmentError, PrefixReader
from dsasr.evaluation.eval_sets import Recording
from dsasr.evaluation.results import Results
from dsasr.evaluation.suite import RECORDINGS_ONLY, SuiteConfig, build_suite
from dsasr.evaluation.transcribe import transcribe_clips
from dsasr.model.speech_llm import SpeechLLM
from dsasr.recipe import Recipe
from dsasr.utils.distributed import device
from dsasr.utils.errors import UserError


@dataclass(frozen=True)
class RunModel:
    """A `SpeechLLM` restored from a run's ``checkpoint``, with the builder of the run's recipe.

    For evaluation and export; `dsasr.Recognizer` transcribes audio files.
    """

    build: Builder
    model: SpeechLLM
    checkpoint: Path

    @classmethod
    def from_run(cls, folder: str | Path, checkpoint: str = "") -> RunModel:
        """Load the newest whole checkpoint of a run folder, or one by name (``step-…``) or path.

        Raises `UserError` if there is none, or if ``checkpoint`` is missing or torn.
        """
        folder = Path(folder)
        build = Builder(run_recipe(folder))
        reader = open_run_checkpoint(folder, checkpoint)
        model = build.speech_llm()
        try:
            architecture.check(reader, config.to_plain(build.recipe.model))
            zero_partition.load_weights(model, PrefixReader(reader, "sft/"))
        except FragmentError as error:
            raise UserError(f"{reader.folder} holds no recognizer: {error}") from None
        return cls(build, model.to(device()).eval(), reader.folder)

    def transcribe(
        self,
        recordings: Sequence[Recording],
        config: SuiteConfig = RECORDINGS_ONLY,
        *,
        beam: int = 0,
        suite_utterances: int = 0,
        progress: Callable[[Iterable], Iterable] = lambda items: items,
    ) -> Results:
        """Transcribe the suite that ``config`` makes of ``recordings``.

        ``beam`` is the beam width (0: the recipe's); ``suite_utterances``: those of `build_suite`;
        ``progress`` wraps the batches.
        """
        recipe = self.build.recipe
        decode = recipe.evaluation.decode
        return transcribe_clips(
            self.model,
            build_suite(
                recordings, config, rate=self.build.front_end.rate, utterances=suite_utterances
            ),
            self.build.tokenizer,
            replace(decode, beam=beam) if beam else decode,
            front_end=self.build.front_end,
            device=device(),
            progress=progress,
        )


def run_recipe(folder: Path) -> Recipe:
    """The recipe that a run folder was trained with.

    Its `Recipe.folder` is where ``folder`` is now, also for one of the two of a concurrent run.
    Raises `UserError` if it is no run folder.
    """
    path = folder / "recipe.yaml"
    if not path.is_file():
        hint = f"; give {folder / 'sft'}" if (folder / "sft" / "recipe.yaml").is_file() else ""
        raise UserError(f"{folder} is no run folder: it has no recipe.yaml{hint}")
    values = config.read_recipe(str(path))
    run = folder if values.get("branch", "both") == "both" else folder.resolve().parent
    return config.build(Recipe, {**values, "run": str(run)})
