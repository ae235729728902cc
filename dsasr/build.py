"""From a recipe to its objects: text, streams, modules. What is missing is said beforehand."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dsasr.checkpoint import zero_partition
from dsasr.checkpoint.tensor_fragments import MANIFEST
from dsasr.data.audio.features import Cmvn
from dsasr.data.dataloader.collate import TextEncoder
from dsasr.data.dataloader.dataloader import DataLoaderConfig, DatasetConfig, StreamingDataLoader
from dsasr.data.text.phonemes import PhonemeVocab, build_phonemizer
from dsasr.data.text.prompt import Prompt, Tokenizer, check_tokenizer, load_tokenizer
from dsasr.model import layerwise_init, lora
from dsasr.model.adaptor import Adaptor
from dsasr.model.ctc_model import CtcModel
from dsasr.model.encoders.conformer import Encoder, reset_layer
from dsasr.model.layerwise_init import Cut
from dsasr.model.llm import load_llm
from dsasr.model.llm_hub import find_llm
from dsasr.model.llm_sharded_load import draw_at_random, load_in_slices
from dsasr.model.speech_llm import SpeechLLM
from dsasr.recipe import Recipe
from dsasr.stages import StageConfig
from dsasr.utils import distributed
from dsasr.utils.errors import UserError


def sub_seed(seed: int, purpose: str) -> int:
    """A 31-bit seed of its own for ``purpose``."""
    digest = hashlib.blake2b(f"{seed} {purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 33


@dataclass(frozen=True)
class Builder:
    """Builds the parts of a run. Properties are made once, on first use."""

    recipe: Recipe

    # -- data --------------------------------------------------------------------------------

    @property
    def frame_seconds(self) -> float:
        """Of an encoder frame: four feature frames."""
        return 4 * self.recipe.data.fbank.shift_ms / 1000

    @cached_property
    def cmvn(self) -> Cmvn:
        path = self._file(self.recipe.data.cmvn, "data.cmvn", "make it with tools/cmvn.py")
        return Cmvn.load(path)

    @cached_property
    def phonemes(self) -> PhonemeVocab:
        hint = "make it with tools/make_phonemes.py"
        return PhonemeVocab.load(self._file(self.recipe.data.phonemes, "data.phonemes", hint))

    @cached_property
    def llm_folder(self) -> Path:
        """The language model's, by ``model.llm.path``: a local folder or a hub name."""
        return find_llm(self.recipe.model.llm.path)

    @property
    def tokenizer_folder(self) -> Path:
        given = self.recipe.model.tokenizer
        return Path(given) if given else self.llm_folder

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.tokenizer_folder)

    @staticmethod
    def _file(path: str, key: str, hint: str) -> Path:
        if not Path(path).is_file():
            raise UserError(f"{key}: there is no {path}; {hint}")
        return Path(path)

    def text(self, phonemes: bool, tokens: bool) -> TextEncoder:
        """What turns transcripts into labels, for a branch that needs one kind or both."""
        data = self.recipe.data
        return TextEncoder(
            config=data.text,
            phonemizer=build_phonemizer(data.phonemizer) if phonemes else None,
            vocab=self.phonemes if phonemes else None,
            tokenizer=self.tokenizer if tokens else None,
        )

    def train_stream(
        self, stage: StageConfig, state: Mapping[str, Any] | None
    ) -> StreamingDataLoader:
        """The endless stream of a stage, from ``state`` on."""
        config, datasets = self.recipe.dataloader(stage)
        return self._dataloader(
            config,
            datasets,
            stage.branch,
            seed=sub_seed(self.recipe.seed, f"stream {stage.name}"),
            augment=self.recipe.data.augment,
            state=state,
        )

    def held_out(self, branch: str, utterances: int = 0, datasets=None) -> list:
        """This rank's batches of the validation set (or ``datasets``), up to ``utterances``.

        Every rank gets equally many batches; some may hold no utterance.
        """
        config = replace(self.recipe.data.dataloader, num_workers=0)
        chosen = datasets or self.recipe.data.valid
        with self._dataloader(config, chosen, branch, purpose="eval", seed=0) as stream:
            batches, seen = [], 0
            for batch in stream:
                batches.append(batch)
                seen += sum(distributed.all_gather_object(len(batch))) if utterances else 0
                if utterances and seen >= utterances:
                    break
        return batches

    def _dataloader(
        self,
        config: DataLoaderConfig,
        datasets: tuple[DatasetConfig, ...],
        branch: str,
        **given: Any,
    ) -> StreamingDataLoader:
        return StreamingDataLoader(
            config,
            datasets=datasets,
            text=self.text(phonemes=branch == "pretrain", tokens=branch == "sft"),
            fbank=self.recipe.data.fbank,
            cmvn=self.cmvn,
            rank=distributed.rank(),
            world=distributed.world_size(),
            device=distributed.device(),
            **given,
        )

    # -- models ------------------------------------------------------------------------------

    def pretrainer(self, cut: Cut | None = None) -> CtcModel:
        """The pretrain branch, with weights drawn from the recipe's seed.

        With ``cut`` (`branch_engine.partitioner`) each layer is partitioned as soon as it is drawn,
        so that no rank holds the whole; the weights are the same. Collective then.
        """
        model = self.recipe.model
        stage = self.recipe.schedule().pretrain
        pretrain = model.pretrain
        if stage is not None and stage.objective == "ctc":
            pretrain = replace(pretrain, consistency=0.0)
        with torch.device("meta"):
            module = CtcModel(Encoder(model.encoder), len(self.phonemes), pretrain)
        return self._drawn(module, "pretrain", cut)

    def speech_llm(self, cut: Cut | None = None) -> SpeechLLM:
        """The sft branch: a fresh adaptor on the LLM of the recipe; ``cut`` as for `pretrainer`."""
        model = self.recipe.model
        llm, scale = self._llm(cut)
        vocabulary, width = zero_partition.full_shape(llm.get_input_embeddings().weight)
        check_tokenizer(self.tokenizer, vocabulary)
        with torch.device("meta"):
            encoder = Encoder(model.encoder)
            adaptor = Adaptor(model.adaptor, model.encoder.width, width, scale)
        self._drawn(encoder, "sft encoder", cut)
        self._drawn(adaptor, "adaptor", cut, Adaptor.reset_parameters)
        prefix, suffix = Prompt.build(self.tokenizer)
        return SpeechLLM(
            encoder,
            adaptor,
            llm,
            prefix,
            suffix,
            self.tokenizer.pad_id,
            model.llm,
            spec=model.pretrain.spec if model.sft.spec else None,
            chunks=model.sft.chunks,
        )

    def _drawn(
        self, module: nn.Module, purpose: str, cut: Cut | None, reset: Callable = reset_layer
    ) -> nn.Module:
        """Weights from the recipe's seed for a module of ours on the meta device."""
        generator = self._generator(purpose)
        layerwise_init.fill(module, lambda layer, _: reset(layer, generator), cut)
        return module

    def _llm(self, cut: Cut | None) -> tuple[PreTrainedModel, float]:
        """The language model, with LoRA's matrices if the recipe has them; and the root mean square
        of its token embeddings."""
        chosen, folder = self.recipe.model.llm, self.llm_folder
        given = {"attn": chosen.attn, "dropout": chosen.dropout}
        if self.recipe.model.lora is not None:
            given |= {"adapt": self._adapt, "draw_adapter": self._adapter}
        if not chosen.weights:
            return draw_at_random(folder, sub_seed(self.recipe.seed, "llm"), cut, **given)
        if cut is not None:
            return load_in_slices(folder, cut, **given)
        llm = load_llm(folder, attn=chosen.attn, dropout=chosen.dropout)
        if self.recipe.model.lora is not None:
            self.add_lora(llm)
        embeddings = llm.get_input_embeddings().weight
        return llm, float(embeddings.detach().float().square().mean().sqrt())

    def add_lora(self, llm: PreTrainedModel) -> None:
        """Put the recipe's LoRA matrices into ``llm``, drawn from the recipe's seed."""
        self._adapt(llm)
        for name, parameter in lora.adapters(llm):
            parameter.data.copy_(self._adapter(name, tuple(parameter.shape)))

    def _adapt(self, llm: PreTrainedModel) -> None:
        lora.inject(llm, self.recipe.model.lora, meta=llm.device.type == "meta")

    def _adapter(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return lora.initial(name, shape, self._generator(f"lora {name}"))

    def module(self, branch: str, cut: Cut | None = None) -> nn.Module:
        return self.pretrainer(cut) if branch == "pretrain" else self.speech_llm(cut)

    def _generator(self, purpose: str) -> torch.Generator:
        return torch.Generator().manual_seed(sub_seed(self.recipe.seed, purpose))

    # -- checks ------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise `UserError` for whatever of the recipe's files is missing or does not fit."""
        schedule = self.recipe.schedule()
        _ = self.cmvn
        if schedule.pretrain is not None and self.recipe.branch != "sft":
            _ = self.phonemes
        if schedule.sft and self.recipe.branch != "pretrain":
            _ = self.llm_folder, self.tokenizer
            self._check_prompt()
            self._check_lora()
        if self.recipe.encoder_given:
            manifest = Path(self.recipe.model.encoder_from) / MANIFEST
            self._file(str(manifest), "model.encoder_from", "give a snapshot's folder")
        if self.cmvn.mean_F.shape[0] != self.recipe.model.encoder.mels:
            raise UserError(
                f"{self.recipe.data.cmvn} has {self.cmvn.mean_F.shape[0]} mel bins, "
                f"model.encoder.mels is {self.recipe.model.encoder.mels}"
            )
        for datasets in (self.recipe.data.train, self.recipe.data.valid):
            from dsasr.data.shards.storage import Sources

            sources = Sources(self.recipe.data.dataloader.source)
            for dataset in datasets:
                sources.resolve(dataset.shards)

    def _check_prompt(self) -> None:
        """The prompt must not be longer than the token budgets take it for."""
        length = sum(map(len, Prompt.build(self.tokenizer)))
        for stage in self.recipe.schedule().sft:
            batch = self.recipe.dataloader(stage)[0].batch
            if batch.tokens and length > batch.prompt_tokens:
                raise UserError(
                    f"the prompt has {length} tokens: give stage '{stage.name}' "
                    f"batch.prompt_tokens={length}"
                )

    def _check_lora(self) -> None:
        """The layers that are to be adapted must be there."""
        chosen = self.recipe.model
        if chosen.lora is not None:
            with torch.device("meta"):
                lora.check(load_llm(self.llm_folder, weights=False), chosen.lora)
