"""Build the objects of a recipe: text encoders, dataloaders, models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsasr.checkpoint import export_folder
from dsasr.data.audio.features import Cmvn
from dsasr.data.audio.frontends import FbankFrontEnd, FrontEnd
from dsasr.data.batch import Batch
from dsasr.data.dataloader.bucketing import BatchConfig
from dsasr.data.dataloader.collate import Collator
from dsasr.data.dataloader.dataloader import DataLoaderConfig, DatasetConfig, StreamingDataLoader
from dsasr.data.dataloader.text_dataloader import TextDataLoader
from dsasr.data.dataloader.text_encoder import TextEncoder
from dsasr.data.shards.storage import ShardStorage
from dsasr.data.text.build_phonemizer import build_phonemizer
from dsasr.data.text.phoneme_vocab import PhonemeVocab
from dsasr.data.text.phonemizer import Phonemizer
from dsasr.data.text.prompt import Prompt, PromptIds
from dsasr.data.text.speller import Speller
from dsasr.data.text.tokenizers import (
    Tokenizer,
    check_tokenizer,
    load_tokenizer,
    vocabulary_fingerprint,
)
from dsasr.model import layerwise_init, lora
from dsasr.model.adaptors.protocol import Adaptor, build_adaptor
from dsasr.model.ctc import CtcHead
from dsasr.model.ctc_model import CtcModel
from dsasr.model.encoders.encoder_builder import EncoderBuilder
from dsasr.model.encoders.protocol import Encoder
from dsasr.model.layerwise_init import Partition, full_shape
from dsasr.model.llm_builder import LlmBuilder
from dsasr.model.llm_hub import find_model
from dsasr.model.speech_llm import SpeechLLM
from dsasr.model.token_embeddings import unit_embeddings
from dsasr.model.weight_init import reset_layer
from dsasr.recipe import SOURCES, SUBSAMPLING, Recipe
from dsasr.stages import StageConfig
from dsasr.utils import distributed
from dsasr.utils.errors import UserError
from dsasr.utils.hashing import hash64


def sub_seed(seed: int, purpose: str) -> int:
    """A 31-bit seed derived from ``seed``, independent for each ``purpose``."""
    return hash64(f"{seed} {purpose}") >> 33


def _reset_adaptor(
    adaptor: Adaptor, table: Tensor | None, layer: nn.Module, generator: torch.Generator
) -> None:
    """Draw the weights of ``layer``, which is ``adaptor`` itself or a layer inside it.

    ``table``: for an adaptor that reads CTC, the embeddings [units - 1, D] of all units but the
    blank.
    """
    if layer is not adaptor:
        reset_layer(layer, generator)
        return
    adaptor.reset_parameters(generator)
    if table is not None:
        adaptor.table[1:] = table


@dataclass(frozen=True)
class Builder:
    """Builds the parts of a run. What is a ``cached_property`` is built once, on first use."""

    recipe: Recipe

    # -- features, vocabularies, prompts -----------------------------------------------------

    @property
    def frame_seconds(self) -> float:
        """Seconds of an encoder frame."""
        if self.recipe.pretrained_encoder is not None:
            return self.encoder_shape.frame_seconds
        return SUBSAMPLING * self.recipe.data.fbank.shift_ms / 1000

    @cached_property
    def front_end(self) -> FrontEnd:
        """The features that the encoder reads."""
        if self.recipe.pretrained_encoder is not None:
            return self.encoder_shape.front_end
        return FbankFrontEnd(self.recipe.data.fbank, self.cmvn)

    @cached_property
    def cmvn(self) -> Cmvn:
        """Mean and variance of the features. Raises `UserError` where there is no such file."""
        return Cmvn.load(self._existing_file("data.cmvn", self.recipe.data.cmvn, "cmvn"))

    @cached_property
    def phonemes(self) -> PhonemeVocab:
        """The units of the CTC head. Raises `UserError` where there is no such file."""
        path = self.recipe.data.phonemes
        return PhonemeVocab.load(self._existing_file("data.phonemes", path, "phonemes"))

    @property
    def phonemizer(self) -> Phonemizer:
        """A new one, which turns transcripts into the units that the CTC head learns."""
        cfg = self.recipe.data.phonemizer
        return build_phonemizer(cfg, self.tokenizer if cfg.kind == "tokens" else None)

    @cached_property
    def encoder_folder(self) -> Path:
        """The folder of ``model.encoder.path``, which is itself or a hub name (`find_model`)."""
        return find_model(
            self.original_or_copy(self.recipe.pretrained_encoder.path), "model.encoder.path"
        )

    @cached_property
    def encoder(self) -> EncoderBuilder:
        """What builds the encoder."""
        model, own = self.recipe.model, self.recipe.pretrained_encoder is None
        return EncoderBuilder(
            model.encoder,
            model.encoder_lora,
            None if own else self.encoder_folder,
            not self.encoder_comes_from_a_source,  # False: its weights are loaded later
            partial(sub_seed, self.recipe.seed),
        )

    @property
    def encoder_shape(self) -> Encoder:
        """The encoder without memory for its weights."""
        return self.encoder.shape

    @cached_property
    def llm_folder(self) -> Path:
        """The folder of ``model.llm.path``, which is itself or a hub name (`find_model`)."""
        return find_model(self.original_or_copy(self.recipe.model.llm.path))

    @cached_property
    def llm(self) -> LlmBuilder:
        """What builds the language model."""
        model, folder = self.recipe.model, self.llm_folder
        # A copy has no weights: they are drawn here, and then loaded from a checkpoint.
        copied = any(map(folder.is_relative_to, self.source_copies.values()))
        seed_for = partial(sub_seed, self.recipe.seed)
        return LlmBuilder(model.llm, model.lora, folder, model.llm.weights and not copied, seed_for)

    @property
    def tokenizer_folder(self) -> Path:
        folder = self.original_or_copy(self.recipe.model.tokenizer)
        return Path(folder) if folder else self.llm_folder

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.tokenizer_folder)

    @cached_property
    def vocabularies(self) -> dict[str, str]:
        """Fingerprints of the vocabularies of this job's heads: "phonemes" of a CTC head,
        "tokenizer" of the language model.

        Checkpoints and snapshots have them, so that a run which starts from their weights can
        compare them with its own.
        """
        found = {}
        if "pretrain" in self.recipe.branches or self.recipe.model.adaptor.reads_ctc:
            found["phonemes"] = self.phonemes.fingerprint
        if "sft" in self.recipe.branches:
            found["tokenizer"] = vocabulary_fingerprint(self.tokenizer)
        return found

    @property
    def source_copies(self) -> dict[str, Path]:
        """Each source of the run's initial weights → the run's copy of its other files (settings,
        tokenizer, CMVN, phonemes): the source may be gone when the run is resumed or exported."""
        sources = {key: getattr(self.recipe.model, key) for key in SOURCES}
        return {source: self.recipe.folder / key for key, source in sources.items() if source}

    def original_or_copy(self, path: str) -> str:
        """``path`` of the recipe, or the run's copy of it where it is gone (`source_copies`)."""
        return export_folder.original_or_copy(path, self.source_copies)

    def prompt(self, lang: str = "") -> tuple[list[int], list[int]]:
        """The prompt's ids before and after the speech; ``lang``: the one of ``model.languages``
        that it names, empty for none."""
        model = self.recipe.model
        language = model.languages[lang] if lang else ""
        return Prompt.build(self.tokenizer, template=model.prompt, language=language)

    @property
    def hinted_prompts(self) -> dict[str, PromptIds]:
        """The prompts that name a language, by its tag."""
        sides = {lang: self.prompt(lang=lang) for lang in self.recipe.model.languages}
        return {lang: PromptIds(*map(tuple, pair)) for lang, pair in sides.items()}

    def _existing_file(self, key: str, path: str, command: str) -> Path:
        """The file ``path`` of the recipe's ``key``, which `dsasr data COMMAND` makes."""
        hint = f"make it with `dsasr data {command}`"
        if not path:
            raise UserError(f"{key} is not given: {hint}")
        found = Path(self.original_or_copy(path))
        if not found.is_file():
            raise UserError(f"{key}: there is no {found}; {hint}")
        return found

    # -- dataloaders -------------------------------------------------------------------------

    def text_encoder(self, phonemes: bool, tokens: bool) -> TextEncoder:
        """From transcripts to labels: phonemes, tokens or both."""
        data, model = self.recipe.data, self.recipe.model
        return TextEncoder(
            config=data.text,
            phonemizer=self.phonemizer if phonemes else None,
            vocab=self.phonemes if phonemes else None,
            tokenizer=self.tokenizer if tokens else None,
            languages=tuple(model.languages) if tokens else (),
            language_share=model.language_share,
        )

    def collator(self, branch: str, batch: BatchConfig, trains: bool) -> Collator:
        """What reads a branch's samples, without augmentation.

        ``trains``: for pretraining, samples too short for their CTC labels are bad, as in training.
        """
        ctc = trains and branch == "pretrain"
        return Collator(
            storage=ShardStorage(self.recipe.data.dataloader.source),
            front_end=self.front_end,
            augment=None,
            text=self.text_encoder(phonemes=branch == "pretrain", tokens=branch == "sft"),
            max_seconds=batch.max_seconds,
            features_on_device=False,
            ctc_lengths=self.encoder_shape.output_lengths if ctc else None,
        )

    def train_dataloader(
        self, stage: StageConfig, state: Mapping[str, Any] | None
    ) -> StreamingDataLoader:
        """A stage's endless dataloader, from ``state`` on."""
        config, datasets = self.recipe.dataloader(stage)
        return self._dataloader(
            config,
            datasets,
            stage.branch,
            seed=sub_seed(self.recipe.seed, f"stream {stage.name}"),
            augment=self.recipe.data.augment,
            state=state,
            ctc_lengths=self.encoder_shape.output_lengths if stage.branch == "pretrain" else None,
        )

    def text_dataloader(
        self, stage: StageConfig, state: Mapping[str, Any] | None
    ) -> TextDataLoader:
        """A stage's endless dataloader of text without speech, from ``state`` on."""
        return TextDataLoader(
            self.recipe.data.text_only,
            self.text_encoder(phonemes=True, tokens=True),
            self.front_end.bins,
            seed=sub_seed(self.recipe.seed, f"text {stage.name}"),
            rank=distributed.rank(),
            world=distributed.world_size(),
            state=state,
        )

    def validation_batches(self, branch: str, utterances: int = 0) -> list[Batch]:
        """This rank's batches of the validation set, until all ranks together have ``utterances``
        (0: all of it).

        Every rank gets equally many batches; some may have no utterance. Collective.
        """
        config = replace(self.recipe.data.dataloader, num_workers=0)
        valid = self.recipe.data.valid
        with self._dataloader(config, valid, branch, purpose="eval", seed=0) as loader:
            batches, seen = [], 0
            for batch in loader:
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
        **options: Any,
    ) -> StreamingDataLoader:
        return StreamingDataLoader(
            config,
            datasets=datasets,
            text=self.text_encoder(phonemes=branch == "pretrain", tokens=branch == "sft"),
            front_end=self.front_end,
            rank=distributed.rank(),
            world=distributed.world_size(),
            device=distributed.device(),
            **options,
        )

    # -- models ------------------------------------------------------------------------------

    def ctc_model(self, partition: Partition | None = None) -> CtcModel:
        """The pretrain branch, with weights drawn from the recipe's seed.

        With ``partition`` (`engine.partitioner`) each layer is partitioned as soon as it is
        drawn, so that no rank has the whole model in memory; the weights are the same. Collective
        then.
        """
        model = self.recipe.model
        stages = self.recipe.schedule().pretrain
        pretrain = model.pretrain
        if stages and stages[0].objective == "ctc":
            pretrain = replace(pretrain, consistency=0.0)
        encoder = self.encoder.build("pretrain encoder", partition)
        with torch.device("meta"):
            module = CtcModel(encoder, len(self.phonemes), pretrain)
        return self._drawn(module, "pretrain", partition)

    def speech_llm(self, partition: Partition | None = None) -> SpeechLLM:
        """The sft branch: a fresh adaptor on the recipe's LLM; ``partition`` as for `ctc_model`."""
        model, properties = self.recipe.model, self.llm.properties
        if distributed.is_main_rank():
            for line in properties.notes(self.llm.kind, model.llm):
                print(line, flush=True)
        llm, scale = self.llm.build(partition)
        vocabulary, width = full_shape(llm.get_input_embeddings().weight)
        check_tokenizer(self.tokenizer, vocabulary)
        encoder = self.encoder.build("sft encoder", partition)
        adaptor, ctc = self._meta_adaptor(encoder, width, scale)
        self._drawn(encoder, "sft encoder", partition)
        table = None
        if model.adaptor.reads_ctc:
            are_tokens = self.recipe.data.phonemizer.kind == "tokens"
            table = unit_embeddings(llm, self.tokenizer, self.phonemes.symbols[1:], are_tokens)
        self._drawn(adaptor, "adaptor", partition, partial(_reset_adaptor, adaptor, table))
        if ctc is not None:
            self._drawn(ctc, "sft ctc", partition)
        prefix, suffix = self.prompt()
        return SpeechLLM(
            encoder,
            adaptor,
            llm,
            prefix,
            suffix,
            self.tokenizer.pad_id,
            properties.applied(model.llm),
            spec=model.pretrain.spec if model.sft.spec else None,
            chunks=model.sft.chunks,
            ctc=ctc,
            speller=self.speller if model.adaptor.reads_ctc else None,
            cached=properties.caches,
            hinted=self.hinted_prompts,
        )

    def empty_module(self, branch: str) -> nn.Module:
        """The branch's model on the meta device: the names and shapes of its weights."""
        model = self.recipe.model
        with torch.device("meta"):
            if branch == "pretrain":
                return CtcModel(self.encoder_shape, len(self.phonemes), model.pretrain)
            llm = self.llm.empty()
            encoder, width = self.encoder_shape, llm.get_input_embeddings().weight.shape[1]
            adaptor, ctc = self._meta_adaptor(encoder, width)
            prompt = self.prompt()
            return SpeechLLM(
                encoder, adaptor, llm, *prompt, self.tokenizer.pad_id, model.llm, ctc=ctc
            )

    def _meta_adaptor(
        self, encoder: Encoder, width: int, scale: float = 1.0
    ) -> tuple[Adaptor, CtcHead | None]:
        """The adaptor, and the CTC head if it reads one, on the meta device."""
        model = self.recipe.model
        units = len(self.phonemes) if model.adaptor.reads_ctc else 0
        with torch.device("meta"):
            adaptor = build_adaptor(model.adaptor, encoder.width, width, scale, units)
            ctc = CtcHead(encoder.width, units, model.pretrain.head) if units else None
        return adaptor, ctc

    @cached_property
    def speller(self) -> Speller:
        """From a transcript to the units of the CTC head."""
        return Speller(self.phonemizer, self.phonemes)

    @property
    def encoder_comes_from_a_source(self) -> bool:
        """Whether the encoder's folder is that of an export, whose weights lie elsewhere."""
        carried = [Path(source) / export_folder.ENCODER for source in self.source_copies]
        cfg = self.recipe.pretrained_encoder
        return cfg is not None and self.recipe.takes_encoder and Path(cfg.path) in carried

    def _drawn(
        self,
        module: nn.Module,
        purpose: str,
        partition: Partition | None,
        reset: Callable = reset_layer,
    ) -> nn.Module:
        """Draw the weights that ``module`` has on the meta device, from the recipe's seed and
        ``purpose``; ``reset``: draws a layer's own weights."""
        generator = self._generator(purpose)

        def fill(layer: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
            own = ((name.removeprefix("encoder."), p) for name, p in parameters.items())
            if not lora.draw(own, self.encoder.adapter):
                reset(layer, generator)

        layerwise_init.materialize(module, fill, partition)
        return module

    def module(self, branch: str, partition: Partition | None = None) -> nn.Module:
        return self.ctc_model(partition) if branch == "pretrain" else self.speech_llm(partition)

    def _generator(self, purpose: str) -> torch.Generator:
        return torch.Generator().manual_seed(sub_seed(self.recipe.seed, purpose))
