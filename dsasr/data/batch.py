"""What crosses from the data to the model: `Batch`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One rank's utterances of one step, padded on the right.

    ``bad`` names the samples that were meant for this batch and dropped: (cause, shard, key,
    detail). Which batches hold no utterance at all, `dsasr.data.dataloader.dataloader` states.
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
    # the language that each utterance's prompt names, by its tag in `SpeechLLM.hinted`; "": none.
    # Without entries no prompt names one
    hints: tuple[str, ...] = ()
    stats: dict = field(default_factory=dict)  # decode_s, feature_s, bytes, …
    origin: Batch | None = field(default=None, repr=False)  # this batch before `to`

    @classmethod
    def blank(cls, features_BTF: Tensor, **fields: Any) -> Batch:
        """A batch of features whose other fields are blank, but for those given.

        Blank are: no phonemes and no tokens, empty names and texts; seed, epoch, number and
        durations are 0. Lengths that are not given are those of whole rows, padding included.
        """
        count, device = len(features_BTF), features_BTF.device
        no_labels = torch.zeros(count, 0, dtype=torch.int64, device=device)
        blank: dict[str, Any] = {"phonemes_BP": no_labels, "tokens_BU": no_labels}
        blank |= dict.fromkeys(("keys", "shards", "texts", "langs", "speakers"), ("",) * count)
        blank |= {"durations": (0.0,) * count, "seed": 0, "epoch": 0, "number": 0, "state": {}}
        fields = blank | {"features_BTF": features_BTF} | fields
        for rows, lengths in (
            ("features_BTF", "feature_lengths_B"),
            ("phonemes_BP", "phoneme_lengths_B"),
            ("tokens_BU", "token_lengths_B"),
        ):
            fields.setdefault(lengths, torch.full((count,), fields[rows].shape[1], device=device))
        return cls(**fields)

    def or_silence(self, shape: tuple[int, int], token: int = 0) -> Batch:
        """This batch, or without utterances one of silence, ``shape`` [T, F] and a ``token``.

        A rank without an utterance runs the silence through the model, for it must make the same
        collective calls as the others. Everything but the tensors is that of the empty batch.
        """
        if len(self):
            return self
        silence = Batch.blank(
            self.features_BTF.new_zeros(1, *shape),
            phonemes_BP=self.phonemes_BP.new_ones(1, 1),
            tokens_BU=self.tokens_BU.new_full((1, 1), token),
        )
        origin = self.origin.or_silence(shape, token) if self.origin is not None else None
        return dataclasses.replace(self, **silence._tensors(), origin=origin)

    def _tensors(self) -> dict[str, Tensor]:
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def __len__(self) -> int:
        """Utterances."""
        return self.features_BTF.shape[0]

    @property
    def text_only(self) -> bool:
        """Whether the batch has transcripts and their units, but no audio."""
        return len(self) > 0 and self.features_BTF.shape[1] == 0

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
        """The same batch with its tensors on ``device``; the host does not wait for the copies."""
        on_device = {name: upload(x, device) for name, x in self._tensors().items()}
        return dataclasses.replace(self, **on_device, origin=self.host)


def upload(x: Tensor, device: torch.device | str) -> Tensor:
    """``x`` on ``device`` without waiting for what is queued there.

    A plain copy from the host's pageable memory waits for the queue when it is large, and always
    when it is blocking.
    """
    device = torch.device(device)
    if x.device.type == "cpu" and device.type == "cuda":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)
