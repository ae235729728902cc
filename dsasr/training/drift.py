"""Encoder drift: CKA of the live encoder to its reference on probe utterances, and its trigger.

The reference is stored as its features, not as a second encoder. Each rank keeps the features of
its own probe utterances, so that only CKA's sums are reduced over the ranks.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from dsasr.checkpoint.tensor_fragments import Fragment, FragmentReader, PrefixReader
from dsasr.data.batch import Batch
from dsasr.engine.branch_engine import BranchEngine
from dsasr.entropy_allocation.cka import LayerCka
from dsasr.model.encoders.protocol import silence_shape
from dsasr.stages import DriftConfig
from dsasr.utils import distributed
from dsasr.utils.errors import UserError

PREFIX = "drift/"


@dataclass(frozen=True)
class DriftTrigger:
    """Whether a drift publishes the encoder: CKA to the reference falls below ``threshold``."""

    threshold: float

    def fires(self, cka: float) -> bool:
        """Raises ValueError for a NaN, which comes of an encoder whose features are not finite."""
        if math.isnan(cka):
            raise ValueError("CKA is not a number: the encoder's features are not finite")
        return cka < self.threshold


@dataclass(frozen=True)
class Drift:
    """One measurement: CKA of the encoder's output, and of its layers, to the reference."""

    cka: float
    layers: tuple[float, ...]
    frames: int
    seconds: float  # that the measurement took


class DriftMonitor:
    """Measures a branch's encoder against the reference; every method is collective.

    ``probe_batches``: this rank's batches of probe utterances. Raises `UserError` on all ranks when
    no rank has an utterance.
    """

    def __init__(self, config: DriftConfig, probe_batches: Sequence[Batch]):
        self.config = config
        self.probe_batches = list(probe_batches)
        if not distributed.any_rank(any(len(batch) for batch in self.probe_batches)):
            raise UserError(
                "drift: data.valid gave no utterance to measure on: see bad_samples.jsonl for why"
            )
        self._reference: dict[str, list[Tensor]] = {}
        self.seconds = 0.0  # spent on references and measurements

    @property
    def has_reference(self) -> bool:
        return distributed.any_rank(bool(self._reference))

    def take_reference(self, branch: BranchEngine) -> None:
        """Make the branch's current encoder the reference."""
        started = time.monotonic()
        self._reference = self._features(branch)
        self.seconds += time.monotonic() - started

    def measure(self, branch: BranchEngine) -> Drift:
        """CKA between the branch's current encoder and the reference, over their common utterances.

        After a resume with another world size the probe set may end a batch earlier or later.
        """
        started = time.monotonic()
        features = self._features(branch)
        widths = distributed.all_gather_object(
            [x.shape[1] for x in next(iter(features.values()), [])]
        )
        # On the device, for its backend reduces the sums and its matrix products are fast.
        sums = LayerCka(next(w for w in widths if w), device=distributed.device())
        for key, layers in features.items():  # in one order: float sums are not associative
            if key in self._reference:
                sums.update(layers, self._reference[key])
        sums.reduce(distributed.all_reduce_sum)
        values = sums.values(unbiased=self.config.unbiased)
        seconds = time.monotonic() - started
        self.seconds += seconds
        return Drift(values[-1], tuple(values[:-1]), sums.layers[-1].frames, seconds)

    def _features(self, branch: BranchEngine) -> dict[str, list[Tensor]]:
        """Key → valid frames [S, E] (fp32, CPU): of the layers if configured, the output's last."""
        features: dict[str, list[Tensor]] = {}
        with branch.evaluating() as module:
            for batch in self.probe_batches:
                # A rank without an utterance must still make the collective calls.
                inputs = batch.or_silence(silence_shape(module.encoder)).to(distributed.device())
                out = module.encoder(
                    inputs.features_BTF, inputs.feature_lengths_B, layers=self.config.layers
                )
                layers = [*out.layers, out.frames_BSE] if self.config.layers else [out.frames_BSE]
                for i, key in enumerate(batch.keys):
                    length = int(out.lengths_B[i])
                    features[key] = [x_BSE[i, :length].float().cpu() for x_BSE in layers]
        return features

    def fragments(self) -> dict[str, Fragment]:
        """The reference's features, for the checkpoint."""
        return {
            f"{PREFIX}{key}/{i}": Fragment(tuple(x.shape), 0, x.reshape(-1))
            for key, layers in self._reference.items()
            for i, x in enumerate(layers)
        }

    def load(self, reader: FragmentReader) -> None:
        """Restore the reference of this rank's probe utterances, whichever rank saved them.

        Raises `UserError` on all ranks when it has none of any rank's utterances.
        """
        below, counts = PrefixReader(reader, PREFIX), Counter()
        for name in below.shapes:
            counts[name.rpartition("/")[0]] += 1
        self._reference = {
            key: [below.whole(f"{key}/{i}") for i in range(counts[key])]
            for batch in self.probe_batches
            for key in batch.keys
            if counts[key]
        }
        if not self.has_reference:
            raise UserError(
                f"{reader.folder}: drift was measured on other utterances than data.valid has "
                "now: restore the validation set, or start a new run in another run folder"
            )
