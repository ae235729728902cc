"""A recipe's section ``data``."""

from __future__ import annotations

from dataclasses import dataclass, field

from dsasr.data.audio.augment import RECORDED, AugmentConfig
from dsasr.data.audio.features import FbankConfig
from dsasr.data.dataloader.dataloader import DataLoaderConfig, DatasetConfig
from dsasr.data.dataloader.text_dataloader import TextOnlyConfig
from dsasr.data.text.build_phonemizer import PhonemizerConfig
from dsasr.data.text.normalization import TextConfig
from dsasr.utils import ranges
from dsasr.utils.errors import UserError
from dsasr.utils.ranges import NonNegativeInt


@dataclass(frozen=True)
class DataConfig:
    """Training and validation data."""

    train: tuple[DatasetConfig, ...]  # training datasets, mixed by weight; names must differ
    valid: tuple[DatasetConfig, ...]  # validation datasets, read whole and in order
    # file with mean and variance of the features, by `dsasr data cmvn`; not needed by a
    # pretrained encoder
    cmvn: str = ""
    # file with the phoneme vocabulary, by `dsasr data phonemes`; needed by pretraining
    phonemes: str = ""
    # log-Mel features; must be those that cmvn was computed from
    fbank: FbankConfig = field(default_factory=FbankConfig)
    # augmentation of the training audio; null: none
    augment: AugmentConfig | None = field(default_factory=AugmentConfig)
    # text without speech, for stages with a text_share; null: none
    text_only: TextOnlyConfig | None = None
    # form of the transcripts that are trained on
    text: TextConfig = field(default_factory=TextConfig)
    # where phoneme labels come from
    phonemizer: PhonemizerConfig = field(default_factory=PhonemizerConfig)
    # reading, shuffling and batching
    dataloader: DataLoaderConfig = field(default_factory=DataLoaderConfig)
    # cause → samples of a run that may be dropped for it; "*": every other cause, "total": all
    bad_limits: dict[str, NonNegativeInt] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ranges.check(self)
        for key in ("train", "valid"):
            names = [dataset.name for dataset in getattr(self, key)]
            if not names:
                raise UserError(f"data.{key} names no dataset")
            if twice := [name for name in names if names.count(name) > 1]:
                raise UserError(f"two datasets of data.{key} are called '{twice[0]}'")
        recorded = self.augment is not None and RECORDED in self.augment.kinds
        if recorded and not self.dataloader.noise_weights:
            raise UserError(
                'data.augment.kinds names "recorded": say where with '
                "data.dataloader.noise=FOLDER_OF_SHARDS"
            )
        if self.fbank.dither and self.dataloader.features == "device":
            raise UserError(
                "data.fbank.dither needs features that workers compute: give "
                "data.dataloader.features=worker, or data.fbank.dither=0"
            )
