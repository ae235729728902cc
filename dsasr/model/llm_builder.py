"""The recipe's language model: loaded or drawn, with LoRA's matrices, whole or partitioned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dsasr.model import activation_checkpointing, lora
from dsasr.model.layerwise_init import Partition
from dsasr.model.llm import FusedLmHead, LlmConfig, load_llm, read_llm_config
from dsasr.model.llm_properties import LlmProperties, try_llm
from dsasr.model.llm_sharded_load import draw_llm, load_llm_partitioned
from dsasr.model.lora import LoraConfig
from dsasr.model.token_embeddings import token_rms
from dsasr.utils import distributed
from dsasr.utils.errors import UserError


@dataclass(frozen=True)
class LlmBuilder:
    """Builds the language model in ``folder``.

    has_weights: False where the folder has none, or ``cfg`` wants fresh ones; seed_for: a seed for
    a purpose, of which all drawn values are functions.
    """

    cfg: LlmConfig
    lora_cfg: LoraConfig | None
    folder: Path
    has_weights: bool
    seed_for: Callable[[str], int]

    @cached_property
    def properties(self) -> LlmProperties:
        """What holds of the model (`try_llm`), tried by rank 0.

        Raises `UserError`, on all ranks, for a model that is refused. Collective.
        """
        config, problem, found = read_llm_config(self.folder), "", LlmProperties()
        if distributed.is_main_rank():
            try:
                found = try_llm(config, self.cfg.attn)
            except UserError as error:
                problem = str(error)
        found, problem = distributed.broadcast((found, problem))
        if problem:
            raise UserError(f"model.llm.path: {problem}")
        return found

    @property
    def kind(self) -> str:
        """The family, as transformers calls it."""
        return read_llm_config(self.folder).model_type

    @property
    def notes(self) -> list[str]:
        """A line for each thing that is switched off, and what LoRA covers."""
        lines = self.properties.notes(self.kind, self.cfg)
        if self.lora_cfg is not None:
            with torch.device("meta"):
                llm = load_llm(self.folder, attn="eager", weights=False)
            lines.append(lora.coverage(llm, self.lora_cfg))
        return lines

    def build(self, partition: Partition | None = None) -> tuple[PreTrainedModel, float]:
        """The model, with LoRA's matrices if there are any; and its `token_rms`.

        With ``partition`` no rank has the whole model in memory. Collective then.
        """
        options = {"attn": self.cfg.attn, "dropout": self.cfg.dropout}
        if self.lora_cfg is not None:
            options |= {"adapt": self._adapt, "draw_adapter": self._adapter}
        if not self.has_weights:
            return draw_llm(self.folder, self.seed_for("llm"), partition, **options)
        if partition is not None:
            return load_llm_partitioned(self.folder, partition, **options)
        llm = load_llm(self.folder, attn=self.cfg.attn, dropout=self.cfg.dropout)
        if self.lora_cfg is not None:
            self._adapt(llm)
            lora.draw(llm.named_parameters(), self._adapter)
        return llm, token_rms(llm)

    def empty(self, attn: str = "eager") -> PreTrainedModel:
        """The model on the meta device: the names and shapes of its weights.

        They do not depend on ``attn``; every family has eager attention.
        """
        with torch.device("meta"):
            llm = load_llm(self.folder, attn=attn, weights=False)
        if self.lora_cfg is not None:
            self._adapt(llm)
        return llm

    def check(self) -> PreTrainedModel:
        """Build all that training builds, without memory: the attention, the head, recomputed
        layers, LoRA by peft. The model without LoRA. Raises `UserError`."""
        llm = self.empty(self.cfg.attn)
        FusedLmHead.replace(llm)
        if self.cfg.activation_checkpointing:
            activation_checkpointing.enable(llm, keep=self.cfg.recompute == "cheap")
        _ = self.properties
        with torch.device("meta"):
            return load_llm(self.folder, attn=self.cfg.attn, weights=False)

    def _adapt(self, llm: PreTrainedModel) -> None:
        lora.inject(llm, self.lora_cfg, meta=llm.device.type == "meta")

    def _adapter(self, name: str, shape: tuple[int, ...]) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed_for(f"lora {name}"))
        return lora.initial(name, shape, generator)
