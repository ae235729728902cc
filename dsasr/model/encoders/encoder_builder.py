"""The recipe's encoder: a Conformer, or a pretrained one; with LoRA's matrices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from dsasr.model import lora
from dsasr.model.encoders.conformer import Encoder as Conformer
from dsasr.model.encoders.conformer import EncoderConfig
from dsasr.model.encoders.load import load_encoder
from dsasr.model.encoders.pretrained import PretrainedEncoderConfig, build_encoder
from dsasr.model.encoders.protocol import Encoder
from dsasr.model.layerwise_init import Partition
from dsasr.model.lora import LoraConfig


@dataclass(frozen=True)
class EncoderBuilder:
    """Builds the encoder of ``cfg``.

    folder: that of a pretrained encoder, else None; has_weights: False where it has none;
    seed_for: a seed for a purpose, of which all drawn values are functions.
    """

    cfg: EncoderConfig | PretrainedEncoderConfig
    lora_cfg: LoraConfig | None
    folder: Path | None
    has_weights: bool
    seed_for: Callable[[str], int]

    @cached_property
    def shape(self) -> Encoder:
        """The encoder without memory for its weights, and without LoRA."""
        with torch.device("meta"):
            return self._plain()

    def empty(self) -> Encoder:
        """An encoder on the CPU whose weights are to be loaded from a checkpoint."""
        encoder = self._plain()
        self._adapt(encoder, meta=False)
        return encoder

    def build(self, purpose: str, partition: Partition | None) -> Encoder:
        """The pretrained encoder, with its weights; or a Conformer on the meta device."""
        if self.folder is None:
            with torch.device("meta"):
                encoder = self._plain()
                self._adapt(encoder)
            return encoder
        cfg = self.cfg if self.has_weights else replace(self.cfg, weights=False)
        return load_encoder(
            self.folder, cfg, self.seed_for(purpose), partition, adapt=self._adapt,
            draw_adapter=self.adapter,
        )  # fmt: skip

    def adapter(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The initial LoRA matrix of that name, the same in both branches."""
        generator = torch.Generator().manual_seed(self.seed_for(f"encoder_lora {name}"))
        return lora.initial(name, shape, generator)

    def _plain(self) -> Encoder:
        if self.folder is None:
            return Conformer(self.cfg)
        return build_encoder(self.folder, self.cfg)

    def _adapt(self, encoder: Encoder, meta: bool = True) -> None:
        if self.lora_cfg is not None:
            lora.inject(encoder, self.lora_cfg, meta=meta)
