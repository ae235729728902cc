"""What crosses from the data to the model: `Batch`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One rank's utterances of one step, padded on the right.

    ``bad`` names the samples that were meant for this batch and dropped: (cause, shard, key,
    detail). A batch may hold no utterance at all only in the way that ``stream.py`` states.
    """

    features_BTF: Tensor  # float32, CMVN applied, zero padded
    feature_lengths_B: Tensor  # int64, frames
    phonemes_BP: Tensor  # int64, zero padded; no columns where the stage needs no phonemes
    phoneme_lengths_B: Tensor  # int64
    tokens_BU: Tensor  # int64, transcript tokens + end_id, padded with the tokenizer's pad_id
    token_lengths_B: Tensor  # int64, end_id counted
    keys: tuple[str, ...]
    shards: tuple[str, ...]
    texts: tuple[str, ...]
    langs: tuple[str, ...]
    speakers: tuple[str, ...]
    durations: tuple[float, ...]  # seconds of the augmented audio
    seed: int  # 63 bits; all randomness of the step derives from it
    epoch: int
    number: int  # of the global batch in its stream
    state: dict  # JSON-able cursor after this step's global batches; opaque
    bad: tuple[tuple[str, str, str, str], ...] = ()
    stats: dict = field(default_factory=dict)  # decode_s, feature_s, bytes, …
    origin: Batch | None = field(default=None, repr=False)  # what `to` moved from another device

    def __len__(self) -> int:
        """Utterances."""
        return self.features_BTF.shape[0]

    @property
    def audio_seconds(self) -> float:
        """Seconds of (augmented) audio over the utterances."""
        return float(sum(self.durations))

    @property
    def padding_share(self) -> float:
        """Padding frames over all frames; 0 for a batch without utterances."""
        total = self.features_BTF.shape[0] * self.features_BTF.shape[1]
        return 1.0 - float(self.feature_lengths_B.sum()) / total if total else 0.0

    @property
    def host(self) -> Batch:
        """The batch as it was before `to`: lengths that are read here keep no GPU waiting."""
        return self.origin or self

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on ``device``, on the way there when this returns."""
        moved = {
            item.name: upload(value, device)
            for item in dataclasses.fields(self)
            if isinstance(value := getattr(self, item.name), Tensor)
        }
        return dataclasses.replace(self, **moved, origin=self.host)


def upload(x: Tensor, device: torch.device | str) -> Tensor:
    """``x`` on ``device`` without waiting for what is queued there.

    A plain copy from the host's pageable memory waits for the queue when it is large, and always
    when it is blocking.
    """
    device = torch.device(device)
    if x.device.type == "cpu" and device.type == "cuda":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)
