"""A trained recogniser out of a run folder, on one machine and without DeepSpeed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from dsasr import config, fragments, partition
from dsasr.build import Builder
from dsasr.data.stream import DatasetConfig
from dsasr.errors import UserError
from dsasr.evaluation.decode import DecodeConfig
from dsasr.evaluation.validate import Transcripts, transcribe
from dsasr.fragments import Below, FragmentError, FragmentReader
from dsasr.model.speech_llm import SpeechLLM
from dsasr.ranks import device
from dsasr.recipe import Recipe


@dataclass(frozen=True)
class Recogniser:
    """A model with all that it needs to read audio and write text."""

    build: Builder
    model: SpeechLLM
    checkpoint: Path

    @classmethod
    def from_run(cls, folder: str | Path) -> Recogniser:
        """The newest whole checkpoint of a run folder. Raises `UserError` if there is none."""
        folder = Path(folder)
        build = Builder(run_recipe(folder))
        reader = newest(folder)
        model = build.speech_llm()
        try:
            partition.load_weights(model, Below(reader, "sft/"))
        except FragmentError as error:
            raise UserError(f"{reader.folder} holds no recogniser: {error}") from None
        return cls(build, model.to(device()).eval(), reader.folder)

    def transcribe_shards(
        self, shards: str, name: str = "test", decode: DecodeConfig | None = None, beam: int = 0
    ) -> Transcripts:
        """Transcripts of all samples of ``shards``, with their references."""
        chosen = decode or self.build.recipe.evaluation.decode
        if beam:
            chosen = DecodeConfig(**{**config.to_plain(chosen), "beam": beam})
        batches = self.build.held_out("sft", datasets=(DatasetConfig(name, shards),))
        return transcribe(self.model, batches, self.build.tokenizer, chosen, device=device())


def run_recipe(folder: Path) -> Recipe:
    """The recipe that a run folder was trained with."""
    path = folder / "recipe.yaml"
    if not path.is_file():
        raise UserError(f"{folder} is no run folder: it has no recipe.yaml")
    values = config.read_recipe(str(path))
    return config.build(Recipe, {**values, "run": str(folder)})


def newest(folder: Path) -> FragmentReader:
    """The newest checkpoint of a run whose checksums hold."""
    for path in sorted((folder / "checkpoints").glob("step-*"), reverse=True):
        try:
            fragments.verify(path)
            return FragmentReader(path)
        except FragmentError:
            continue
    raise UserError(f"{folder} has no whole checkpoint yet")


def events(folder: Path) -> list[dict]:
    """The run's events, oldest first; a torn last line is left out."""
    path, found = folder / "events.jsonl", []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                break
    return found


def finished(folder: Path) -> bool:
    """Whether the run has come to the end of its schedule."""
    return any(e["event"] == "finished" for e in events(folder))
