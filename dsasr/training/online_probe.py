"""Entropy allocation during training: probe evaluations of the branch that just stepped.

A probe evaluation runs the probe set through the branch and measures what is cheap: NSE and
effective rank of the encoder's frames, predictive entropies, H₀ − H₁; in a stage that trains the
encoder, CKA to its frames before the stage's first step. Every ``probe.probes``-th evaluation also
fits the probes (PAI, CSAI), on rank 0, with one test part of speakers. Evaluations change nothing
of the run: they draw no random number and touch no weight.

``budget`` is the share of the training time that evaluations may take. Those within a stage may use
half of it, the one at a stage's end (before and after joint training) all of it; one that does not
fit is left out and counted (``probes_left_out``). The reference frames of CKA are always taken, and
count. The share used so far is in every line (``probe_time_share``).

PAI and CSAI need labels. They come from the CTC head of the pretrain branch at that branch's last
evaluation with probes, and the sft branch uses the same ones: a run without a pretrain branch has
none, and early ones are rough. For comparable numbers, measure checkpoints with ``dsasr probe``.
"""

from __future__ import annotations

import functools
import json
import math
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from dsasr.build import Builder
from dsasr.data.batch import Batch
from dsasr.engine.branch_engine import BranchEngine
from dsasr.entropy_allocation import frame_labels, predictive_entropy
from dsasr.entropy_allocation.allocation_row import (
    AllocationRow,
    CtcEntropy,
    EncoderSource,
    Estimate,
)
from dsasr.entropy_allocation.cka import cka
from dsasr.entropy_allocation.frame_labels import AlignedUtterance, UtteranceLabels
from dsasr.entropy_allocation.nse import nse
from dsasr.entropy_allocation.pai_csai import VInformationConfig, csai, pai
from dsasr.model.encoders.protocol import silence_shape
from dsasr.model.outputs import add_sums
from dsasr.recipe import OnlineProbeConfig
from dsasr.stages import StageConfig
from dsasr.tracking.monitor import Monitor
from dsasr.utils import distributed
from dsasr.utils.errors import UserError
from dsasr.utils.io import atomic_write

Sums = dict[str, tuple[Tensor, Tensor]]  # name → (sum, count)


@dataclass
class _Outputs:
    """A rank's share of the probe set: features (key → [S, E] on the CPU), alignments, sums."""

    features: dict[str, Tensor] = field(default_factory=dict)
    aligned: list[AlignedUtterance] = field(default_factory=list)
    sums: Sums = field(default_factory=dict)


class OnlineProbe:
    """Evaluates branches on the probe set; every call is collective. Its state is in ``folder``."""

    def __init__(self, config: OnlineProbeConfig, builder: Builder, monitor: Monitor, folder: Path):
        self.config, self.builder, self.monitor, self.folder = config, builder, monitor, folder
        self._probe_batches: dict[str, list[Batch]] = {}
        state: dict[str, Any] = {}
        if config.every and distributed.is_main_rank() and (folder / "state.json").is_file():
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        self.seconds: float = state.get("seconds", 0.0)
        self.left_out: int = state.get("left_out", 0)
        self.evaluations: dict[str, int] = state.get("evaluations", {})  # by branch
        self.costs: dict[str, float] = state.get("costs", {})  # by branch and kind, of the last one
        self.labels = [UtteranceLabels.from_json(row) for row in state.get("labels", [])]

    def take_reference(self, branch: BranchEngine, step: int) -> float:
        """Before the first ``step`` of a stage that trains the encoder: store its frames for CKA.

        They are the encoder's after any swap at the stage's start. Other steps and stages store
        nothing; repeated, the result is the same. Returns the seconds taken.
        """
        if not self.config.every or step or not branch.stage.trains_encoder:
            return 0.0
        started = time.monotonic()
        features: dict[str, Tensor] = {}
        with branch.evaluating() as module:
            for batch in self._batches(branch.name):
                features |= _frames(_encode(module, batch), batch)
        gathered = distributed.all_gather_object(features)
        if distributed.is_main_rank():
            self.folder.mkdir(parents=True, exist_ok=True)
            tensors = {k: x.contiguous() for part in gathered for k, x in part.items()}
            atomic_write(self._reference_file(branch.stage.name), save(tensors))
        cost = time.monotonic() - started
        self.seconds += cost
        self._save()
        return cost

    def comes_after(self, stage: StageConfig, step: int) -> bool:
        """Whether an evaluation is planned after ``step`` of ``stage``."""
        every = self.config.every
        return bool(every) and (step + 1 == stage.steps or (step + 1) % every == 0)

    def evaluate(self, branch: BranchEngine, step: int, steps: int, trained: float) -> None:
        """Evaluate ``branch`` after ``step`` of its stage, where the budget allows it.

        ``steps``: those of the run; ``trained``: the training time so far in seconds.
        """
        last = step + 1 == branch.stage.steps
        count = self.evaluations.get(branch.name, 0)
        due = bool(self.config.probes) and (last or (count + 1) % self.config.probes == 0)
        kind = self._affordable(branch.name, "probes" if due else "cheap", last, trained)
        kind = distributed.broadcast(kind)
        if kind is None:
            self.left_out += 1
            self._save()
            return
        started = time.monotonic()
        row, losses = self._evaluate(branch, steps, kind == "probes")
        row = replace(row, probe_seconds=time.monotonic() - started)
        self.seconds += row.probe_seconds
        self.costs[f"{branch.name}/{kind}"] = row.probe_seconds
        self.evaluations[branch.name] = count + 1
        self._save()
        values = row.scalars() | losses
        values |= {
            "probe_time_share": self.seconds / (self.seconds + trained),
            "probes_left_out": float(self.left_out),
        }
        if row.pai is not None:
            values["probe_utterances"] = float(row.pai.utterances)
        head = {"steps": steps, "branch": branch.name, "stage": f"allocation_{branch.stage.name}"}
        self.monitor.scalars(head, values)

    def _affordable(self, branch: str, due: str, last: bool, trained: float) -> str | None:
        """The kind of evaluation that fits the budget, by the cost of the last one of its kind."""
        share = self.config.budget * (1.0 if last else 0.5)
        for kind in dict.fromkeys((due, "cheap")):
            known = self.costs.get(f"{branch}/cheap", self.costs.get(f"{branch}/probes", 0.0))
            spent = self.seconds + self.costs.get(f"{branch}/{kind}", known)
            if spent <= share * (spent + trained):
                return kind
        return None

    # -- evaluation --------------------------------------------------------------------------

    def _evaluate(
        self, branch: BranchEngine, steps: int, with_probes: bool
    ) -> tuple[AllocationRow, dict[str, float]]:
        """The branch's row, whole on rank 0 only, and its CTC loss on the probe set."""
        outputs = self._run(branch, with_probes)
        sums = _sum_over_ranks(outputs.sums)
        gathered = distributed.all_gather_object(outputs.features)
        aligned = [u for part in distributed.all_gather_object(outputs.aligned) for u in part]
        source = EncoderSource(
            f"{branch.name}/{branch.stage.name}", "live", branch=branch.name,
            stage=branch.stage.name, steps=steps,
        )  # fmt: skip
        row = AllocationRow(source)
        if branch.name == "sft" and sums:
            row = replace(row, llm=predictive_entropy.llm_allocation(sums))
        elif sums:
            row = replace(row, ctc=CtcEntropy(_mean(sums["ctc_entropy"])))
        losses = {"ctc": _mean(sums["ctc"])} if sums.get("ctc", (0.0, 0.0))[1] else {}
        if distributed.is_main_rank():
            features = {k: x for part in gathered for k, x in sorted(part.items())}
            row = self._measure(row, branch.stage, features, aligned, with_probes)
        return row, losses

    def _run(self, branch: BranchEngine, with_probes: bool) -> _Outputs:
        """This rank's probe batches through the branch."""
        outputs = _Outputs()
        with branch.evaluating() as module:
            for batch in self._batches(branch.name):
                encoded = _encode(module, batch)
                # On every rank, also without an utterance: the head's weights are gathered.
                posteriors = (
                    module.ctc(encoded.frames_BSE, encoded.lengths_B)
                    if branch.name == "pretrain"
                    else None
                )
                outputs.features |= _frames(encoded, batch)
                if with_probes and posteriors is not None:
                    for i in range(len(batch)):
                        log_probs_SP = posteriors[i, : int(encoded.lengths_B[i])]
                        outputs.aligned += self._align(batch, i, log_probs_SP)
                on_device = batch.to(distributed.device())
                add_sums(outputs.sums, _branch_sums(module, on_device, branch.name))
        return outputs

    def _measure(
        self,
        row: AllocationRow,
        stage: StageConfig,
        features: dict[str, Tensor],
        aligned: list[AlignedUtterance],
        with_probes: bool,
    ) -> AllocationRow:
        """``row`` with the measures of the encoder's frames."""
        x_NE = torch.cat(list(features.values())) if features else torch.zeros(0, 1)
        if not len(x_NE) or not bool(x_NE.isfinite().all()):
            return row  # the trainer stops at a loss that is not finite
        spectrum = nse(x_NE)
        row = replace(
            row, nse=spectrum.nse, effective_rank=spectrum.effective_rank, width=x_NE.shape[1],
            frames=spectrum.frames, utterances=len(features),
        )  # fmt: skip
        reference = self._reference(stage)
        # With another world size the probe set may end a batch earlier or later.
        shared = [k for k in features if k in reference]
        if shared:
            pair = (torch.cat([part[k] for k in shared]) for part in (reference, features))
            row = replace(row, cka_to_reference=cka(*pair), reference="stage start")
        if aligned:
            in_order = sorted(aligned, key=lambda u: u.key)
            self.labels = frame_labels.number_words(in_order, self.builder.frame_seconds)
        labels = [u for u in self.labels if u.key in features]
        if with_probes and len(labels) >= 3:
            row = replace(row, **self._fit_probes(labels, features))
        return row

    def _fit_probes(
        self, labels: list[UtteranceLabels], features: dict[str, Tensor]
    ) -> dict[str, Estimate]:
        seconds = self.builder.frame_seconds
        frames = frame_labels.frame_set(labels, features, seconds).to(distributed.device())
        limit = self.config.frames
        config = VInformationConfig(
            max_frames=limit, semantic_frames=limit, folds=1, control=False, draws=200,
            planted_shares=(),
        )  # fmt: skip
        estimates = {}
        for name, estimate in (("pai", pai), ("csai", csai)):
            try:
                estimates[name] = estimate(frames, config)
            except (UserError, ValueError):
                continue  # too few frames or speakers for a test part
        return estimates

    def _reference(self, stage: StageConfig) -> dict[str, Tensor]:
        """The frames of `take_reference`; none in a stage that does not train the encoder, or whose
        first step was made without online probes."""
        path = self._reference_file(stage.name)
        if not stage.trains_encoder or not path.is_file():
            return {}
        return load_file(path)

    def _reference_file(self, stage: str) -> Path:
        return self.folder / f"start-{quote(stage, safe='')}.safetensors"

    def _batches(self, branch: str) -> list[Batch]:
        if branch not in self._probe_batches:
            batches = self.builder.validation_batches(branch, self.config.utterances)
            self._probe_batches[branch] = batches
        return self._probe_batches[branch]

    @functools.cached_property
    def _word_phonemizer(self):
        """Built once, for a lexicon takes seconds to read."""
        return frame_labels.word_phonemizer(self.builder.phonemizer)

    def _align(self, batch: Batch, i: int, log_probs_SP: Tensor) -> list[AlignedUtterance]:
        """Utterance ``i`` aligned; nothing if its phonemes do not fit on its frames."""
        ids = batch.phonemes_BP[i, : int(batch.phoneme_lengths_B[i])].tolist()
        utterance = batch.keys[i], batch.speakers[i], batch.texts[i], batch.langs[i], ids
        try:
            return [
                frame_labels.align_utterance(
                    *utterance, log_probs_SP, self.builder.phonemes, self._word_phonemizer
                )
            ]
        except ValueError:
            return []

    def _save(self) -> None:
        if not distributed.is_main_rank():
            return
        state = {
            "seconds": self.seconds,
            "left_out": self.left_out,
            "evaluations": self.evaluations,
            "costs": self.costs,
            "labels": [u.to_json() for u in self.labels],
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        atomic_write(self.folder / "state.json", json.dumps(state))


def _encode(module, batch: Batch):
    """The encoder's output; collective, also for a rank whose batch has no utterance."""
    nonempty = batch.or_silence(silence_shape(module.encoder)).to(distributed.device())
    return module.encoder(nonempty.features_BTF, nonempty.feature_lengths_B)


def _frames(encoded, batch: Batch) -> dict[str, Tensor]:
    """Key → valid frames [S, E], fp32 on the CPU."""
    lengths = encoded.lengths_B.tolist()
    return {k: encoded.frames_BSE[i, : lengths[i]].float().cpu() for i, k in enumerate(batch.keys)}


def _branch_sums(module, batch: Batch, branch: str) -> Sums:
    """The branch's entropies on a batch."""
    if branch == "pretrain":
        sums = module(batch).sums
        return {"ctc": sums["ctc"], "ctc_entropy": sums["ctc_entropy"]}
    return predictive_entropy.llm_sums(module, batch)


def _sum_over_ranks(sums: Sums) -> dict[str, tuple[float, float]]:
    """(sum, count) over all ranks; collective."""
    pairs = torch.tensor([[float(a), float(b)] for a, b in sums.values()], dtype=torch.float64)
    summed = distributed.all_reduce_sum(pairs.to(distributed.device())).tolist()
    return dict(zip(sums, map(tuple, summed), strict=True))


def _mean(pair: tuple[float, float]) -> float:
    return pair[0] / pair[1] if pair[1] else math.nan
