"""The root of a recipe: every module's settings, and the rules between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

from dsasr import config
from dsasr.checkpoint import weight_source
from dsasr.checkpoint.locate import list_checkpoints
from dsasr.checkpoint.manager import CheckpointConfig
from dsasr.checkpoint.snapshot_store import SnapshotStoreConfig
from dsasr.checkpoint.weight_source import PARTS as PARTS_IN_FILES
from dsasr.config import nearest
from dsasr.data.audio.features import FbankConfig
from dsasr.data.config import DataConfig
from dsasr.data.dataloader.dataloader import DataLoaderConfig, DatasetConfig
from dsasr.data.text.prompt import check_languages, check_template
from dsasr.engine.config import EngineConfig
from dsasr.evaluation.config import EvaluationConfig
from dsasr.launch.slurm import SlurmConfig
from dsasr.launch.watchdog import WatchdogConfig
from dsasr.model import lora
from dsasr.model.adaptors.protocol import AdaptorConfig
from dsasr.model.ctc_model import CtcModelConfig
from dsasr.model.dynamic_chunks import ChunkConfig
from dsasr.model.encoders.conformer import EncoderConfig
from dsasr.model.encoders.pretrained import PretrainedEncoderConfig
from dsasr.model.llm import LlmConfig
from dsasr.model.lora import LoraConfig
from dsasr.schedule import Schedule
from dsasr.stages import PARTS, DriftConfig, StageConfig
from dsasr.tracking.monitor import MonitorConfig
from dsasr.utils import ranges
from dsasr.utils.errors import UserError
from dsasr.utils.ranges import NonNegativeInt, PositiveInt, PositiveShare, Range, Share

SOURCES = ("encoder_from", "init_from")  # keys of `ModelConfig`: where a run's weights come from
# Metrics of an sft branch's evaluations that can rank checkpoints; NAME/LANG: of one language.
SCORES = ("wer", "cer", "mer", "character_rate", "sentence_rate", "substitutions", "deletions",
          "insertions", "hallucination")  # fmt: skip
SUBSAMPLING = 4  # feature frames to one encoder frame, of every encoder size


@dataclass(frozen=True)
class SftInputConfig:
    """Input of the sft branch in training."""

    spec: bool = True  # SpecAugment with the settings of model.pretrain.spec
    # dynamic chunks, as in model.pretrain.chunks; null: full context
    chunks: ChunkConfig | None = None


@dataclass(frozen=True)
class ModelConfig:
    """The parts of the model."""

    llm: LlmConfig  # the language model
    # LoRA in the language model, for stages that train 'lora'; null: none
    lora: LoraConfig | None = None
    # sizes of a Conformer to pretrain; or `path`: a pretrained encoder
    encoder: EncoderConfig | PretrainedEncoderConfig = field(default_factory=EncoderConfig)
    # LoRA in the encoder of both branches, for stages that train 'encoder_lora'; null: none
    encoder_lora: LoraConfig | None = None
    # between encoder and language model
    adaptor: AdaptorConfig = field(default_factory=AdaptorConfig)
    # objective and input of the pretrain branch
    pretrain: CtcModelConfig = field(default_factory=CtcModelConfig)
    sft: SftInputConfig = field(default_factory=SftInputConfig)  # input of the sft branch
    tokenizer: str = ""  # folder of a tokenizer; empty: the language model's
    # the prompt, with <speech> where the speech is, {lang} where a text of `languages` goes, and
    # {context} where hints go, if it takes any; special tokens are parsed; empty: the form that the
    # tokenizer calls for
    prompt: str = ""
    # language → its text in the prompt: {en: English, zh: Chinese}, or {en: <|en|>} of a tokenizer
    # with such tokens. At inference the language may be given (`dsasr transcribe --lang zh`) or
    # omitted: {lang} is then left out. With an empty `prompt` a given language stands behind the
    # speech, as " Language: English.". Empty: prompts name no language
    languages: dict[str, str] = field(default_factory=dict)
    # share of the training utterances in one of `languages` whose prompt names it, above 0
    language_share: Share = 0.5
    # start with the encoder of this snapshot, or of any source of `init_from`, in both branches;
    # the sft branch then does not wait for pretraining's
    encoder_from: str = ""
    # start with the weights of another model, by name: of an exported model, a run folder (its
    # newest whole checkpoint), or a folder with a checkpoint or snapshot. Read at a fresh start,
    # never at a resume. Sizes, features and the language model's folder that the recipe does not
    # give are the source's
    init_from: str = ""
    # parts that `init_from` gives: encoder, head (the CTC head), adaptor, llm, lora; empty: all
    # that both have
    init_parts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.prompt:
            check_template(self.prompt)
        ranges.check(self)
        check_languages(self.prompt, self.languages, self.language_share)
        for part in self.init_parts:
            if part not in PARTS_IN_FILES:
                raise UserError(
                    f"model.init_parts: unknown part '{part}'{nearest(part, PARTS_IN_FILES)}"
                )
        if self.init_parts and not self.init_from:
            raise UserError("model.init_parts chooses parts of model.init_from, which is not given")
        if self.encoder_from and "encoder" in self.init_parts:
            raise UserError(
                "model.encoder_from and model.init_parts both give the encoder: leave out one"
            )


@dataclass(frozen=True)
class OnlineProbeConfig:
    """Measurements of entropy allocation during training (`dsasr.training.online_probe`)."""

    # steps of a stage between two measurements, and one at its end; 0: none at all
    every: NonNegativeInt = 0
    # every n-th measurement of a branch also fits probes (PAI, CSAI); 0: never
    probes: NonNegativeInt = 4
    utterances: Annotated[int, Range(3)] = 48  # of the validation set, as the probe set; at least 3
    # encoder frames that probes are fitted on, at most; at least 100
    frames: Annotated[int, Range(100)] = 10_000
    # share of the training time that measurements may take, above 0 and at most 1
    budget: PositiveShare = 0.05

    def __post_init__(self) -> None:
        ranges.check(self)


@dataclass(frozen=True)
class Recipe:
    """All settings of a run."""

    # the run folder; with branch pretrain or sft the job writes into RUN/pretrain or RUN/sft
    run: str
    data: DataConfig  # training and validation data, and how it is read
    model: ModelConfig  # encoder, CTC head, adaptor and language model
    # the stage table: what trains, on what, for how long; names must differ
    stages: tuple[StageConfig, ...]
    # of all random numbers: weights, order of the data, augmentation, dropout
    seed: NonNegativeInt = 1
    # both: one job; pretrain or sft: that branch alone, beside a second job with the other
    branch: Literal["both", "pretrain", "sft"] = "both"
    # [pretrain steps, sft steps] in turn while both branches run in one job
    interleave: tuple[PositiveInt, PositiveInt] = (1, 1)
    # when pretraining publishes an encoder snapshot for the sft branch
    drift: DriftConfig = field(default_factory=DriftConfig)
    # where snapshots are exchanged
    store: SnapshotStoreConfig = field(default_factory=SnapshotStoreConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)  # DeepSpeed, precision and optimizer
    # when checkpoints are saved, and which are kept
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    # error rates and hallucinations during training
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)  # the run's log
    # measurements of entropy allocation during training
    probe: OnlineProbeConfig = field(default_factory=OnlineProbeConfig)
    # auto: from the run folder's newest whole checkpoint, if any; never; or a checkpoint's folder
    resume: str = "auto"
    # resume although settings that change what is learned differ from the checkpoint's; a stage
    # goes on by its name, at the step that it has done
    allow_changed: bool = False
    # implementation of the fused operations; auto: triton on CUDA, torch elsewhere;
    # triton-persistent: the LM head's statistics without its logits in memory, not timed on a GPU
    kernels: Literal["auto", "triton", "triton-persistent", "torch", "reference"] = "auto"
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)  # ends a run that hangs
    # size and options of the job that `dsasr submit` starts; training itself ignores them
    slurm: SlurmConfig = field(default_factory=SlurmConfig)

    def __post_init__(self) -> None:
        ranges.check(self)
        if not self.run.strip():
            raise UserError("run is empty: give the run folder")
        self.schedule()
        self._check_sizes()
        names = [d.name for d in self.data.train]
        for stage in self.stages:
            if stage.mixture is not None and not any(stage.mixture.values()):
                raise UserError(
                    f"stage '{stage.name}' mixes no dataset: give one in its mixture a weight"
                )
            for name in stage.mixture or {}:
                if name not in names:
                    raise UserError(
                        f"stage '{stage.name}' mixes an unknown dataset '{name}'"
                        f"{nearest(name, names)}"
                    )
            batch, frames = self.dataloader(stage)[0].batch, self.model.adaptor.frames_per_token
            if (
                self.pretrained_encoder is None
                and stage.branch == "sft"
                and batch.tokens
                and frames
            ):
                self.check_frames_per_token(stage, SUBSAMPLING * frames)
        self._check_lora()
        self._check_layer_sum()
        if (
            self.branch != "pretrain"
            and not self.schedule().pretrain
            and not self.has_initial_encoder
        ):
            raise UserError(
                "the recipe has no stage of branch pretrain: give model.init_from=MODEL, "
                "model.encoder_from=SNAPSHOT, or model.encoder.path=FOLDER of a pretrained "
                "encoder"
            )
        has_head = self.trains_ctc_head or "head" in self.init_parts
        if self.model.adaptor.reads_ctc and not has_head:
            raise UserError(
                "model.adaptor.kind=ctc reads a CTC head that nothing trains: give a stage of "
                "branch pretrain, or model.init_from=MODEL with one in its model.init_parts"
            )

    def _check_sizes(self) -> None:
        """Settings of several sections that must agree."""
        model, best = self.model, self.checkpoint.best
        mels = self.data.fbank.mels
        if self.pretrained_encoder is None and mels != model.encoder.mels:
            raise UserError(
                f"data.fbank.mels is {mels}, model.encoder.mels {model.encoder.mels}: they must be "
                "equal"
            )
        if self.pretrained_encoder is not None and self.data.fbank != FbankConfig():
            raise UserError(
                "data.fbank has no effect on a pretrained encoder, which has features of its own: "
                "leave it out"
            )
        if best.partition("/")[0] not in SCORES:
            raise UserError(
                f"checkpoint.best: no metric '{best}'{nearest(best.partition('/')[0], SCORES)}"
            )
        consistent = any(stage.objective == "cr_ctc" for stage in self.stages)
        if model.pretrain.consistency_warmup is not None and not consistent:
            raise UserError(
                "model.pretrain.consistency_warmup is for CR-CTC: give a pretrain stage "
                "objective=cr_ctc, or consistency_warmup=null"
            )
        # A run without one keeps that of the encoder which it takes (`checkpoint.kept_head`).
        keeps_head = {"encoder", "head"} <= set(self.init_parts)
        has_head = model.adaptor.reads_ctc or self.schedule().pretrain or keeps_head
        if self.evaluation.decode.ctc_weight and not has_head:
            raise UserError(
                "evaluation.decode.ctc_weight needs a CTC head: give a stage of branch pretrain, "
                "model.init_from=MODEL with one, or ctc_weight=0"
            )

    def check_frames_per_token(self, stage: StageConfig, per_token: int) -> None:
        """Raise `UserError` unless the stage's token budget counts speech as the model does."""
        counted = self.dataloader(stage)[0].batch.frames_per_token
        if counted != per_token:
            raise UserError(
                f"stage '{stage.name}' counts speech at one token for {counted} frames, the model "
                f"at {per_token}: give {self.batch_key(stage)}.frames_per_token={per_token}"
            )

    def _check_lora(self) -> None:
        # Without training, matrices come from a snapshot of another run.
        used = {"lora": self.schedule().sft, "encoder_lora": not self.model.encoder_from}
        for part, whole in lora.BASE.items():
            given = getattr(self.model, part) is not None
            training = [stage.name for stage in self.stages if part in stage.trains]
            if training and not given:
                raise UserError(
                    f"stage '{training[0]}' trains '{part}': give model.{part}, such as "
                    f"model.{part}.rank=16"
                )
            if given and used[part] and not training:
                raise UserError(
                    f"model.{part} is given, but no stage trains '{part}': name it in a stage's "
                    f"trains, in place of '{whole}', or give model.{part}=null"
                )

    @property
    def has_layer_sum(self) -> bool:
        """Whether the encoder's output is a learned sum over its blocks."""
        return self.pretrained_encoder is not None and self.pretrained_encoder.layer_sum

    def _check_layer_sum(self) -> None:
        named = [stage.name for stage in self.stages if "layer_sum" in stage.trains]
        if named and not self.has_layer_sum:
            raise UserError(
                f"stage '{named[0]}' trains 'layer_sum': give model.encoder.layer_sum=true"
            )
        learned = named or any("encoder" in stage.trains for stage in self.stages)
        # Without training, its weights come from another run.
        if self.has_layer_sum and not learned and not self.takes_encoder:
            raise UserError(
                "model.encoder.layer_sum is given, but no stage learns its weights: name layer_sum "
                "(or encoder) in a stage's trains, such as layer_sum: 1.0e-3"
            )

    def parts(self, branch: str) -> tuple[str, ...]:
        """Names of the parts of a branch's model."""
        lacks = {part for part in lora.BASE if getattr(self.model, part) is None}
        if branch == "sft" and not self.model.adaptor.reads_ctc:
            lacks.add("ctc")
        if not self.has_layer_sum:
            lacks.add("layer_sum")
        return tuple(p for p in PARTS[branch] if p not in lacks)

    @property
    def pretrained_encoder(self) -> PretrainedEncoderConfig | None:
        """The pretrained encoder, if the recipe names one."""
        encoder = self.model.encoder
        return encoder if isinstance(encoder, PretrainedEncoderConfig) else None

    @property
    def trains_ctc_head(self) -> bool:
        """Whether some stage trains the CTC head."""
        return any(s.branch == "pretrain" or "ctc" in s.trains for s in self.stages)

    @property
    def has_initial_encoder(self) -> bool:
        """Whether the sft branch starts with an encoder from outside the run: the snapshot of
        ``model.encoder_from``, or without pretraining that of ``model.init_from`` or the pretrained
        encoder."""
        given = self.pretrained_encoder is not None or self.takes_encoder
        return bool(self.model.encoder_from) or (given and not self.schedule().pretrain)

    @property
    def takes_encoder(self) -> bool:
        """Whether the encoder starts with weights of ``encoder_from`` or ``init_from``."""
        return bool(self.model.encoder_from) or "encoder" in self.init_parts

    @property
    def init_parts(self) -> tuple[str, ...]:
        """The parts that ``model.init_from`` may give; empty without it."""
        if not self.model.init_from:
            return ()
        parts = self.model.init_parts or PARTS_IN_FILES
        return tuple(p for p in parts if p != "encoder" or not self.model.encoder_from)

    @property
    def branches(self) -> tuple[str, ...]:
        """The branches that this job trains."""
        stages = {stage.branch for stage in self.stages}
        return tuple(b for b in PARTS if b in stages and self.branch in ("both", b))

    @property
    def folder(self) -> Path:
        """Where the job writes; the two jobs of a concurrent run have a folder each in ``run``."""
        return Path(self.run) if self.branch == "both" else Path(self.run) / self.branch

    @property
    def store_folder(self) -> Path:
        """The folder of the snapshot store, the same for both jobs of a concurrent run."""
        return Path(self.store.path) if self.store.path else Path(self.run) / "snapshots"

    def encoder_fingerprint(self) -> str:
        """A hash of all settings that the pretrained encoder depends on."""
        model = self.model
        settings = [self.seed, self.data, model.encoder, model.pretrain]
        if model.encoder_lora is not None:
            settings.append(model.encoder_lora)
        settings.append(self.schedule().pretrain)
        if model.init_from or model.encoder_from:
            settings += [model.init_from, self.init_parts, model.encoder_from]
        return config.fingerprint(settings)

    def encoder_architecture(self) -> str:
        """A hash of what an encoder's weights must fit."""
        encoder = config.to_plain(self.model.encoder)
        matrices = self.model.encoder_lora
        return config.fingerprint(encoder if matrices is None else [encoder, matrices])

    def schedule(self) -> Schedule:
        return Schedule(self.stages, self.drift, self.interleave, self.branch)

    def stage(self, name: str) -> StageConfig:
        """The stage of that name. Raises `UserError` with the nearest name."""
        names = [stage.name for stage in self.stages]
        if name not in names:
            raise UserError(f"no stage '{name}'{nearest(name, names)}")
        return self.stages[names.index(name)]

    @staticmethod
    def batch_key(stage: StageConfig) -> str:
        """The key of a stage's batch budgets: its own, or those of all stages."""
        return f"stages.{stage.name}.batch" if stage.batch else "data.dataloader.batch"

    def dataloader(self, stage: StageConfig) -> tuple[DataLoaderConfig, tuple[DatasetConfig, ...]]:
        """A stage's dataloader settings, and its datasets with their weights in the mixture."""
        batch = stage.batch or self.data.dataloader.batch
        loader = replace(self.data.dataloader, batch=batch)
        if stage.mixture is None:
            return loader, self.data.train
        mixture = tuple(
            replace(d, weight=stage.mixture[d.name])
            for d in self.data.train
            if stage.mixture.get(d.name)
        )
        return loader, mixture


# Keys that a resumed run may change without a change to what is learned.
RESUME_MAY_CHANGE = (
    "run",
    "resume",
    "allow_changed",
    "monitor",
    "checkpoint",
    "evaluation",
    "store",
)
RESUME_MAY_CHANGE += ("probe", "slurm", "watchdog")


def load(name_or_path: str, assignments: Sequence[str] = ()) -> Recipe:
    """The recipe of that packaged name or path with ``key=value`` overrides applied.

    Raises `UserError` for a missing file, an unknown key or an invalid value.
    """
    values = config.override(config.read_recipe(name_or_path), assignments)
    return config.build(Recipe, _completed(values))


def _completed(values: dict) -> dict:
    """A recipe's plain values, with what they leave out taken from the sources of its weights.

    A run that resumes has it from its own recipe: the sources may be gone.
    """
    model = values.get("model")
    if not isinstance(model, dict):
        return values
    branch = values.get("branch", "both")
    run = Path(str(values.get("run", ""))) / ("" if branch == "both" else str(branch))
    own = {}
    if list_checkpoints(run / "checkpoints") and (run / "recipe.yaml").is_file():
        own = config.read_recipe(str(run / "recipe.yaml"))
    parts = {"encoder_from": ("encoder",), "init_from": model.get("init_parts") or PARTS_IN_FILES}
    for key, wanted in parts.items():
        source = model.get(key)
        if isinstance(source, str) and source:
            resumed = (own.get("model") or {}).get(key) == source
            settings = own if resumed else weight_source.read_settings(Path(source))
            values = weight_source.complete_recipe(values, settings, wanted)
    return values


def changed_settings(old: dict, new: Recipe) -> list[str]:
    """One line for each setting that differs between a saved recipe and a new one, of those that
    change what is learned."""
    return config.difference(
        {k: v for k, v in old.items() if k not in RESUME_MAY_CHANGE},
        {k: v for k, v in config.to_plain(new).items() if k not in RESUME_MAY_CHANGE},
    )
