"""Entropy allocation of one encoder on a probe set."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dsasr.analysis.probe_set import ProbeSet
from dsasr.analysis.probed_encoders import ProbedEncoder
from dsasr.data.audio.frontends import FrontEnd
from dsasr.data.text.tokenizers import Tokenizer
from dsasr.entropy_allocation import frame_labels, predictive_entropy
from dsasr.entropy_allocation.allocation_row import AllocationRow, CtcEntropy, LlmAllocation
from dsasr.entropy_allocation.cka import cka
from dsasr.entropy_allocation.nse import nse
from dsasr.entropy_allocation.pai_csai import VInformationConfig, csai, pai
from dsasr.evaluation.eval_sets import Recording, batch_recordings
from dsasr.model.outputs import add_sums
from dsasr.model.speech_llm import SpeechLLM
from dsasr.utils.distributed import device
from dsasr.utils.errors import UserError


@dataclass(frozen=True)
class Reference:
    """The encoder that CKA compares with: its name, and its features (key → [S, E])."""

    name: str
    features: dict[str, Tensor]


def measure(
    encoder: ProbedEncoder,
    probe_set: ProbeSet,
    config: VInformationConfig,
    reference: Reference | None = None,
) -> tuple[AllocationRow, dict[str, Tensor]]:
    """The encoder's row, and its features (key → [S, E] on the CPU).

    CKA is left out where the reference has other frames. Raises `UserError` where the features are
    not finite, or too few for a test part.
    """
    started = time.monotonic()
    recordings = probe_set.at_rate(encoder.rate)
    features = encoder.encode(recordings)
    x_NE = torch.cat(list(features.values()))
    name = encoder.source.name
    if not bool(x_NE.isfinite().all()):
        raise UserError(f"{name} gives frames that are not finite: leave it out")
    spectrum = nse(x_NE)
    frames = frame_labels.frame_set(
        probe_set.labels, features, encoder.frame_seconds, config.window
    ).to(device())
    try:
        estimates = {"pai": pai(frames, config), "csai": csai(frames, config)}
    except ValueError as error:
        raise UserError(f"{name}: {error}; give more utterances") from None
    comparison = {}
    if reference is not None and all(
        len(features[k]) == len(reference.features[k]) for k in features if k in reference.features
    ):
        reference_NE = torch.cat([reference.features[k] for k in features])
        comparison = {"cka_to_reference": cka(reference_NE, x_NE), "reference": reference.name}
    llm = None
    if encoder.llm is not None:
        llm = llm_allocation(encoder.llm, encoder.front_end, encoder.tokenizer, recordings)
    row = AllocationRow(
        encoder.source,
        nse=spectrum.nse,
        effective_rank=spectrum.effective_rank,
        **estimates,
        **comparison,
        ctc=None if encoder.ctc is None else _ctc_entropy(encoder.ctc, features),
        llm=llm,
        width=x_NE.shape[1],
        frames=spectrum.frames,
        utterances=len(recordings),
        probe_seconds=time.monotonic() - started,
    )
    return row, features


@torch.no_grad()
def _ctc_entropy(head: nn.Module, features: dict[str, Tensor]) -> CtcEntropy:
    sums = predictive_entropy.CtcEntropySums()
    for x_SE in features.values():
        lengths_B = torch.tensor([len(x_SE)])
        sums.update(head(x_SE[None].to(device()), lengths_B.to(device())).cpu(), lengths_B)
    return sums.value()


@torch.no_grad()
def llm_allocation(
    model: SpeechLLM, front_end: FrontEnd, tokenizer: Tokenizer, recordings: Sequence[Recording]
) -> LlmAllocation:
    """H₀, H₁ and predictive entropies over the transcripts' tokens, the end token included."""
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    for batch in batch_recordings(recordings, front_end=front_end, tokenizer=tokenizer):
        add_sums(sums, predictive_entropy.llm_sums(model, batch.to(device())))
    return predictive_entropy.llm_allocation(sums)
