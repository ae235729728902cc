"""The root of a recipe: every module's settings, and what only holds between them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from dsasr import config
from dsasr.checkpoint.manager import CheckpointConfig
from dsasr.config import nearest
from dsasr.data.audio.augment import AugmentConfig
from dsasr.data.audio.features import FbankConfig
from dsasr.data.dataloader.dataloader import DataLoaderConfig, DatasetConfig
from dsasr.data.text.phonemes import PhonemizerConfig
from dsasr.data.text.prompt import TextConfig
from dsasr.engine.config import EngineConfig
from dsasr.evaluation.decode import DecodeConfig
from dsasr.evaluation.normalize import check_rules
from dsasr.evaluation.suite import SuiteConfig
from dsasr.launch.slurm import SlurmConfig
from dsasr.launch.watchdog import WatchdogConfig
from dsasr.model.adaptor import AdaptorConfig
from dsasr.model.ctc_model import CtcModelConfig
from dsasr.model.dynamic_chunks import ChunkConfig
from dsasr.model.encoders.conformer import EncoderConfig
from dsasr.model.llm import LlmConfig
from dsasr.model.lora import LoraConfig
from dsasr.stages import PARTS, DriftConfig, Schedule, StageConfig
from dsasr.tracking.monitor import MonitorConfig
from dsasr.utils.errors import UserError

SUBSAMPLING = 4  # feature frames to one of the encoder's, whatever its size


@dataclass(frozen=True)
class DataConfig:
    train: tuple[DatasetConfig, ...]
    valid: tuple[DatasetConfig, ...]
    cmvn: str  # from tools/cmvn.py
    phonemes: str  # the phoneme vocabulary, from tools/make_phonemes.py
    fbank: FbankConfig = field(default_factory=FbankConfig)
    augment: AugmentConfig | None = field(default_factory=AugmentConfig)
    text: TextConfig = field(default_factory=TextConfig)
    phonemizer: PhonemizerConfig = field(default_factory=PhonemizerConfig)
    dataloader: DataLoaderConfig = field(default_factory=DataLoaderConfig)
    # cause → how many samples of a run may be dropped for it; "*": each other cause, "total": all
    bad_limits: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.train:
            raise UserError("data.train names no dataset")


@dataclass(frozen=True)
class SftConfig:
    """What the sft branch does to its input in training."""

    spec: bool = True  # SpecAugment, as in pretraining
    chunks: ChunkConfig | None = None  # None: full context


@dataclass(frozen=True)
class ModelConfig:
    llm: LlmConfig
    lora: LoraConfig | None = None  # for stages that train 'lora'
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    adaptor: AdaptorConfig = field(default_factory=AdaptorConfig)
    pretrain: CtcModelConfig = field(default_factory=CtcModelConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    tokenizer: str = ""  # empty: the language model's folder
    encoder_from: str = ""  # a snapshot's folder to start from; empty: random weights


@dataclass(frozen=True)
class EvaluationConfig:
    every: int = 0  # steps of a stage between two evaluations; 0: only at the run's end
    utterances: int = 64  # of the validation set, in each evaluation during training
    samples: int = 3  # reference/hypothesis pairs shown
    # Normalization of what is scored. plain: digit strings stay words; the path of a Whisper
    # checkpoint's normalizer.json: standard, and British spellings count as American ones.
    rules: str = "standard"
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    # Hallucinations during training: the suite on so many utterances; 0: not at all.
    suite_utterances: int = 0
    suite: SuiteConfig = field(
        default_factory=lambda: SuiteConfig(clips=2, seconds=4.0, snrs=(5.0,), truncations=())
    )

    def __post_init__(self) -> None:
        try:
            check_rules(self.rules)
        except ValueError as error:
            raise UserError(f"evaluation.{error}") from None


@dataclass(frozen=True)
class StoreConfig:
    """Snapshots. ``late``: what an sft job does when its publisher has been silent too long."""

    path: str = ""  # empty: RUN/snapshots
    keep: int = 5
    poll_seconds: float = 5.0
    silent_seconds: float = 600.0
    late: Literal["wait", "continue", "stop"] = "wait"


@dataclass(frozen=True)
class OnlineProbeConfig:
    """Entropy allocation during training (`online_probe`). ``every``: steps of a stage between two
    probe evaluations (0: none at all); ``probes``: evaluations of a branch between two that fit
    the probes (0: never), on at most ``frames`` frames; ``utterances`` of the validation
    set are the probe set; ``budget``: the share of the training time for evaluations."""

    every: int = 0
    probes: int = 4
    utterances: int = 48
    frames: int = 10_000
    budget: float = 0.05

    def __post_init__(self) -> None:
        if min(self.every, self.probes) < 0 or self.utterances < 3 or self.frames < 100:
            raise UserError("probe: every and probes must be ≥ 0, utterances ≥ 3, frames ≥ 100")
        if not 0 < self.budget <= 1:
            raise UserError("probe.budget must be above 0 and at most 1")


@dataclass(frozen=True)
class Recipe:
    run: str  # the run folder
    data: DataConfig
    model: ModelConfig
    stages: tuple[StageConfig, ...]
    seed: int = 1
    branch: Literal["both", "pretrain", "sft"] = "both"
    interleave: tuple[int, int] = (1, 1)  # pretrain steps : sft steps while both branches run
    drift: DriftConfig = field(default_factory=DriftConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    probe: OnlineProbeConfig = field(default_factory=OnlineProbeConfig)
    resume: str = "auto"  # auto: the run folder's newest whole checkpoint; never; or a checkpoint
    allow_changed: bool = False  # resume although the recipe is not the run's
    kernels: Literal["auto", "triton", "torch", "reference"] = "auto"
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)  # for tools/submit.py

    def __post_init__(self) -> None:
        self.schedule()
        names = [d.name for d in self.data.train]
        for stage in self.stages:
            for name in stage.mixture or {}:
                if name not in names:
                    raise UserError(
                        f"stage '{stage.name}' mixes an unknown dataset '{name}'"
                        f"{nearest(name, names)}"
                    )
            batch, per_token = (
                self.dataloader(stage)[0].batch,
                SUBSAMPLING * self.model.adaptor.stack,
            )
            if stage.branch == "sft" and batch.tokens and batch.frames_per_token != per_token:
                raise UserError(
                    f"stage '{stage.name}' counts speech at one token for {batch.frames_per_token} "
                    f"frames, the model at {per_token}: give batch.frames_per_token={per_token}"
                )
        self._check_lora()
        if self.branch != "pretrain" and not self.schedule().pretrain and not self.encoder_given:
            raise UserError(
                "the recipe has no stage of branch pretrain: give model.encoder_from=SNAPSHOT"
            )

    def _check_lora(self) -> None:
        using = [stage.name for stage in self.stages if "lora" in stage.trains]
        if using and self.model.lora is None:
            raise UserError(
                f"stage '{using[0]}' trains 'lora': give model.lora, such as model.lora.rank=16"
            )
        if self.model.lora is not None and self.schedule().sft and not using:
            raise UserError(
                "model.lora is given, but no stage trains 'lora': name it in a stage's trains, in "
                "place of 'llm', or give model.lora=null"
            )

    def parts(self, branch: str) -> tuple[str, ...]:
        """The parts of a branch's model."""
        return tuple(p for p in PARTS[branch] if p != "lora" or self.model.lora is not None)

    @property
    def encoder_given(self) -> bool:
        return bool(self.model.encoder_from)

    @property
    def folder(self) -> Path:
        """Where the job writes; two jobs of a concurrent run have a folder each below ``run``."""
        return Path(self.run) if self.branch == "both" else Path(self.run) / self.branch

    @property
    def store_folder(self) -> Path:
        return Path(self.store.path) if self.store.path else Path(self.run) / "snapshots"

    def encoder_fingerprint(self) -> str:
        """Of all settings that decide what pretraining makes of the encoder."""
        deciding = (self.seed, self.data, self.model.encoder, self.model.pretrain)
        return config.fingerprint([*deciding, self.schedule().pretrain])

    def schedule(self) -> Schedule:
        return Schedule(self.stages, self.drift, self.interleave, self.branch)

    def dataloader(self, stage: StageConfig) -> tuple[DataLoaderConfig, tuple[DatasetConfig, ...]]:
        """The stream's settings and the mixture of a stage."""
        batch = stage.batch or self.data.dataloader.batch
        stream = replace(self.data.dataloader, batch=batch)
        if stage.mixture is None:
            return stream, self.data.train
        chosen = tuple(
            replace(d, weight=stage.mixture[d.name])
            for d in self.data.train
            if stage.mixture.get(d.name)
        )
        return stream, chosen


# What may differ between a run and its continuation without changing what is learned.
HARMLESS = ("run", "resume", "allow_changed", "monitor", "checkpoint", "evaluation", "store")
HARMLESS += ("probe", "slurm", "watchdog")


def load(name_or_path: str, assignments: Sequence[str] = ()) -> Recipe:
    """The recipe of that packaged name or path with ``key=value`` overrides applied."""
    values = config.override(config.read_recipe(name_or_path), assignments)
    return config.build(Recipe, values)


def changes(old: dict, new: Recipe) -> list[str]:
    """One line for each setting that differs and matters, between a saved recipe and a new one."""
    keep = [k for k in old if k not in HARMLESS]
    new_values = config.to_plain(new)
    return config.difference(
        {k: old[k] for k in keep},
        {k: v for k, v in new_values.items() if k not in HARMLESS},
    )


def quiet() -> None:
    """Silence warnings of libraries that a user can do nothing about."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch|deepspeed")
