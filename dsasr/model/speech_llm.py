"""Encoder, adaptor and language model in one: [prefix | speech | suffix | transcript | end].

The loss is on the transcript's tokens and the end token. Sequences are laid out by index
(`dsasr.model.sequence_layout`): adaptor output is never padded, and logits exist at targets only,
inside the fused kernel. Packed rows and rows of one utterance give the same loss.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from dsasr.data.audio.augment import SpecAugmentConfig, spec_augment
from dsasr.data.batch import Batch, upload
from dsasr.data.text.prompt import PromptIds, find_language
from dsasr.data.text.speller import Speller
from dsasr.model import activation_checkpointing, lora
from dsasr.model.adaptors.protocol import Adaptor
from dsasr.model.ctc import CtcHead
from dsasr.model.dynamic_chunks import Chunk, ChunkConfig, draw_chunk
from dsasr.model.encoders.protocol import Encoder, EncoderOutput, silence_shape, stacked_frames
from dsasr.model.llm import FusedLmHead, LlmConfig
from dsasr.model.llm_forward import packed_hidden
from dsasr.model.outputs import Outputs
from dsasr.model.sequence_layout import Layout, lay_out, ragged
from dsasr.model.step_rng import seed_dropout, step_generator
from dsasr.model.token_embeddings import input_scale
from dsasr.utils.errors import UserError


class SpeechInput(NamedTuple):
    """Adaptor input [B, S, E] and its lengths (on the CPU); with a CTC head also its
    log-probabilities."""

    frames_BSE: Tensor
    lengths_B: Tensor
    log_probs_BSP: Tensor | None = None
    log_prob_lengths_B: Tensor | None = None


class Prompts(NamedTuple):
    """[prefix | speech | suffix], padded on the left, with lengths_B; and the speech in it."""

    embeds_BLD: Tensor
    lengths_B: Tensor
    speech: SpeechInput


class SpeechLLM(nn.Module):
    """A speech recognizer around a Hugging Face causal LM.

    In training mode too, a part without a trainable parameter runs in eval mode (no dropout), and a
    frozen encoder without a graph. LoRA matrices belong to the model that they adapt, but for their
    own dropout, which is off where they are frozen.

    - encoder: None for a model that reads text-only batches and nothing else
    - spec: SpecAugment in training; None: none
    - chunks: dynamic chunks in training; None: full context
    - ctc: the encoder's CTC head. An adaptor of kind ctc reads its posteriors; with any adaptor it
      can score transcripts (`attach_ctc_head`)
    - speller: from transcripts to the head's units
    - cached: decode from the language model's cache (`LlmProperties.caches`)
    - hinted: language tag → the prompt that names the language, for the utterances whose
      `Batch.hints` has the tag

    Raises `UserError` if a prompt is empty: something must predict the first token.
    """

    def __init__(
        self,
        encoder: Encoder | None,
        adaptor: Adaptor,
        llm: PreTrainedModel,
        prefix_ids: Sequence[int],
        suffix_ids: Sequence[int],
        pad_id: int,
        cfg: LlmConfig,
        spec: SpecAugmentConfig | None = None,
        chunks: ChunkConfig | None = None,
        ctc: CtcHead | None = None,
        speller: Speller | None = None,
        cached: bool = True,
        hinted: Mapping[str, PromptIds] | None = None,
    ):
        super().__init__()
        self.plain = PromptIds(tuple(prefix_ids), tuple(suffix_ids))
        self.hinted = dict(hinted or {})
        if not all(p.prefix or p.suffix for p in (self.plain, *self.hinted.values())):
            raise UserError("the prompt has no token: the template needs at least one")
        self.encoder, self.ctc, self.adaptor, self.llm = encoder, ctc, adaptor, llm
        self.pad_id = pad_id
        self.cfg, self.spec, self.chunks, self.speller = cfg, spec, chunks, speller
        self.cached = cached
        FusedLmHead.replace(llm)
        self._input_scale = input_scale(llm)
        # Of a learned table of positions there are no more.
        most = getattr(llm.config.get_text_config(), "max_position_embeddings", None)
        self.max_positions = most or sys.maxsize
        self._lora_dropouts = [lora.Dropouts(part) for part in filter(None, (encoder, llm))]
        if cfg.activation_checkpointing:
            activation_checkpointing.enable(llm, keep=cfg.recompute == "cheap")

    def attach_ctc_head(self, ctc: CtcHead, speller: Speller) -> None:
        """Score transcripts with the encoder's CTC head (`dsasr.evaluation.ctc_scoring`).

        An adaptor that does not read the head stays without it.
        """
        self.ctc, self.speller = ctc, speller

    def hint(self, lang: str) -> str:
        """What `Batch.hints` has for speech in ``lang``: the tag of the prompt that names it.

        "" where ``lang`` is empty, and of a model whose prompts name no language. Raises
        `UserError` for a language that the training did not name.
        """
        if not lang or not self.hinted:
            return ""
        tag = find_language(lang, self.hinted)
        if not tag:
            raise UserError(
                f"the model was not trained with {lang[:80]!r} in its prompt: give one of "
                f"{', '.join(sorted(self.hinted))}, or no language"
            )
        return tag

    def prompt_of(self, hint: str) -> PromptIds:
        """The prompt of an utterance, by its `Batch.hints`."""
        return self.hinted[hint] if hint else self.plain

    def _prompts_of(self, batch: Batch) -> list[PromptIds]:
        return [self.prompt_of(hint) for hint in batch.hints or ("",) * len(batch)]

    @property
    def head(self) -> FusedLmHead:
        return self.llm.get_output_embeddings()

    def count_targets(self, batch: Batch) -> int:
        """Tokens that the loss of ``batch`` is summed over, counted on the host."""
        return int(batch.host.token_lengths_B.sum())

    def forward(self, batch: Batch, audio: bool = True) -> Outputs:
        """The NLL of the transcript's tokens and the end token, in nats.

        sums: "nll", "entropy" (of the prediction, nats) and "accuracy" (of greedy prediction), per
        target. ``audio=False`` leaves the speech out of the sequence: the language model alone. A
        batch without utterances runs every part once, for its collectives, and weighs nothing.

        In training, seeds torch's global generators from the batch (see `seed_dropout`).
        """
        weight = 1.0 if len(batch) else 0.0
        silence = (16, 0) if self.encoder is None else silence_shape(self.encoder)
        batch = batch.or_silence(silence, self.pad_id)
        # From the host: a copy from the GPU would wait for all that is queued there.
        token_lengths_B = batch.host.token_lengths_B.cpu()
        self._set_modes()
        if self.training:
            seed_dropout(batch)
        speech, prompts = self._speech(batch) if audio else None, self._prompts_of(batch)
        if speech is not None:
            speech = self._fitted(speech, prompts, token_lengths_B)
        layout = lay_out(
            torch.zeros_like(token_lengths_B) if speech is None else self._speech_tokens(speech),
            token_lengths_B,
            *_sizes(prompts),
            self._pack,
        )
        device = batch.tokens_BU.device
        row_starts_B = torch.arange(len(batch)) * batch.tokens_BU.shape[1]
        flat = batch.tokens_BU.flatten()
        inputs = flat[upload(ragged(row_starts_B, token_lengths_B - 1), device)]
        targets_N = flat[upload(ragged(row_starts_B, token_lengths_B), device)]
        embeds_RLD = self._splice(layout, prompts, speech, inputs)
        if torch.is_grad_enabled() and not embeds_RLD.requires_grad and _trainable(self.llm):
            # LoRA alone trains. DeepSpeed 0.19 releases the weights of a layer whose input needs
            # no gradient before its backward pass has used them.
            embeds_RLD.requires_grad_()
        positions = upload(layout.positions_RL, device) if self._pack else None
        hidden_RLD = packed_hidden(self.llm, embeds_RLD, positions)
        hidden_ND = hidden_RLD.flatten(0, 1).index_select(0, upload(layout.targets_N, device))
        return self._outputs(hidden_ND, targets_N, weight)

    def encode(self, batch: Batch, chunk: Chunk | None = None) -> EncoderOutput:
        """The encoder's frames, without a graph where it is frozen."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and _trainable(self.encoder)):
            return self.encoder(batch.features_BTF, batch.feature_lengths_B, chunk)

    @torch.no_grad()
    def prompts(self, batch: Batch, chunk: Chunk | None = None) -> Prompts:
        """The batch's prompts as embeddings."""
        self._set_modes()
        output = self.encode(batch, chunk)
        speech = self._read(output, batch)
        if self.ctc is not None and speech.log_probs_BSP is None:
            lengths_B = speech.lengths_B
            log_probs_BSP = self.ctc(output.frames_BSE, output.lengths_B)
            speech = speech._replace(log_probs_BSP=log_probs_BSP, log_prob_lengths_B=lengths_B)
        prompts = self._prompts_of(batch)
        speech = self._fitted(speech, prompts, self.max_positions // 4)
        speech_B = self._speech_tokens(speech)
        layout = lay_out(speech_B, torch.zeros_like(speech_B), *_sizes(prompts), left_pad=True)
        no_ids = batch.tokens_BU.new_empty(0)
        lengths_B = layout.lengths_B.to(no_ids.device)
        return Prompts(self._splice(layout, prompts, speech, no_ids), lengths_B, speech)

    @property
    def _pack(self) -> int:
        if self.cfg.pack and self.cfg.attn.startswith("flash"):
            return 1 << 62  # variable-length attention has no use for rows
        return self.cfg.pack

    def _set_modes(self) -> None:
        """Eval mode for frozen parts, the whole model's mode for the others."""
        for part in filter(None, (self.encoder, self.ctc, self.adaptor, self.llm)):
            training = self.training and _trainable(part)
            if part.training == training:
                continue
            part.train(training)
            if part is self.llm and self.training and self.cfg.activation_checkpointing:
                # Gradients still pass through it. Its layers recompute only in training mode; the
                # dropouts inside them stay in eval mode.
                for layer in part.modules():
                    if isinstance(layer, GradientCheckpointingLayer):
                        layer.training = True
        for dropouts in self._lora_dropouts:
            dropouts.train(self.training)

    def _fitted(
        self, speech: SpeechInput, prompts: Sequence[PromptIds], text_B: Tensor | int
    ) -> SpeechInput:
        """``speech`` without the units that the language model has no positions for.

        A CTC head that knows little yet writes a unit for every frame. ``text_B``: tokens of the
        transcripts to leave room for. Of other adaptors nothing is cut: the preflight compares.
        """
        if not self.adaptor.cfg.reads_ctc:
            return speech
        prefixes, suffixes = _sizes(prompts)
        room_B = (self.max_positions - prefixes - suffixes - text_B).clamp_min(1)
        return speech._replace(lengths_B=speech.lengths_B.minimum(room_B))

    def _speech_tokens(self, speech: SpeechInput) -> Tensor:
        return self.adaptor.output_lengths(speech.lengths_B)

    def _speech(self, batch: Batch) -> SpeechInput:
        """What the adaptor reads of a batch, in training with its augmentation and chunks."""
        if batch.text_only:
            return self._read_units(batch)
        chunk, augmented = None, batch
        if self.training:
            if self.spec is not None:
                features_BTF = spec_augment(
                    batch.features_BTF,
                    batch.feature_lengths_B,
                    self.spec,
                    step_generator(batch, "spec"),
                    stacked_frames(self.encoder),
                )
                augmented = dataclasses.replace(batch, features_BTF=features_BTF)
            if self.chunks is not None:
                chunk = draw_chunk(self.chunks, step_generator(batch, "chunk"))
        return self._read(self.encode(augmented, chunk), batch)

    def _read(self, output: EncoderOutput, batch: Batch) -> SpeechInput:
        """The encoder's frames, or of an adaptor that reads CTC what the head makes of them."""
        lengths_B = self.encoder.output_lengths(batch.host.feature_lengths_B.cpu())
        if not self.adaptor.cfg.reads_ctc:
            return SpeechInput(output.frames_BSE, lengths_B)
        with torch.set_grad_enabled(
            torch.is_grad_enabled() and (_trainable(self.ctc) or output.frames_BSE.requires_grad)
        ):
            log_probs_BSP = self.ctc(output.frames_BSE, output.lengths_B)
        inputs_BKX, units_B = self.adaptor.read(log_probs_BSP, output.frames_BSE, lengths_B)
        return SpeechInput(inputs_BKX, units_B, log_probs_BSP, lengths_B)

    def _read_units(self, batch: Batch) -> SpeechInput:
        """Adaptor input of a text-only batch: its labels as one-hot CTC posteriors (the loader may
        already have added errors)."""
        if not self.adaptor.cfg.reads_ctc:
            raise ValueError("text-only batches need an adaptor that reads CTC")
        lengths_B = batch.host.phoneme_lengths_B.cpu()
        inputs, tokens_B = self.adaptor.read_units(batch.phonemes_BP, lengths_B)
        if self.training and any(map(_trainable, filter(None, (self.encoder, self.ctc)))):
            # Every trainable part must have a gradient, or ZeRO's ranks wait for one another.
            silence = batch.blank(inputs.new_zeros(1, *silence_shape(self.encoder)))
            unused = self._read(self.encode(silence), silence).frames_BSE
            inputs = inputs + 0.0 * unused.sum()
        return SpeechInput(inputs, tokens_B)

    def embed_tokens(self, ids: Tensor) -> Tensor:
        """Token ids of any shape → embeddings [..., D] that the language model takes as inputs."""
        embeds = self.llm.get_input_embeddings()(ids)
        return embeds if self._input_scale == 1.0 else embeds * self._input_scale

    def _splice(
        self,
        layout: Layout,
        prompts: Sequence[PromptIds],
        speech: SpeechInput | None,
        token_ids: Tensor,
    ) -> Tensor:
        """Token and speech embeddings at their positions, zeros elsewhere: [R, L, D]."""
        device = token_ids.device
        sides = [*(p.prefix for p in prompts), *(p.suffix for p in prompts)]
        prompt_ids = torch.tensor([*itertools.chain(*sides)], dtype=torch.int64)
        ids = torch.cat((upload(prompt_ids, device), token_ids))
        text_MD = self.embed_tokens(ids)
        embeds = text_MD.new_zeros(layout.rows * layout.length, text_MD.shape[1])
        embeds = embeds.index_copy(0, upload(layout.text_M, device), text_MD)
        if speech is not None:
            embeds, _ = self.adaptor(
                speech.frames_BSE,
                speech.lengths_B,
                out_LD=embeds,
                index_N=upload(layout.speech_N, device),
            )
        return embeds.view(layout.rows, layout.length, -1)

    def _outputs(self, hidden_ND: Tensor, targets_N: Tensor, weight: float) -> Outputs:
        nll_N, entropy_N, correct_N = self.head(hidden_ND, targets_N)
        count = nll_N.new_full((), targets_N.numel() * weight, dtype=torch.float64)
        named = {"nll": nll_N, "entropy": entropy_N, "accuracy": correct_N}
        sums = {
            name: (values.detach().sum(dtype=torch.float64) * weight, count)
            for name, values in named.items()
        }
        return Outputs(nll_N.sum() * weight, count, sums)


def _sizes(prompts: Sequence[PromptIds]) -> tuple[Tensor, Tensor]:
    """Tokens before and after the speech, each [B]."""
    return (
        torch.tensor([len(p.prefix) for p in prompts]),
        torch.tensor([len(p.suffix) for p in prompts]),
    )


def _trainable(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
