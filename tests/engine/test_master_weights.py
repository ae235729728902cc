"""Masters and moments when an engine, an encoder or a process is replaced, on one rank, with as
much of DeepSpeed's ZeRO-1 optimizer as they ask for."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dsasr.checkpoint import tensor_fragments
from dsasr.checkpoint.tensor_fragments import FragmentReader, PrefixReader
from dsasr.checkpoint.zero_partition import tensors
from dsasr.engine.master_weights import MasterWeights
from dsasr.engine.offload import OffloadConfig, StateOffloader


class Zero:
    """One group; ``cut``: it holds from there on of each parameter."""

    def __init__(self, parameters: Iterable[nn.Parameter], cut: int = 0):
        self.bit16_groups = [list(parameters)]
        pieces, at = [], 0
        for p in self.bit16_groups[0]:
            pieces.append(p.data.float().reshape(-1)[cut:])
            low = SimpleNamespace(start=cut, numel=len(pieces[-1]))
            high = SimpleNamespace(start=at)
            p._hp_mapping = SimpleNamespace(lp_fragment_address=low, hp_fragment_address=high)
            at += low.numel
        self.flat = torch.cat(pieces)
        self.single_partition_of_fp32_groups = [self.flat]
        self.optimizer = torch.optim.AdamW([self.flat])

    def step(self) -> None:
        self.flat.grad = torch.randn_like(self.flat)
        self.optimizer.step()


def model(dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    return nn.ModuleDict({"encoder": nn.Linear(5, 7), "llm": nn.Linear(3, 4)}).to(dtype)


def masters(module: nn.Module, folder, place: str = "none") -> MasterWeights:
    dtype = next(module.parameters()).dtype
    return MasterWeights(module, dtype, StateOffloader(OffloadConfig(place), "sft", folder))


def values(held: MasterWeights, prefix: str = "") -> dict[str, torch.Tensor]:
    return {k: f.tensor.clone() for k, f in held.fragments().items() if k.startswith(prefix)}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def switch(held: MasterWeights, part: nn.Module, moments: bool = False, cut: int = 0) -> Zero:
    """To an engine that trains ``part``; its optimizer."""
    carried, steps = held.leave()
    zero = Zero(part.parameters(), cut)
    held.enter(zero, carried, steps if moments else None)
    return zero


@pytest.mark.parametrize("moments", [False, True])
def test_a_stage_that_does_not_train_them_loses_no_bit(tmp_path, moments):
    module = model()
    held = masters(module, tmp_path)
    assert held.leave() == ({}, 0.0) and held.fragments() == {} and held.offload() == 0
    zero = switch(held, module)
    zero.step()
    assert held.steps() == 1.0
    before, encoder = values(held), values(held, "master/encoder.")
    switch(held, module.llm)
    assert same(values(held, "master/encoder."), encoder)  # for the checkpoint
    assert set(held.trained()) == {"master/llm.weight", "master/llm.bias"}
    switch(held, module)
    assert same(values(held), {k: v for k, v in before.items() if k.startswith("master/")})
    held.live.make_moments(3.0)
    moved = {k: t.add_(1.0) for k, t in values(held).items() if not k.startswith("master/")}
    for key, view in held.live.edited():
        if key in moved:
            view.tensor.copy_(moved[key])
    switch(held, module, moments)
    assert held.steps() == (3.0 if moments else 0.0)
    assert same(values(held, "exp_avg"), moved if moments else {})


def test_another_cut_takes_the_weights(tmp_path):
    module = model()
    held = masters(module, tmp_path)
    zero = switch(held, module)
    zero.step()
    switch(held, module, cut=2)
    for key, weight in tensors(module).items():
        assert torch.equal(values(held)[f"master/{key}"], weight.data.float().reshape(-1)[2:])


def test_fp32_weights_are_the_masters(tmp_path):
    module = model(torch.float32)
    held = masters(module, tmp_path)
    switch(held, module)
    switch(held, module.llm)
    assert set(values(held)) == {"master/llm.weight", "master/llm.bias"}


@pytest.mark.parametrize("source", ["branch", "folder", "weights"])
@pytest.mark.parametrize("trains", [False, True])
def test_another_encoder_brings_its_masters(tmp_path, source, trains):
    """Where the source has none, its weights are the masters of what trains."""
    module, other = model(), model()
    live = masters(other, tmp_path)
    zero = switch(live, other)
    zero.step()
    wanted = values(live, "master/encoder.")
    held = masters(module, tmp_path)
    switch(held, module)
    if not trains:
        switch(held, module.llm)
    held.live.make_moments(1.0)
    for key, view in held.live.edited():
        if not key.startswith("master/"):
            view.tensor.fill_(1.0)
    own = tensors(module, "encoder.")
    for name, weight in tensors(other, "encoder.").items():
        own[name].data.copy_(weight.data)
        own[name].requires_grad_(trains)
    if source == "branch":
        held.replace(own, live)
    else:
        kept = live.fragments() if source == "folder" else {}
        tensor_fragments.write_folder(tmp_path / "given", kept, {})
        held.replace(own, FragmentReader(tmp_path / "given"))
    if source == "weights":
        wanted = {f"master/{k}": t.data.float().reshape(-1) for k, t in own.items() if trains}
    assert same(values(held, "master/encoder."), wanted)
    assert not any(t.any() for t in values(held, "exp_avg/encoder.").values())
    assert all(t.all() for t in values(held, "exp_avg/llm.").values())


def test_saved_and_loaded(tmp_path):
    module = model()
    held = masters(module, tmp_path)
    switch(held, module)
    zero = switch(held, module.llm)
    zero.step()
    before = values(held)
    saved = {f"sft/{k}": f for k, f in held.fragments().items()}
    tensor_fragments.write_folder(tmp_path / "saved", saved, {})
    again = masters(module, tmp_path)
    switch(again, module.llm)
    again.load(PrefixReader(FragmentReader(tmp_path / "saved"), "sft/"), held.steps())
    assert same(values(again), before) and again.steps() == 1.0


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_offloaded_ones_come_back_when_they_are_asked_for(tmp_path, place):
    module = model()
    held = masters(module, tmp_path, place)
    zero = switch(held, module)
    zero.step()
    before = values(held)
    assert (
        held.offload()
        == held.offloaded_bytes
        == 3 * 4 * sum(p.numel() for p in module.parameters())
    )
    assert zero.flat.numel() == 0
    assert same(values(held), before) and held.offloaded_bytes == 0
    held.offload()
    held.close()
    assert held.live is None and held.fragments() == {} and not list(tmp_path.iterdir())
