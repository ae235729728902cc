"""The peer of `peer_step.py`: encoder, projector and a causal LM under transformers' Trainer.

Written as public fine-tuning scripts for speech LLMs are (Qwen3-ASR's ``qwen3_asr_sft.py``, tiny-
audio's ``train.py``): a collator that loads audio, calls the WhisperFeatureExtractor, repeats a
placeholder for each speech embedding, pads on the right and masks all labels but the transcript's;
a model that scatters projected frames into the token embeddings and lets the LM compute the loss
from all logits [B, L, V]; the Trainer's own random batches, fused AdamW, clipping and workers.

transformers' Whisper takes windows of 30 s and nothing else; tiny-audio pads to that too. Qwen3-
ASR's own encoder takes audio of any length, and its script pads to the batch's longest utterance.
So a window ``longest`` stands beside ``30``; tiny-audio's newer option to group by length is
``grouped``; ``fused`` puts this project's LM head, on target positions alone, in place of the LM's,
and ``adaptor`` its adaptor, over valid frames alone, in place of the projector. The encoder of a
recipe (`OwnSpeechModel`) is this project's and takes audio of any length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from marks import Throughput
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    WhisperFeatureExtractor,
    WhisperModel,
)
from transformers.trainer_pt_utils import LengthGroupedSampler

from dsasr.data.audio.decoding import decode
from dsasr.data.audio.frontends import FrontEnd
from dsasr.data.audio.resampling import RATE
from dsasr.data.text.normalization import normalize_text
from dsasr.data.text.prompt import Prompt
from dsasr.data.text.tokenizers import Tokenizer
from dsasr.kernels import dispatch
from dsasr.kernels.adaptor import AdaptorWeights
from dsasr.model.adaptors.protocol import AdaptorConfig
from dsasr.model.encoders.protocol import Encoder
from dsasr.model.llm import FusedLmHead

AUDIO = -1  # placeholder of a speech embedding among token ids
IGNORED = -100  # label of a position without a target


@dataclass(frozen=True)
class PeerOptions:
    longest: bool = False  # pad to the batch's longest utterance, not to 30 s
    grouped: bool = False  # batches of similar length
    fused: bool = False  # this project's LM head
    adaptor: bool = False  # this project's adaptor
    deepspeed: bool = False  # the same DeepSpeed settings as ours


def speech_tokens(samples: int, stack: int) -> int:
    """Speech embeddings of an utterance: Mel frames, halved by the encoder, stacked."""
    frames = -(-samples // 160)
    return -(-((frames + 1) // 2) // stack)


class SpeechCollator:
    """Rows of a manifest to the model's inputs; ``seconds`` is for the measurement alone."""

    def __init__(
        self,
        extractor: WhisperFeatureExtractor,
        tokenizer: Tokenizer,
        stack: int,
        longest: bool,
    ):
        self.extractor, self.tokenizer, self.stack = extractor, tokenizer, stack
        self.padding = "longest" if longest else "max_length"
        self.prefix, self.suffix = Prompt.build(tokenizer)

    def __call__(self, rows: list[Any]) -> dict[str, Tensor]:
        waves = [decode(Path(row.audio).read_bytes()) for row in rows]
        ids, labels = [], []
        for row, wave in zip(rows, waves, strict=True):
            text = self.tokenizer.encode(normalize_text(row.text))
            target = [*text, self.tokenizer.end_id]
            speech = [AUDIO] * self.speech_tokens(len(wave))
            prompt = [*self.prefix, *speech, *self.suffix]
            ids.append(torch.tensor([*prompt, *target]))
            labels.append(torch.tensor([IGNORED] * len(prompt) + target))
        pad = nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad(ids, batch_first=True, padding_value=self.tokenizer.pad_id),
            "attention_mask": pad([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": pad(labels, batch_first=True, padding_value=IGNORED),
            "seconds": torch.tensor([len(wave) / RATE for wave in waves]),
            **self.features(waves),
        }

    def features(self, waves: list[Tensor]) -> dict[str, Tensor]:
        """The model's inputs made of the audio."""
        found = self.extractor(
            [wave.numpy() for wave in waves],
            sampling_rate=RATE, return_tensors="pt", padding=self.padding,
        )  # fmt: skip
        return {"input_features": found["input_features"]}

    def speech_tokens(self, samples: int) -> int:
        return speech_tokens(samples, self.stack)


class OwnCollator(SpeechCollator):
    """With the features of a recipe's encoder, padded to the batch's longest utterance."""

    def __init__(self, front_end: FrontEnd, encoder: Encoder, tokenizer: Tokenizer, stack: int):
        super().__init__(None, tokenizer, stack, longest=True)
        self.front_end, self.output_lengths = front_end, encoder.output_lengths

    def features(self, waves: list[Tensor]) -> dict[str, Tensor]:
        rows = [self.front_end.features(wave) for wave in waves]
        return {
            "input_features": nn.utils.rnn.pad_sequence(rows, batch_first=True),
            "feature_lengths": torch.tensor([len(row) for row in rows]),
        }

    def speech_tokens(self, samples: int) -> int:
        frames = self.output_lengths(torch.tensor(self.front_end.frames(samples)))
        return -(-int(frames) // self.stack)


class SpeechModel(nn.Module):
    """Encoder, projector and language model with the Trainer's interface."""

    def __init__(
        self, encoder: nn.Module, llm: nn.Module, adaptor: AdaptorConfig, options: PeerOptions
    ):
        super().__init__()
        width, out = self.width(encoder), llm.get_input_embeddings().weight.shape[1]
        hidden = adaptor.hidden or out
        self.encoder, self.llm, self.options, self.stack = encoder, llm, options, adaptor.stack
        self.projector = nn.Sequential(
            nn.Linear(adaptor.stack * width, hidden), nn.GELU(), nn.Linear(hidden, out)
        )
        if options.fused:
            FusedLmHead.replace(llm)

    @staticmethod
    def width(encoder: nn.Module) -> int:
        return encoder.config.d_model

    def freeze(self, trains: tuple[str, ...]) -> None:
        """Train these of encoder, adaptor and llm only. Whisper's positions are never trained."""
        parts = {"encoder": self.encoder, "adaptor": self.projector, "llm": self.llm}
        for name, part in parts.items():
            part.requires_grad_(name in trains)
        if hasattr(self.encoder, "embed_positions"):
            self.encoder.embed_positions.requires_grad_(False)

    def encode(self, features: Tensor, lengths_B: Tensor | None = None) -> Tensor:
        """Frames [B, S, E], without a graph where the encoder is frozen."""
        trains = any(p.requires_grad for p in self.encoder.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and trains):
            return self.frames(features, lengths_B)

    def frames(self, features_BFT: Tensor, lengths_B: Tensor | None) -> Tensor:
        if not self.options.longest:
            return self.encoder(features_BFT).last_hidden_state
        # The same without the check for 30 s.
        x = F.gelu(self.encoder.conv1(features_BFT))
        x = F.gelu(self.encoder.conv2(x)).transpose(1, 2)
        x = x + self.encoder.embed_positions.weight[: x.shape[1]]
        for layer in self.encoder.layers:
            x = layer(x, None)
        return self.encoder.layer_norm(x)

    def project(self, frames_BSE: Tensor, tokens_B: Tensor) -> Tensor:
        """The embeddings [N, D] of ``tokens_B`` stacks of each utterance."""
        if self.options.adaptor:
            first, second = self.projector[0], self.projector[2]
            weights = AdaptorWeights(
                first.weight, first.bias, second.weight, second.bias, self.stack
            )
            lengths_B = (tokens_B * self.stack).clamp_max(frames_BSE.shape[1])
            return dispatch.adaptor(frames_BSE, lengths_B, weights)[0]
        frames_BSE = F.pad(frames_BSE, (0, 0, 0, -frames_BSE.shape[1] % self.stack))
        speech_BAD = self.projector(frames_BSE.unflatten(1, (-1, self.stack)).flatten(2))
        return speech_BAD[torch.arange(speech_BAD.shape[1]) < tokens_B[:, None]]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        input_features: Tensor,
        labels: Tensor,
        feature_lengths: Tensor | None = None,
        **loss_options: Any,
    ) -> Any:
        embeds_BLD = self.llm.get_input_embeddings()(input_ids.clamp_min(0))
        frames_BSE = self.encode(input_features, feature_lengths)
        is_audio_BL = input_ids == AUDIO
        speech_ND = self.project(frames_BSE, is_audio_BL.sum(1))
        embeds_BLD = embeds_BLD.masked_scatter(is_audio_BL[..., None], speech_ND)
        if self.options.fused:
            return {"loss": self._fused_loss(embeds_BLD, attention_mask, labels, **loss_options)}
        return self.llm(
            inputs_embeds=embeds_BLD,
            attention_mask=attention_mask,
            labels=labels,
            use_cache=False,
            **loss_options,
        )

    def _fused_loss(
        self,
        embeds_BLD: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        hidden_BLD = self.llm.base_model(
            inputs_embeds=embeds_BLD, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state
        targets = labels[:, 1:] != IGNORED
        head = self.llm.get_output_embeddings()
        nll_N, *_ = head(hidden_BLD[:, :-1][targets], labels[:, 1:][targets])
        return nll_N.sum() / (len(nll_N) if num_items_in_batch is None else num_items_in_batch)


class OwnSpeechModel(SpeechModel):
    """With this project's encoder, which keeps padding out of the frames itself."""

    @staticmethod
    def width(encoder: nn.Module) -> int:
        return encoder.width

    def frames(self, features_BTF: Tensor, lengths_B: Tensor | None) -> Tensor:
        return self.encoder(features_BTF, lengths_B).frames_BSE


def load_model(encoder: str, llm: str, adaptor: AdaptorConfig, options: PeerOptions) -> SpeechModel:
    """A model of two Hugging Face folders, in float32."""
    whisper = WhisperModel.from_pretrained(encoder, dtype=torch.float32)
    return SpeechModel(whisper.encoder, load_llm(llm), adaptor, options)


def load_llm(folder: str) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False
    )


class _Clock(TrainerCallback):
    def __init__(self, throughput: Throughput):
        self.throughput = throughput

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = self.throughput.step()


class _SpeechTrainer(Trainer):
    def __init__(self, *args: Any, throughput: Throughput, lengths: list[int], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.throughput, self.lengths = throughput, lengths
        self.add_callback(_Clock(throughput))

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any) -> Tensor:
        self.throughput.add(inputs.pop("seconds").tolist())
        return super().training_step(model, inputs, *args)

    def _get_train_sampler(self, *args: Any) -> Any:
        if not self.lengths:
            return super()._get_train_sampler(*args)
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return LengthGroupedSampler(size, lengths=self.lengths)


def train(
    model: SpeechModel,
    rows: list[Any],
    collate: Callable[[list[Any]], dict[str, Tensor]],
    throughput: Throughput,
    folder: Path,
    batch: int,
    accumulate: int,
    workers: int,
    deepspeed: dict[str, Any],
) -> None:
    """Train until ``throughput`` has measured enough; ``rows``: entries of a manifest."""
    auto = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
            "gradient_clipping")  # fmt: skip
    settings = deepspeed | dict.fromkeys(auto, "auto") | {"zero_allow_untested_optimizer": True}
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        learning_rate=2e-5,
        lr_scheduler_type="linear",
        max_steps=10_000,
        max_grad_norm=1.0,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_num_workers=workers,
        dataloader_persistent_workers=workers > 0,
        dataloader_prefetch_factor=2 if workers else None,
        dataloader_pin_memory=False,
        use_cpu=True,
        seed=1,
        deepspeed=settings if model.options.deepspeed else None,
    )
    lengths = [round(100 * row.duration) for row in rows] if model.options.grouped else []
    trainer = _SpeechTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=collate,
        throughput=throughput,
        lengths=lengths,
    )
    trainer.train()
