"""A recognizer to evaluate: a run's checkpoint, or an exported folder, with what scoring needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from dsasr.checkpoint.export_folder import is_export
from dsasr.data.audio.frontends import FrontEnd
from dsasr.data.shards.storage import StorageConfig
from dsasr.data.speech_statistics import SpeechStatistics
from dsasr.data.text.normalization import TextConfig
from dsasr.data.text.prompt import find_language
from dsasr.data.text.tokenizers import Tokenizer
from dsasr.evaluation.decode import DecodeConfig
from dsasr.evaluation.eval_sets import Recording
from dsasr.evaluation.results import Results
from dsasr.evaluation.suite import RECORDINGS_ONLY, SuiteConfig, build_suite
from dsasr.evaluation.transcribe import DoubtRules, transcribe_clips
from dsasr.evaluation.tuned import Tuned
from dsasr.inference.export import load_export
from dsasr.inference.model_from_run import RunModel
from dsasr.model.speech_llm import SpeechLLM
from dsasr.utils.distributed import device
from dsasr.utils.errors import UserError


@dataclass(frozen=True)
class EvaluatedModel:
    """``text``: the form of references; ``rules``: of scores, where none are given; ``path``: the
    checkpoint or the exported folder."""

    model: SpeechLLM
    tokenizer: Tokenizer
    front_end: FrontEnd
    decode: DecodeConfig
    text: TextConfig
    rules: str
    source: StorageConfig
    path: Path
    speech: SpeechStatistics = field(default_factory=SpeechStatistics)
    tuned: Tuned = field(default_factory=Tuned)

    @classmethod
    def open(cls, folder: Path, checkpoint: str = "") -> EvaluatedModel:
        """Load a run's ``checkpoint`` (`RunModel.from_run`), or an export. Raises `UserError`."""
        if is_export(folder):
            if checkpoint:
                raise UserError(f"--checkpoint is for runs: {folder} is an exported model")
            export = load_export(folder)
            cfg = export.config
            return cls(
                export.model.to(device()), export.tokenizer, export.front_end, cfg.decode,
                cfg.text, cfg.rules, StorageConfig(), folder, cfg.speech, cfg.tuned,
            )  # fmt: skip
        run = RunModel.from_run(folder, checkpoint)
        recipe, builder = run.builder.recipe, run.builder
        return cls(
            run.model, builder.tokenizer, builder.front_end, recipe.evaluation.decode,
            recipe.data.text, recipe.evaluation.rules, recipe.data.dataloader.source,
            run.checkpoint, run.speech, run.tuned,
        )  # fmt: skip

    def transcribe(
        self,
        recordings: Sequence[Recording],
        config: SuiteConfig = RECORDINGS_ONLY,
        *,
        beam: int = 0,
        chunk_ms: int = 0,
        suite_utterances: int = 0,
        lang: str = "",
        hint_langs: bool = False,
        progress: Callable[[Iterable], Iterable] = lambda items: items,
    ) -> Results:
        """Transcribe the suite that ``config`` makes of ``recordings``.

        ``beam`` is the beam width, ``chunk_ms`` the chunk (0: the model's); ``suite_utterances``:
        those of `build_suite`; ``lang``: what is spoken in all of them, which the prompt names as
        in `Recognizer.transcribe`, and which rows without a language are of; ``hint_langs``: the
        prompt names each row's own language, where it can (`own_hint`); ``progress`` wraps the
        batches. Raises `UserError` for a language that the model was not trained with.
        """
        told = self.model.hint(lang)
        if lang:
            recordings = [replace(r, lang=r.lang or lang) for r in recordings]
        decode = self.decoding(beam)
        decode = replace(decode, chunk_ms=chunk_ms or decode.chunk_ms)
        return transcribe_clips(
            self.model,
            build_suite(recordings, config, rate=self.front_end.rate, utterances=suite_utterances),
            self.tokenizer,
            decode,
            front_end=self.front_end,
            device=device(),
            progress=progress,
            rules=DoubtRules(self.speech, self.tuned.doubt),
            hint=lambda own: told or (self.own_hint(own) if hint_langs else ""),
        )

    def own_hint(self, lang: str) -> str:
        """What the prompt names of a row in ``lang``; "" where training did not name that."""
        return find_language(lang, self.model.hinted) if lang else ""

    def decoding(self, beam: int = 0) -> DecodeConfig:
        """The decoding of a beam width (0: the model's), with the weight that was tuned for it."""
        cfg = self.decode
        if beam:
            cfg = replace(cfg, beam=beam, ctc_weight=0.0 if beam == 1 else cfg.ctc_weight)
        return self.tuned.decode(cfg)
