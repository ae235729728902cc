"""Entropy allocation while a run trains: now and then a look at the branch that just stepped.

A look shows the probe set to the branch and measures what is cheap: NSE and effective rank of the
encoder's frames, predictive entropies, H₀ − H₁; in a stage that trains the encoder, CKA to its
frames before the stage's first step. Every so many looks the probes are fitted too (PAI, CSAI), on
rank 0, with one fold of speakers held out. Looks change nothing of the run: no random number is
drawn and no weight is touched.

``budget`` is the share of the training time that looks may take. Looks within a stage may use half
of it, the look at a stage's end (before and after joint training) all of it; what does not fit is
left out and counted (``looks_left_out``). What CKA is measured from is always taken, and counts.
The share that was taken stands in every line.

PAI and CSAI need labels. They come from the CTC head of the pretrain branch at that branch's last
look with probes, and the sft branch uses the same ones: a run without a pretrain branch has none,
and early ones are rough. For numbers to compare, measure afterwards with ``tools/allocation.py``.
"""

from __future__ import annotations

import functools
import json
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from dsasr.build import Builder
from dsasr.data.batch import Batch
from dsasr.data.text.phonemes import EspeakPhonemizer, StoredPhonemes, build_phonemizer
from dsasr.engine.branch_engine import BranchEngine
from dsasr.engine.step_report import StepReport
from dsasr.entropy_allocation import forced_alignment, frame_labels
from dsasr.entropy_allocation.cka import cka
from dsasr.entropy_allocation.frame_labels import Labeled, Numbering
from dsasr.entropy_allocation.nse import nse
from dsasr.entropy_allocation.predictive_entropy import Allocation
from dsasr.entropy_allocation.v_information import VInformationConfig, csai, pai
from dsasr.model.speech_llm import placeholder
from dsasr.recipe import OnlineProbeConfig
from dsasr.stages import StageConfig
from dsasr.tracking.monitor import Monitor
from dsasr.utils import distributed
from dsasr.utils.errors import UserError
from dsasr.utils.io import atomic_write


class OnlineProbe:
    """Looks at branches; every call is collective. What it keeps lies in ``folder``."""

    def __init__(self, config: OnlineProbeConfig, build: Builder, monitor: Monitor, folder: Path):
        self.config, self.build, self.monitor, self.folder = config, build, monitor, folder
        self._probe: dict[str, list[Batch]] = {}
        held: dict[str, Any] = {}
        if config.every and distributed.is_main_rank() and (folder / "state.json").is_file():
            held = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        self.seconds: float = held.get("seconds", 0.0)
        self.left_out: int = held.get("left_out", 0)
        self.looks: dict[str, int] = held.get("looks", {})
        self.costs: dict[str, float] = held.get("costs", {})
        self.labels = [_label_from(row) for row in held.get("labels", [])]

    def begin(self, branch: BranchEngine, step: int) -> float:
        """Before ``step`` of the branch's stage: keep the frames that CKA is measured from.

        They are the encoder's as a stage that trains it finds it, after any swap; of other steps
        and stages there are none. Taken again, they are the same. Returns the seconds that it took.
        """
        if not self.config.every or step or "encoder" not in branch.stage.trains:
            return 0.0
        started = time.monotonic()
        own: dict[str, Tensor] = {}
        with branch.evaluating() as module:
            for batch in self._batches(branch.name):
                own |= _frames(_encoded(module, batch), batch)
        kept = {
            k: x.contiguous()
            for part in distributed.all_gather_object(own)
            for k, x in part.items()
        }
        if distributed.is_main_rank():
            self.folder.mkdir(parents=True, exist_ok=True)
            atomic_write(self._start_file(branch.stage.name), save(kept))
        cost = time.monotonic() - started
        self.seconds += cost
        self._save()
        return cost

    def look_if_due(
        self, branch: BranchEngine, report: StepReport, steps: int, trained: float
    ) -> None:
        """Look at ``branch`` after ``report``'s step if it is time; ``trained``: seconds so far."""
        if not self.config.every:
            return
        stage = branch.stage
        last = report.step + 1 == stage.steps
        if not last and (report.step + 1) % self.config.every:
            return
        count = self.looks.get(branch.name, 0)
        probing = bool(self.config.probes) and (last or (count + 1) % self.config.probes == 0)
        wanted = "probes" if probing else "cheap"
        decided = distributed.broadcast(self._fits(branch.name, wanted, last, trained))
        if decided is None:
            self.left_out += 1
            self._save()
            return
        started = time.monotonic()
        values = self._look(branch, decided == "probes")
        cost = time.monotonic() - started
        self.seconds += cost
        self.costs[f"{branch.name}/{decided}"] = cost
        self.looks[branch.name] = count + 1
        self._save()
        values |= {
            "allocation_seconds": cost,
            "allocation_share": self.seconds / (self.seconds + trained),
            "looks_left_out": float(self.left_out),
        }
        head = {"steps": steps, "branch": branch.name, "stage": f"allocation_{stage.name}"}
        self.monitor.scalars(head, values)

    def _fits(self, branch: str, wanted: str, last: bool, trained: float) -> str | None:
        """What the budget still allows, by what such a look took the last time."""
        share = self.config.budget * (1.0 if last else 0.5)
        for kind in dict.fromkeys((wanted, "cheap")):
            known = self.costs.get(f"{branch}/cheap", self.costs.get(f"{branch}/probes", 0.0))
            spent = self.seconds + self.costs.get(f"{branch}/{kind}", known)
            if spent <= share * (spent + trained):
                return kind
        return None

    # -- looking -----------------------------------------------------------------------------

    def _look(self, branch: BranchEngine, probing: bool) -> dict[str, float]:
        own: dict[str, Tensor] = {}
        spoken: list[dict[str, Any]] = []
        sums: dict[str, tuple[Tensor, Tensor]] = {}
        with branch.evaluating() as module:
            for batch in self._batches(branch.name):
                out = _encoded(module, batch)
                posteriors = module.ctc(out.frames_BSE) if branch.name == "pretrain" else None
                own |= _frames(out, batch)
                if probing and posteriors is not None:
                    for i in range(len(batch)):
                        spoken += self._place(batch, i, posteriors[i, : int(out.lengths_B[i])])
                moved = batch.to(distributed.device())
                for name, found in _losses(module, moved, branch.name):
                    old = sums.get(name, (0.0, 0.0))
                    sums[name] = (old[0] + found[0], old[1] + found[1])
        values = _means(sums)
        gathered = distributed.all_gather_object(own)
        placed = [row for part in distributed.all_gather_object(spoken) for row in part]
        if not distributed.is_main_rank():
            return values
        features = {k: x for part in gathered for k, x in sorted(part.items())}
        return values | self._measure(branch.stage, features, placed, probing)

    def _measure(
        self,
        stage: StageConfig,
        features: dict[str, Tensor],
        placed: list[dict[str, Any]],
        probing: bool,
    ) -> dict[str, float]:
        """What frames tell; what is not finite is left out."""
        every_NE = torch.cat(list(features.values())) if features else torch.zeros(0, 1)
        if not len(every_NE) or not bool(every_NE.isfinite().all()):
            return {}  # a broken encoder is the loss's matter to tell
        spectrum = nse(every_NE)
        values = {"nse": spectrum.nse, "effective_rank": spectrum.effective_rank}
        before = self._start(stage)
        # With another world size the probe set may end a batch earlier or later.
        shared = [k for k in features if k in before]
        if shared:
            both = (torch.cat([held[k] for k in shared]) for held in (before, features))
            values["cka_to_stage_start"] = cka(*both)
        if placed:
            self.labels = self._number(placed)
        held = [x for x in self.labels if x.key in features]
        if probing and len(held) >= 3:
            values |= self._probes(held, features)
        return {name: value for name, value in values.items() if math.isfinite(value)}

    def _probes(self, held: list[Labeled], features: dict[str, Tensor]) -> dict[str, float]:
        seconds = self.build.frame_seconds
        frames = frame_labels.frame_set(held, features, seconds).to(distributed.device())
        most = self.config.frames
        accessible = VInformationConfig(
            max_frames=most, semantic_frames=most, folds=1, control=False, draws=200, spikes=()
        )
        values = {}
        for name, measure in (("pai", pai), ("csai", csai)):
            try:
                found = measure(frames, accessible)
            except (UserError, ValueError):
                continue  # too few frames or speakers to hold any out
            values |= {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
            values |= {f"{name}_share": found.share, f"{name}_found": float(found.found)}
        return values

    def _start(self, stage: StageConfig) -> dict[str, Tensor]:
        """The frames that `begin` kept; none in a stage that does not train the encoder, or whose
        first step was made without looks."""
        path = self._start_file(stage.name)
        if "encoder" not in stage.trains or not path.is_file():
            return {}
        return load_file(path)

    def _start_file(self, stage: str) -> Path:
        return self.folder / f"start-{quote(stage, safe='')}.safetensors"

    def _batches(self, branch: str) -> list[Batch]:
        if branch not in self._probe:
            self._probe[branch] = self.build.held_out(branch, self.config.utterances)
        return self._probe[branch]

    # -- labels ------------------------------------------------------------------------------

    @functools.cached_property
    def _speaker(self):
        """What speaks single words; made once, for a lexicon takes seconds to read."""
        phonemizer = build_phonemizer(self.build.recipe.data.phonemizer)
        return EspeakPhonemizer() if isinstance(phonemizer, StoredPhonemes) else phonemizer

    def _place(self, batch: Batch, i: int, log_probs_SP: Tensor) -> list[dict[str, Any]]:
        """Utterance ``i``'s phonemes on its frames, as plain data; nothing if they do not fit."""
        ids = batch.phonemes_BP[i, : int(batch.phoneme_lengths_B[i])].tolist()
        try:
            placed = forced_alignment.align(log_probs_SP, ids)
        except ValueError:
            return []
        symbols = self.build.phonemes.decode(ids)
        owners = frame_labels.word_owners(symbols, batch.texts[i], batch.langs[i], self._speaker)
        row = {"key": batch.keys[i], "speaker": batch.speakers[i], "text": batch.texts[i]}
        return [row | {"phonemes": ids, "owners": owners, "positions": placed.positions_S.tolist()}]

    def _number(self, placed: list[dict[str, Any]]) -> list[Labeled]:
        number, seconds = Numbering(), self.build.frame_seconds
        found = []
        for row in sorted(placed, key=lambda row: row["key"]):
            positions_S = torch.tensor(row["positions"], dtype=torch.int64)
            held = forced_alignment.Alignment(positions_S, positions_S, 0.0)
            words = forced_alignment.words_of(row["text"])
            given = row["key"], row["speaker"], words, row["phonemes"], row["owners"]
            found.append(frame_labels.label(*given, held, number, seconds))
        return found

    def _save(self) -> None:
        if not distributed.is_main_rank():
            return
        state = {"seconds": self.seconds, "left_out": self.left_out, "looks": self.looks}
        state |= {"costs": self.costs, "labels": [_label_row(x) for x in self.labels]}
        self.folder.mkdir(parents=True, exist_ok=True)
        atomic_write(self.folder / "state.json", json.dumps(state))


def _encoded(module, batch: Batch):
    """The encoder's output. A rank without an utterance of its own shows a placeholder, for it must
    still make the collective calls."""
    pad_id = getattr(module, "pad_id", 0)
    real = batch if len(batch) else placeholder(batch, module.encoder.cfg.mels, pad_id)
    moved = real.to(distributed.device())
    return module.encoder(moved.features_BTF, moved.feature_lengths_B)


def _frames(out, batch: Batch) -> dict[str, Tensor]:
    """Key → valid frames [S, E], fp32 on the CPU."""
    lengths = out.lengths_B.tolist()
    return {k: out.frames_BSE[i, : lengths[i]].float().cpu() for i, k in enumerate(batch.keys)}


def _losses(module, batch: Batch, branch: str):
    """(name, (sum, count)) of the branch's entropies on a batch."""
    if branch == "pretrain":
        found = module(batch).sums
        return [("ctc", found["ctc"]), ("ctc_entropy", found["ctc_entropy"])]
    with_audio, without = module(batch).sums, module(batch, audio=False).sums
    return [
        ("nll_with_audio", with_audio["nll"]),
        ("nll_without_audio", without["nll"]),
        ("llm_entropy", with_audio["entropy"]),
        ("llm_entropy_without_audio", without["entropy"]),
    ]


def _means(sums: dict[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Means over all ranks, of what there was anything of; collective."""
    flat = torch.tensor([[float(a), float(b)] for a, b in sums.values()], dtype=torch.float64)
    summed = distributed.all_reduce_sum(flat.to(distributed.device())).tolist()
    counts = dict(zip(sums, summed, strict=True))
    means = {n: a / b for n, (a, b) in counts.items() if b}
    if "nll_with_audio" in means:
        tokens = int(counts["nll_with_audio"][1])
        found = Allocation(means["nll_without_audio"], means["nll_with_audio"], tokens)
        means["resolved"] = found.resolved
    return means


def _label_row(held: Labeled) -> dict[str, Any]:
    row = asdict(held)
    return row | {"positions_S": held.positions_S.tolist(), "words_S": held.words_S.tolist()}


def _label_from(row: dict[str, Any]) -> Labeled:
    tensors = {k: torch.tensor(row[k], dtype=torch.int64) for k in ("positions_S", "words_S")}
    return Labeled(**{**row, **tensors, "phonemes": tuple(row["phonemes"])})
