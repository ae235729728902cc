"""CKA over ranks against one float64 computation; usage: drift_two.py OUT (ranks as started)."""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from dsasr.checkpoint.tensor_fragments import FragmentReader, write_folder
from dsasr.data.batch import Batch
from dsasr.engine import branch_engine
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


class Held:
    """What a monitor needs of a branch."""

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
    none, rows = torch.zeros(count, 0, dtype=torch.int64), torch.zeros(count, dtype=torch.int64)
    keys = tuple(f"utt/{number}-{i}" for i in range(count))
    texts = ("",) * count
    return Batch(
        *(features, lengths, none, rows, none, rows),
        *(keys, texts, texts, texts, texts, (1.0,) * count, number, 0, number, {}),
    )


def frames(module: nn.Module, batches: list[Batch], layer: int | None = None) -> torch.Tensor:
    """All valid frames in float64 [N, E], of the output or a layer, in one process."""
    rows = []
    for b in batches:
        if len(b):
            with torch.no_grad():
                out = module.encoder(b.features_BTF, b.feature_lengths_B, layers=layer is not None)
            held = out.frames_BSE if layer is None else out.layers[layer]
            rows += [x[:n] for x, n in zip(held, out.lengths_B, strict=True)]
    return torch.cat(rows).double()


def drifted(module: nn.Module, by: float) -> None:
    generator = torch.Generator().manual_seed(5)
    for parameter in module.parameters():
        parameter.data += by * torch.randn(parameter.shape, generator=generator)


def main() -> None:
    folder = Path(sys.argv[-1])
    branch_engine.init_distributed()
    # Uneven on purpose: the last rank has no utterance in its second batch.
    every = [batch(0, 3), batch(1, 2), batch(2, 4), batch(3, 0)]
    mine = every[distributed.rank() :: distributed.world_size()]
    config = DriftConfig(layers=True)
    monitor, held = DriftMonitor(config, mine), Held()
    before = frames(held.module, every)
    monitor.take_reference(held)
    found = {"same": monitor.measure(held).cka}
    layered = [frames(held.module, every, i) for i in range(2)]
    drifted(held.module, 0.05)
    moved = [frames(held.module, every, i) for i in range(2)]
    found["expected_layers"] = [cka(x, y) for x, y in zip(layered, moved, strict=True)]
    pairs = zip(layered, moved, strict=True)
    found["expected_unbiased_layers"] = [cka(x, y, unbiased=True) for x, y in pairs]
    after = frames(held.module, every)
    skip = len(frames(held.module, every[:1]))
    drift = monitor.measure(held)
    found |= {"cka": drift.cka, "expected": cka(before, after), "frames": drift.frames}
    found |= {"layers": list(drift.layers), "expected_frames": len(before)}
    # The reference survives a checkpoint.
    write_folder(folder / "saved", monitor.fragments(), {})
    again = DriftMonitor(config, mine)
    again.load(FragmentReader(folder / "saved"))
    found["again"] = again.measure(held).cka
    # Resumed with a probe set that ends a batch earlier or later: what both have seen is compared.
    fewer = DriftMonitor(config, [b for b in mine if b.keys[:1] != ("utt/0-0",)])
    fewer.load(FragmentReader(folder / "saved"))
    more = DriftMonitor(config, [*mine, batch(7 + distributed.rank(), 2)])
    more.load(FragmentReader(folder / "saved"))
    found["fewer"], found["more"] = fewer.measure(held).cka, more.measure(held).cka
    found["expected_fewer"] = cka(before[skip:], after[skip:])
    for name, probe in (("other", [batch(9, 2)]), ("none", [batch(3, 0)])):
        try:
            DriftMonitor(config, probe).load(FragmentReader(folder / "saved"))
        except UserError as error:
            found[name] = str(error)
    unbiased = DriftMonitor(DriftConfig(unbiased=True, layers=True), mine)
    clean = Held()
    unbiased.take_reference(clean)
    drift = unbiased.measure(held)
    found |= {"unbiased": drift.cka, "unbiased_layers": list(drift.layers)}
    found["expected_unbiased"] = cka(before, after, unbiased=True)
    # What a NaN in the encoder gives is no number, and no crash on any rank.
    held.module.encoder.reset_parameters(torch.Generator().manual_seed(1))
    next(held.module.parameters()).data.fill_(float("nan"))
    found["broken"] = repr(monitor.measure(held).cka)
    if distributed.is_main_rank():
        (folder / "found.json").write_text(json.dumps(found))
    distributed.end_process()


main()
