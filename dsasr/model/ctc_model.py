"""The pretrain branch's model: encoder and phoneme CTC head, trained with CTC or CR-CTC.

CR-CTC is the paper's (arXiv 2410.05101), with its larger amount of time masking (2.5 times as many
masks, and so 2.5 times the frames), and icefall's linear rise of the consistency's weight
(k2-fsa/icefall#2075): early on the posteriors have nothing to be consistent about.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated

import torch
from torch import Tensor, nn

from dsasr.data.audio.augment import SpecAugmentConfig, spec_augment
from dsasr.data.batch import Batch
from dsasr.model import lora
from dsasr.model.ctc import (
    CtcHead,
    CtcHeadConfig,
    consistency_loss,
    ctc_loss,
    feasible,
    greedy_phonemes,
    phoneme_errors,
    posterior_entropy,
)
from dsasr.model.dynamic_chunks import Chunk, ChunkConfig, draw_chunk
from dsasr.model.encoders.protocol import Encoder, EncoderOutput, silence_shape, stacked_frames
from dsasr.model.outputs import Outputs
from dsasr.model.step_rng import seed_dropout, step_generator
from dsasr.utils import ranges
from dsasr.utils.ranges import NonNegativeFloat, NonNegativeInt, Range


@dataclass(frozen=True)
class CtcModelConfig:
    """``consistency`` weighs CR-CTC's term (the paper: 0.2); 0 is plain CTC, one view, half the
    time. ``chunks`` None is full context, ``spec`` None no SpecAugment."""

    # weight of CR-CTC's consistency term (0.2 in the paper); 0: plain CTC, one view, half the time
    consistency: NonNegativeFloat = 0.2
    # steps of a stage over which that weight rises from 0 (icefall: 2000, by its pull request
    # 2075); null: the stage's warmup_steps. CR-CTC alone
    consistency_warmup: NonNegativeInt | None = None
    # CR-CTC's time masks, as a multiple of spec.time_masks (2.5 in the paper). CR-CTC alone
    time_mask_ratio: Annotated[float, Range(0, 100)] = 2.5
    # SpecAugment; null: none
    spec: SpecAugmentConfig | None = field(default_factory=SpecAugmentConfig)
    # dynamic chunks; null: full context
    chunks: ChunkConfig | None = field(default_factory=ChunkConfig)
    head: CtcHeadConfig = field(default_factory=CtcHeadConfig)  # between encoder and CTC labels

    def __post_init__(self) -> None:
        ranges.check(self)


class CtcModel(nn.Module):
    """Encoder and CTC head; ``phonemes`` is the size of the vocabulary, blank included."""

    def __init__(self, encoder: Encoder, phonemes: int, cfg: CtcModelConfig):
        super().__init__()
        self.encoder = encoder
        self.ctc = CtcHead(encoder.width, phonemes, cfg.head)
        self.cfg = cfg
        # Share of `consistency` that counts; whoever takes steps sets it (`BranchEngine.step`).
        self.consistency_share = 1.0
        self._lora_dropouts = lora.Dropouts(encoder)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights anew; the same generator state gives the same weights."""
        self.encoder.reset_parameters(generator)
        self.ctc.reset_parameters(generator)

    def count_targets(self, batch: Batch) -> int:
        """Phonemes that the loss of ``batch`` is summed over, counted on the host."""
        host = batch.host
        lengths_B = self.encoder.output_lengths(host.feature_lengths_B)
        feasible_B = feasible(lengths_B, host.phonemes_BP, host.phoneme_lengths_B)
        return int((host.phoneme_lengths_B * feasible_B).sum())

    def forward(self, batch: Batch) -> Outputs:
        """CTC in training mode with its augmentation and chunks, else plain and full context.

        loss, summed over utterances with views a, b: (CTC(a) + CTC(b)) / 2 + consistency
        · consistency_share · ½ Σ_frames [KL(sg(b)‖a) + KL(sg(a)‖b)]. Its targets are phonemes.

        sums: "ctc" (nats per phoneme), "consistency" (nats per frame), "ctc_entropy" (nats per
        frame), "ctc_infeasible" (share of utterances with too few frames, left out of the loss);
        in eval mode also "phoneme_errors" (share of greedy decoding's edits).

        A batch without utterances runs every part once, for its collectives, and weighs nothing.
        A frozen encoder runs in eval mode and without a graph. In training, seeds torch's global
        generators from the batch (see `seed_dropout`).
        """
        weight = 1.0 if len(batch) else 0.0
        batch = batch.or_silence(silence_shape(self.encoder))
        views_XTF, chunk = [batch.features_BTF], None
        self._lora_dropouts.train(self.training)
        if self.training:
            seed_dropout(batch)
            views_XTF = self._views(batch)
            if self.cfg.chunks is not None:
                chunk = draw_chunk(self.cfg.chunks, step_generator(batch, "chunk"))
        views = len(views_XTF)
        output = self._encode(views_XTF, batch.feature_lengths_B, chunk)
        log_probs = self.ctc(output.frames_BSE, output.lengths_B)
        host = batch.host
        host_lengths = self.encoder.output_lengths(host.feature_lengths_B), host.phoneme_lengths_B
        ctc = ctc_loss(
            log_probs,
            output.lengths_B,
            batch.phonemes_BP.repeat(views, 1),
            batch.phoneme_lengths_B.repeat(views),
            host_lengths=tuple(lengths_B.repeat(views) for lengths_B in host_lengths),
        )
        loss_sum = ctc.nll_B.sum() / views
        frames = output.lengths_B.sum()
        utterances = torch.full_like(frames, len(ctc.nll_B))
        sums = {
            "ctc": (ctc.nll_B.sum(), ctc.phonemes),
            "ctc_entropy": (posterior_entropy(log_probs, output.lengths_B), frames),
            "ctc_infeasible": ((~ctc.feasible_B).sum(), utterances),
        }
        if views > 1:
            first, second = log_probs.chunk(2)
            consistency_B = consistency_loss(first, second, output.lengths_B[: len(batch)])
            # consistency_B has one value for both views.
            weight_now = self.cfg.consistency * self.consistency_share
            loss_sum = loss_sum + weight_now * consistency_B.sum()
            sums["consistency"] = (consistency_B.sum(), frames // 2)
        if not self.training:
            hypotheses = greedy_phonemes(log_probs, output.lengths_B)
            edits, total = phoneme_errors(hypotheses, batch.phonemes_BP, batch.phoneme_lengths_B)
            sums["phoneme_errors"] = (loss_sum.new_tensor(edits), loss_sum.new_tensor(total))
        return Outputs(
            loss_sum=loss_sum * weight,
            targets=ctc.phonemes / views * weight,
            sums={
                name: (total.detach().double() * weight, count.detach().double() * weight)
                for name, (total, count) in sums.items()
            },
        )

    def _encode(
        self, views_XTF: list[Tensor], lengths_B: Tensor, chunk: Chunk | None
    ) -> EncoderOutput:
        """The encoder's frames of all views as one batch; a frozen encoder in eval mode."""
        views = len(views_XTF)
        trainable = any(p.requires_grad for p in self.encoder.parameters())
        if self.training and self.encoder.training != trainable:
            self.encoder.train(trainable)
        with torch.set_grad_enabled(torch.is_grad_enabled() and trainable):
            features_XTF = torch.cat(views_XTF) if views > 1 else views_XTF[0]
            return self.encoder(features_XTF, lengths_B.repeat(views), chunk)

    def warm_up(self, step: int, stage_warmup: int) -> None:
        """Set the consistency's share at a step of a stage: step / warm-up, at most 1."""
        warmup = self.cfg.consistency_warmup
        warmup = stage_warmup if warmup is None else warmup
        self.consistency_share = min(step / warmup, 1.0) if warmup else 1.0

    def _views(self, batch: Batch) -> list[Tensor]:
        """One copy of the features, or CR-CTC's two, differently masked."""
        views, spec = 2 if self.cfg.consistency else 1, self.cfg.spec
        if spec is None:
            # CR-CTC without SpecAugment: the views differ by dropout alone.
            return [batch.features_BTF] * views
        if views > 1:
            spec = replace(spec, time_masks=int(self.cfg.time_mask_ratio * spec.time_masks))
        generator, stack = step_generator(batch, "spec"), stacked_frames(self.encoder)
        return [
            spec_augment(batch.features_BTF, batch.feature_lengths_B, spec, generator, stack)
            for _ in range(views)
        ]
