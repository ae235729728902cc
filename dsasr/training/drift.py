"""How far the live encoder has moved from its reference: CKA on a fixed set of probe utterances.

The reference is kept as its features, not as a second encoder. Features are kept by utterance, each
on the rank that computes it, so nothing is gathered: only CKA's sums travel.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from dsasr.checkpoint.tensor_fragments import Fragment, FragmentReader, PrefixReader
from dsasr.data.batch import Batch
from dsasr.engine.branch_engine import BranchEngine
from dsasr.entropy_allocation.cka import LayerCka
from dsasr.model.speech_llm import placeholder
from dsasr.stages import DriftConfig
from dsasr.utils import distributed
from dsasr.utils.errors import UserError

PREFIX = "drift/"


@dataclass(frozen=True)
class Drift:
    """One measurement: CKA of the encoder's output (and layers) to the reference, and its cost."""

    cka: float
    layers: tuple[float, ...]
    frames: int
    seconds: float


class DriftMonitor:
    """Measures a branch's encoder against the reference; every call is collective.

    Raises `UserError` on all ranks when no rank has a probe utterance.
    """

    def __init__(self, config: DriftConfig, probe: Sequence[Batch]):
        self.config = config
        self.probe = list(probe)
        if not distributed.any_rank(any(len(batch) for batch in self.probe)):
            raise UserError(
                "drift: data.valid gave no utterance to measure on: see bad_samples.jsonl for why"
            )
        self._reference: dict[str, list[Tensor]] = {}
        self.seconds = 0.0

    @property
    def has_reference(self) -> bool:
        return distributed.any_rank(bool(self._reference))

    def take_reference(self, branch: BranchEngine) -> None:
        """Make the branch's present encoder the reference."""
        started = time.monotonic()
        self._reference = self._features(branch)
        self.seconds += time.monotonic() - started

    def measure(self, branch: BranchEngine) -> Drift:
        """CKA between the branch's present encoder and the reference, over what both have seen.

        After a resume with another world size the probe set may end a batch earlier or later.
        """
        started = time.monotonic()
        features = self._features(branch)
        widths = distributed.all_gather_object(
            [x.shape[1] for x in next(iter(features.values()), [])]
        )
        # On the device: sums travel by its backend, and there the products are fast.
        sums = LayerCka(next(w for w in widths if w), device=distributed.device())
        for key, layers in features.items():  # in the probe set's order: sums are not associative
            if key in self._reference:
                sums.update(layers, self._reference[key])
        sums.reduce(distributed.all_reduce_sum)
        values = sums.values(unbiased=self.config.unbiased)
        seconds = time.monotonic() - started
        self.seconds += seconds
        return Drift(values[-1], tuple(values[:-1]), sums.layers[-1].frames, seconds)

    def _features(self, branch: BranchEngine) -> dict[str, list[Tensor]]:
        """Key → valid frames [S, E] (fp32, CPU): layers' if asked for, the output's last."""
        found: dict[str, list[Tensor]] = {}
        with branch.evaluating() as module:
            for batch in self.probe:
                # A rank without an utterance of its own must still make the collective calls.
                real = batch if len(batch) else placeholder(batch, module.encoder.cfg.mels, 0)
                moved = real.to(distributed.device())
                out = module.encoder(
                    moved.features_BTF, moved.feature_lengths_B, layers=self.config.layers
                )
                for i, key in enumerate(batch.keys):
                    length = int(out.lengths_B[i])
                    kept = [*out.layers, out.frames_BSE] if self.config.layers else [out.frames_BSE]
                    found[key] = [x[i, :length].float().cpu() for x in kept]
        return found

    def fragments(self) -> dict[str, Fragment]:
        """The reference's features, for the checkpoint."""
        return {
            f"{PREFIX}{key}/{i}": Fragment(tuple(x.shape), 0, x.reshape(-1))
            for key, layers in self._reference.items()
            for i, x in enumerate(layers)
        }

    def load(self, reader: FragmentReader) -> None:
        """Restore the reference for this rank's probe utterances, whatever rank had them.

        Raises `UserError` on all ranks when it holds none of any rank's.
        """
        below, counts = PrefixReader(reader, PREFIX), Counter()
        for name in below.shapes:
            counts[name.rpartition("/")[0]] += 1
        self._reference = {
            key: [below.whole(f"{key}/{i}") for i in range(counts[key])]
            for batch in self.probe
            for key in batch.keys
            if counts[key]
        }
        if not self.has_reference:
            raise UserError(
                f"{reader.folder}: drift was measured on other utterances than data.valid holds "
                "now: give back the validation set, or start anew in another run folder"
            )
