"""The pretrain branch's model: encoder and phoneme CTC head, trained with CTC or CR-CTC."""

from __future__ import annotations

from dataclasses import dataclass, field

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
    greedy_phonemes,
    phoneme_errors,
    posterior_entropy,
)
from dsasr.model.dynamic_chunks import ChunkConfig, draw_chunk
from dsasr.model.encoders.protocol import Encoder
from dsasr.model.outputs import Outputs
from dsasr.model.step_rng import seed_dropout, step_generator
from dsasr.utils import ranges
from dsasr.utils.ranges import NonNegativeFloat


@dataclass(frozen=True)
class CtcModelConfig:
    """``consistency`` weighs CR-CTC's term (the paper: 0.2); 0 is plain CTC, one view, half the
    time. ``chunks`` None is full context, ``spec`` None no SpecAugment."""

    # weight of CR-CTC's consistency term (0.2 in the paper); 0: plain CTC, one view, half the time
    consistency: NonNegativeFloat = 0.2
    # SpecAugment; null: none
    spec: SpecAugmentConfig | None = field(default_factory=SpecAugmentConfig)
    # dynamic chunks; null: full context
    chunks: ChunkConfig | None = field(default_factory=ChunkConfig)
    head: CtcHeadConfig = field(default_factory=CtcHeadConfig)  # between encoder and units

    def __post_init__(self) -> None:
        ranges.check(self)


class CtcModel(nn.Module):
    """Encoder and CTC head; ``phonemes`` is the size of the vocabulary, blank included."""

    def __init__(self, encoder: Encoder, phonemes: int, cfg: CtcModelConfig):
        super().__init__()
        self.encoder = encoder
        self.ctc = CtcHead(encoder.width, phonemes, cfg.head)
        self.cfg = cfg
        self._lora_dropouts = lora.Dropouts(encoder)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights anew; the same generator state gives the same weights."""
        self.encoder.reset_parameters(generator)
        self.ctc.reset_parameters(generator)

    def forward(self, batch: Batch) -> Outputs:
        """CTC in training mode with its augmentation and chunks, else plain and full context.

        loss, per phoneme: with views a, b of each utterance, (CTC(a) + CTC(b)) / 2 + consistency
        · ½ Σ_frames [KL(sg(b)‖a) + KL(sg(a)‖b)].

        sums: "ctc" (nats per phoneme), "consistency" (nats per frame), "ctc_entropy" (nats per
        frame), "ctc_infeasible" (share of utterances with too few frames, left out of the loss);
        in eval mode also "phoneme_errors" (share of greedy decoding's edits).

        A batch without utterances runs every part once, for its collectives, and weighs nothing.
        A frozen encoder runs in eval mode and without a graph. In training, seeds torch's global
        generators from the batch (see `seed_dropout`).
        """
        weight = 1.0 if len(batch) else 0.0
        batch = batch.or_silence(self.encoder.bins)
        views_XTF, chunk = [batch.features_BTF], None
        self._lora_dropouts.train(self.training)
        if self.training:
            seed_dropout(batch)
            views_XTF = self._views(batch)
            if self.cfg.chunks is not None:
                chunk = draw_chunk(self.cfg.chunks, step_generator(batch, "chunk"))
        views = len(views_XTF)
        trainable = any(p.requires_grad for p in self.encoder.parameters())
        if self.training and self.encoder.training != trainable:
            self.encoder.train(trainable)
        with torch.set_grad_enabled(torch.is_grad_enabled() and trainable):
            output = self.encoder(
                torch.cat(views_XTF) if views > 1 else views_XTF[0],
                batch.feature_lengths_B.repeat(views),
                chunk,
            )
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
        phonemes = ctc.phonemes.clamp_min(1)
        loss = ctc.nll_B.sum() / phonemes
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
            # ctc.phonemes counts both views, consistency_B has one value for both.
            loss = loss + self.cfg.consistency * consistency_B.sum() / (phonemes / 2)
            sums["consistency"] = (consistency_B.sum(), frames // 2)
        if not self.training:
            hypotheses = greedy_phonemes(log_probs, output.lengths_B)
            edits, total = phoneme_errors(hypotheses, batch.phonemes_BP, batch.phoneme_lengths_B)
            sums["phoneme_errors"] = (loss.new_tensor(edits), loss.new_tensor(total))
        return Outputs(
            loss=loss * weight,
            sums={
                name: (total.detach().double() * weight, count.detach().double() * weight)
                for name, (total, count) in sums.items()
            },
        )

    def _views(self, batch: Batch) -> list[Tensor]:
        """One or two differently masked copies of the features."""
        if self.cfg.spec is None:
            # CR-CTC without SpecAugment: the views differ by dropout alone.
            return [batch.features_BTF] * (2 if self.cfg.consistency else 1)
        generator = step_generator(batch, "spec")
        return [
            spec_augment(batch.features_BTF, batch.feature_lengths_B, self.cfg.spec, generator)
            for _ in range(2 if self.cfg.consistency else 1)
        ]
