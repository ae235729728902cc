"""CKA reduced over the ranks, against one float64 computation; usage: drift_two.py OUT."""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from dsasr.checkpoint.tensor_fragments import FragmentReader, write_folder
from dsasr.data.batch import Batch
from dsasr.engine import process_setup
from dsasr.entropy_allocation.cka import cka
from dsasr.model.encoders.conformer import Encoder, EncoderConfig
from dsasr.stages import DriftConfig
from dsasr.training.drift import DriftMonitor
from dsasr.utils import distributed
from dsasr.utils.errors import UserError


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        small = {"width": 12, "layers": 2, "heads": 2, "ffn": 16, "kernel": 5}
        self.encoder = Encoder(EncoderConfig(**small, subsample_channels=4))
        self.encoder.reset_parameters(torch.Generator().manual_seed(0))


class Branch:
    """The part of `BranchEngine` that a drift monitor uses."""

    def __init__(self):
        self.module = Model().eval()

    @contextmanager
    def evaluating(self):
        with torch.no_grad():
            yield self.module


def batch(number: int, count: int) -> Batch:
    generator = torch.Generator().manual_seed(number)
    lengths = torch.randint(20, 60, (count,), generator=generator)
    frames = int(lengths.max()) if count else 0
    features = torch.randn(count, frames, 80, generator=generator)
    keys = tuple(f"utt/{number}-{i}" for i in range(count))
    return Batch.blank(features, feature_lengths_B=lengths, keys=keys, seed=number, number=number)


def frames(module: nn.Module, batches: list[Batch], layer: int | None = None) -> torch.Tensor:
    """All valid frames in float64 [N, E], of the output or a layer, in one process."""
    rows = []
    for b in batches:
        if len(b):
            with torch.no_grad():
                out = module.encoder(b.features_BTF, b.feature_lengths_B, layers=layer is not None)
            frames_BSE = out.frames_BSE if layer is None else out.layers[layer]
            rows += [x[:n] for x, n in zip(frames_BSE, out.lengths_B, strict=True)]
    return torch.cat(rows).double()


def add_noise(module: nn.Module, scale: float) -> None:
    generator = torch.Generator().manual_seed(5)
    for parameter in module.parameters():
        parameter.data += scale * torch.randn(parameter.shape, generator=generator)


def main() -> None:
    folder = Path(sys.argv[-1])
    process_setup.init_distributed()
    # Uneven on purpose: the last rank has no utterance in its second batch.
    batches = [batch(0, 3), batch(1, 2), batch(2, 4), batch(3, 0)]
    own_batches = batches[distributed.rank() :: distributed.world_size()]
    config = DriftConfig(layers=True)
    monitor, branch = DriftMonitor(config, own_batches), Branch()
    before = frames(branch.module, batches)
    monitor.take_reference(branch)
    results = {"same": monitor.measure(branch).cka}
    layers_before = [frames(branch.module, batches, i) for i in range(2)]
    add_noise(branch.module, 0.05)
    layers_after = [frames(branch.module, batches, i) for i in range(2)]
    pairs = list(zip(layers_before, layers_after, strict=True))
    results["expected_layers"] = [cka(x, y) for x, y in pairs]
    results["expected_unbiased_layers"] = [cka(x, y, unbiased=True) for x, y in pairs]
    after = frames(branch.module, batches)
    first_frames = len(frames(branch.module, batches[:1]))
    drift = monitor.measure(branch)
    results |= {"cka": drift.cka, "expected": cka(before, after), "frames": drift.frames}
    results |= {"layers": list(drift.layers), "expected_frames": len(before)}
    # The reference survives a checkpoint.
    write_folder(folder / "saved", monitor.fragments(), {})
    resumed = DriftMonitor(config, own_batches)
    resumed.load(FragmentReader(folder / "saved"))
    results["resumed"] = resumed.measure(branch).cka
    # Resumed with a probe set that ends a batch earlier or later: common utterances are compared.
    smaller = DriftMonitor(config, [b for b in own_batches if b.keys[:1] != ("utt/0-0",)])
    smaller.load(FragmentReader(folder / "saved"))
    larger = DriftMonitor(config, [*own_batches, batch(7 + distributed.rank(), 2)])
    larger.load(FragmentReader(folder / "saved"))
    results["smaller"] = smaller.measure(branch).cka
    results["larger"] = larger.measure(branch).cka
    results["expected_smaller"] = cka(before[first_frames:], after[first_frames:])
    for name, probe_batches in (("unknown", [batch(9, 2)]), ("empty", [batch(3, 0)])):
        try:
            DriftMonitor(config, probe_batches).load(FragmentReader(folder / "saved"))
        except UserError as error:
            results[name] = str(error)
    unbiased = DriftMonitor(DriftConfig(unbiased=True, layers=True), own_batches)
    unbiased.take_reference(Branch())
    drift = unbiased.measure(branch)
    results |= {"unbiased": drift.cka, "unbiased_layers": list(drift.layers)}
    results["expected_unbiased"] = cka(before, after, unbiased=True)
    # A NaN in the encoder gives a NaN, and no rank raises.
    branch.module.encoder.reset_parameters(torch.Generator().manual_seed(1))
    next(branch.module.parameters()).data.fill_(float("nan"))
    results["nan"] = repr(monitor.measure(branch).cka)
    if distributed.is_main_rank():
        (folder / "results.json").write_text(json.dumps(results))
    distributed.end_process()


main()
