"""A trained recognizer out of a run folder, on one machine and without DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dsasr import config
from dsasr.build import Builder
from dsasr.checkpoint import zero_partition
from dsasr.checkpoint.locate import open_run_checkpoint
from dsasr.checkpoint.tensor_fragments import FragmentError, PrefixReader
from dsasr.evaluation import suite_results
from dsasr.evaluation.eval_sets import Recording
from dsasr.evaluation.suite import SuiteConfig
from dsasr.evaluation.suite_results import Trials
from dsasr.model.speech_llm import SpeechLLM
from dsasr.recipe import Recipe
from dsasr.utils.distributed import device
from dsasr.utils.errors import UserError
from dsasr.utils.io import read_json_lines


@dataclass(frozen=True)
class RunModel:
    """A model with all that it needs to read audio and write text."""

    build: Builder
    model: SpeechLLM
    checkpoint: Path

    @classmethod
    def from_run(cls, folder: str | Path, checkpoint: str = "") -> RunModel:
        """The newest whole checkpoint of a run folder, or that of a name (``step-…``) or a path.

        Raises `UserError` if there is none, or if ``checkpoint`` is missing or torn.
        """
        folder = Path(folder)
        build = Builder(run_recipe(folder))
        reader = open_run_checkpoint(folder, checkpoint)
        model = build.speech_llm()
        try:
            zero_partition.load_weights(model, PrefixReader(reader, "sft/"))
        except FragmentError as error:
            raise UserError(f"{reader.folder} holds no recognizer: {error}") from None
        return cls(build, model.to(device()).eval(), reader.folder)

    def hear(
        self,
        recordings: Sequence[Recording],
        config: SuiteConfig = suite_results.PLAIN,
        *,
        beam: int = 0,
        progress: Callable[[Iterable], Iterable] = lambda items: items,
    ) -> Trials:
        """Transcripts of the cases that ``config`` makes of ``recordings``; ``beam`` 0: the
        recipe's."""
        recipe = self.build.recipe
        chosen = recipe.evaluation.decode
        return suite_results.hear(
            self.model,
            suite_results.cases(recordings, config, rate=recipe.data.fbank.rate),
            self.build.tokenizer,
            replace(chosen, beam=beam) if beam else chosen,
            fbank=recipe.data.fbank,
            cmvn=self.build.cmvn,
            device=device(),
            progress=progress,
        )


def run_folder(path: Path) -> Path:
    """The run folder that a checkpoint or a snapshot belongs to. Raises `UserError`."""
    for place in (path, *path.resolve().parents[:3]):
        for folder in (place, place / "pretrain", place / "sft"):
            if (folder / "recipe.yaml").is_file():
                return folder
    raise UserError(f"{path}: no run's recipe.yaml at or above it")


def run_recipe(folder: Path) -> Recipe:
    """The recipe that a run folder was trained with, as of where the folder is now: `Recipe.folder`
    is ``folder``, also where it is one of the two of a concurrent run."""
    path = folder / "recipe.yaml"
    if not path.is_file():
        hint = f"; give {folder / 'sft'}" if (folder / "sft" / "recipe.yaml").is_file() else ""
        raise UserError(f"{folder} is no run folder: it has no recipe.yaml{hint}")
    values = config.read_recipe(str(path))
    run = folder if values.get("branch", "both") == "both" else folder.resolve().parent
    return config.build(Recipe, {**values, "run": str(run)})


def events(folder: Path) -> list[dict]:
    """The run's events, oldest first; torn lines are left out."""
    return read_json_lines(folder / "events.jsonl")


def finished(folder: Path) -> bool:
    """Whether the run has come to the end of its schedule."""
    return any(e["event"] == "finished" for e in events(folder))
