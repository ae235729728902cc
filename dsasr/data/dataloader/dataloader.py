"""The dataloader: a stream of one rank's batches, exactly once, resumable, for any world size.

    loader = StreamingDataLoader(config, datasets=…, text=…, seed=…, rank=…, world=…, state=None)
    for batch in loader:
        …                      # batch.state resumes after this batch's step

The batches are planned (`bucketing`, `sampler`); worker processes collate them (`collate`) and
deliver them in order (`workers`). All randomness comes from the plan, so the batches are the same
for any number of workers, and after a worker was killed.

Batches without utterances (no rows; weight 0) occur in three cases: the last step of a finite
stream is filled up with them, so that all ranks make the same number of steps; all samples of a
batch may be bad; a window may have no usable sample, and then its one batch only reports the bad
ones.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, Literal

import torch

from dsasr.data.audio.augment import RECORDED, AugmentConfig
from dsasr.data.audio.features import FbankConfig
from dsasr.data.audio.frontends import FbankFrontEnd, FrontEnd
from dsasr.data.batch import Batch
from dsasr.data.dataloader.augment_sampler import planned_seconds
from dsasr.data.dataloader.bucketing import FRAMES_PER_SECOND, BatchConfig
from dsasr.data.dataloader.collate import Collator, EncoderLengths
from dsasr.data.dataloader.sampler import BatchSampler
from dsasr.data.dataloader.text_encoder import TextEncoder
from dsasr.data.dataloader.window_plan import DatasetPart, PlanConfig, Task
from dsasr.data.dataloader.workers import Payload, WorkerPool, run_inline
from dsasr.data.shards.index_cache import load_or_build_index
from dsasr.data.shards.sample import DroppedSample, SampleFields
from dsasr.data.shards.storage import ShardStorage, StorageConfig
from dsasr.data.shards.urls import ShardList
from dsasr.utils import ranges
from dsasr.utils.errors import UserError
from dsasr.utils.masking import mask
from dsasr.utils.names import check_name, is_language
from dsasr.utils.ranges import PositiveFloat, PositiveInt, Range

VOICES = 16  # utterances of the first dataset that babble is made of
RECORDINGS = 256  # of the noise shards together, at most
NOISE_SECONDS = 10.0  # of each recording: 164 MB for all, shared by a rank's workers


@dataclass(frozen=True)
class DatasetConfig:
    """One dataset of the mixture.

    ``shards``: a folder with dataset.json, a tar, a glob or brace pattern, or a list of these.
    ``weight``: its share of the batches, relative to the other datasets'. ``lang``: only this one.
    """

    name: str  # name in mixtures, logs and key=value
    # folder with a dataset.json, a tar, a glob or brace pattern (local, http(s), s3), or a list of
    # these; a password or signature in a URL as ${NAME}: of the environment variable NAME, or of a
    # file that NAME_FILE names
    shards: str | tuple[str, ...]
    weight: PositiveFloat = 1.0  # share of the batches, relative to the other datasets
    lang: str | None = None  # use only samples of this language; null: all
    # where the labels stand in shards that other tools made; null: as `dsasr data index` noted, or
    # as in shards of `dsasr data make-shards`
    fields: SampleFields | None = None

    def __post_init__(self) -> None:
        ranges.check(self)
        check_name(self.name, "a dataset")
        if self.lang is not None and not is_language(self.lang):
            raise UserError(f"dataset '{self.name}': {self.lang[:80]!r} is no name of a language")


@dataclass(frozen=True)
class DataLoaderConfig:
    """How data is read, shuffled and batched; a stage may replace ``batch``."""

    # batch budgets; a stage's own `batch` replaces them whole
    batch: BatchConfig = field(default_factory=BatchConfig)
    # worker processes of a rank; 0: the training process collates
    num_workers: Annotated[int, Range(0, 1024)] = 1
    prefetch: Annotated[int, Range(1, 1024)] = 3  # batches in preparation per worker; at least 1
    window: PositiveInt = 16  # shards shuffled together, at least
    # samples shuffled together, at least, where dataset.json has the counts
    window_samples: PositiveInt = 8192
    # shuffle shards and batches in training; false: shards in order, batches by length
    shuffle: bool = True
    # T ≥ 1: languages weigh hours^(1/T), 1 in proportion to their hours; null: by dataset alone
    temperature: Annotated[float, Range(1)] | None = None
    # where log-Mel features are computed: in the workers, or on the training device
    features: Literal["worker", "device"] = "worker"
    # noise shards for augment.kinds "recorded": one set, a list of sets, or set → weight; null:
    # none
    noise: str | tuple[str, ...] | dict[str, PositiveFloat] | None = None
    source: StorageConfig = field(default_factory=StorageConfig)  # how shards are reached

    def __post_init__(self) -> None:
        ranges.check(self)

    @property
    def noise_weights(self) -> dict[str, float]:
        """Each set of noise shards with its weight."""
        if isinstance(self.noise, dict):
            return self.noise
        return dict.fromkeys(
            (self.noise,) if isinstance(self.noise, str) else self.noise or (), 1.0
        )


def build_dataset_parts(
    datasets: Sequence[DatasetConfig],
    storage: ShardStorage,
    temperature: float | None = None,
) -> list[DatasetPart]:
    """The mixture's parts: one for each dataset, or with a temperature T one for each language.

    A language's share of its dataset's weight is hours^(1/T) over the languages' sum (Arivazhagan
    et al. 2019, arXiv 1907.05019). Raises `UserError` for missing shards or an unknown language.
    """
    parts = []
    for dataset in datasets:
        shards = storage.resolve(dataset.shards, dataset.fields)
        if dataset.lang is not None and shards.langs and dataset.lang not in shards.langs:
            known = ", ".join(sorted(shards.langs))
            raise UserError(f"dataset '{dataset.name}' has no '{dataset.lang}', only {known}")
        if temperature is None or dataset.lang is not None:
            parts.append(_part(dataset.name, shards, dataset.lang, dataset.weight))
            continue
        if not shards.langs:
            raise UserError(
                "dataloader.temperature needs the hours of each language: pack "
                f"'{dataset.name}' with `dsasr data make-shards`, which writes them to dataset.json"
            )
        shares = {lang: hours ** (1 / temperature) for lang, hours in shards.langs.items() if hours}
        total = sum(shares.values())
        for number, (lang, share) in enumerate(sorted(shares.items())):
            name, weight = f"{dataset.name}/{lang}", dataset.weight * share / total
            parts.append(_part(name, shards, lang, weight, reports=not number))
    return parts


def _part(
    name: str, shards: ShardList, lang: str | None, weight: float, reports: bool = True
) -> DatasetPart:
    return DatasetPart(name, shards.shards, shards.counts, lang, weight, reports, shards.sizes)


class StreamingDataLoader(Iterator[Batch]):
    """Iterates over one rank's batches; ``state()`` is the cursor after the last one delivered.

    ``purpose="train"``: endless, shuffled, augmented. ``purpose="eval"``: one epoch, in order of
    length, not augmented, no language named in a prompt. ``epochs`` overrides how often a stream
    goes over the data (0: endless). With ``features="device"`` the front end runs on ``device`` in
    this process and the batch's features are there. All ranks must pass the same arguments except
    ``rank``.
    """

    def __init__(
        self,
        config: DataLoaderConfig,
        *,
        datasets: Sequence[DatasetConfig],
        text: TextEncoder | None = None,
        front_end: FrontEnd | None = None,
        augment: AugmentConfig | None = None,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        state: Mapping[str, Any] | None = None,
        purpose: Literal["train", "eval"] = "train",
        epochs: int | None = None,
        device: torch.device | str = "cpu",
        parts: Sequence[DatasetPart] | None = None,
        ctc_lengths: EncoderLengths | None = None,
    ) -> None:
        """``ctc_lengths``: see `Collator`."""
        train = purpose == "train"
        self.config, self.device = config, torch.device(device)
        augment = augment if train else None
        text = text or TextEncoder()
        storage = ShardStorage(config.source)
        self.collator = Collator(
            storage=storage,
            front_end=front_end or FbankFrontEnd(FbankConfig()),
            augment=augment,
            text=text if train else replace(text, language_share=0.0),
            max_seconds=config.batch.max_seconds,
            features_on_device=config.features == "device",
            ctc_lengths=ctc_lengths,
        )
        if parts is None:
            parts = build_dataset_parts(datasets, storage, config.temperature)
        self.bad_noise: list[DroppedSample] = []
        if augment is not None and augment.noise_share:
            self._load_noise(augment, parts, storage)
        plan = PlanConfig(
            batch=config.batch,
            seed=seed,
            shuffle=config.shuffle and train,
            epochs=(0 if train else 1) if epochs is None else epochs,
            window=config.window,
            window_samples=config.window_samples,
        )
        self.pool = self._start_workers()
        self.sampler = BatchSampler(
            parts,
            plan,
            partial(load_or_build_index, storage),
            rank=rank,
            world=world,
            lengths=None if augment is None else planned_seconds(augment),
            state=dict(state) if state is not None else None,
        )
        self.pending: deque[tuple[Task, dict]] = deque()
        self.cursor = self.sampler.state()
        self.ended = self.closed = False

    def _load_noise(
        self, augment: AugmentConfig, parts: Sequence[DatasetPart], storage: ShardStorage
    ) -> None:
        """Read the audio that noise is made of, before the workers fork, so that they share it."""
        if "babble" in augment.kinds:
            # The bad samples among these are reported with their batches.
            self.collator.voices, _ = self.collator.load_recordings(parts[0].shards, VOICES)
        if RECORDED not in augment.kinds:
            return
        weights = self.config.noise_weights
        if not weights:
            raise UserError(
                'augment.kinds names "recorded": say where with dataloader.noise=FOLDER_OF_SHARDS'
            )
        # All recordings are drawn alike, so a set gets its weight as its share of the list.
        recordings: list[torch.Tensor] = []
        for name, weight in weights.items():
            count = max(1, round(RECORDINGS * weight / sum(weights.values())))
            waves, bad = self.collator.load_recordings(
                storage.resolve(name).shards, count, NOISE_SECONDS
            )
            if not waves:
                raise UserError(f"dataloader.noise: {name} holds no usable recording")
            self.bad_noise += bad
            recordings += (waves * -(-count // len(waves)))[:count] if len(weights) > 1 else waves
        self.collator.recordings = recordings

    def _start_workers(self) -> WorkerPool | None:
        # Before the sampler's thread starts: a fork would copy locks that the thread holds.
        if not self.config.num_workers:
            return None
        frames = self.config.batch.frames
        floats = frames * self._floats_per_frame
        slot = 4 * floats + (floats // 4) + (2 << 20)
        return WorkerPool(
            self.collator.collate, self.config.num_workers, self.config.prefetch, slot
        )

    @property
    def _floats_per_frame(self) -> int:
        """Floats in a worker's array for 10 ms of audio: samples, or features."""
        front_end = self.collator.front_end
        samples = front_end.rate // FRAMES_PER_SECOND
        if self.config.features == "device":
            return samples
        return -(-front_end.frames(100 * samples) // 100) * front_end.bins

    def __next__(self) -> Batch:
        if self.closed:
            raise StopIteration
        started = time.perf_counter()
        self._fill()
        if not self.pending:
            raise StopIteration
        depth = self.pool.ready if self.pool else 0
        task, state = self.pending.popleft()
        payload = self.pool.take() if self.pool else run_inline(self.collator.collate, task)
        batch = self._batch(task, state, payload)
        batch.stats["wait_s"] = time.perf_counter() - started
        batch.stats["queue"] = depth
        self.cursor = state
        # Submit the next task now, so that no worker idles while this batch is consumed.
        self._fill()
        return batch

    def _fill(self) -> None:
        room = self.pool.room if self.pool else 1 - len(self.pending)
        while room > 0 and not self.ended:
            task = self.sampler.step()
            if task is None:
                self.ended = True
                return
            self.pending.append((task, self.sampler.state()))
            if self.pool:
                self.pool.submit(replace(task, bad=()))  # tasks stay small
            room -= 1

    def _batch(self, task: Task, state: dict, payload: Payload) -> Batch:
        rest = payload.rest
        features, lengths = payload.array, torch.from_numpy(rest.lengths)
        if self.config.features == "device":
            features, lengths = self.collator.compute_features(features, lengths, self.device)
        return Batch(
            features_BTF=features,
            feature_lengths_B=lengths,
            phonemes_BP=torch.from_numpy(rest.phonemes),
            phoneme_lengths_B=torch.from_numpy(rest.phoneme_lengths),
            tokens_BU=torch.from_numpy(rest.tokens),
            token_lengths_B=torch.from_numpy(rest.token_lengths),
            keys=rest.keys,
            shards=tuple(map(mask, rest.shards)),
            texts=rest.texts,
            langs=rest.langs,
            speakers=rest.speakers,
            durations=rest.durations,
            hints=rest.hints,
            seed=task.seed,
            epoch=task.epoch,
            number=task.number,
            state=state,
            bad=tuple(
                tuple(map(mask, row))
                for row in (*task.bad, *rest.bad, *([] if task.number else self.bad_noise))
            ),
            stats=rest.stats,
        )

    def __iter__(self) -> StreamingDataLoader:
        return self

    def state(self) -> dict:
        """The cursor after the step of the last delivered batch; equal on all ranks."""
        return self.cursor

    def close(self) -> None:
        """Stop the workers and the sampler's thread."""
        if not self.closed:
            self.closed = True
            if self.pool:
                self.pool.close()
            self.sampler.close()
            self.collator.storage.close()

    def __enter__(self) -> StreamingDataLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
