"""Masters and moments when an engine, an encoder or a process is replaced: on one rank, with a
stand-in for DeepSpeed's ZeRO-1 optimizer."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dsasr.checkpoint import tensor_fragments
from dsasr.checkpoint.tensor_fragments import FragmentReader, PrefixReader
from dsasr.checkpoint.zero_partition import named_tensors
from dsasr.engine.master_weights import MasterWeights
from dsasr.engine.offload import OffloadConfig, StateOffloader


class Zero:
    """One group; its partition of each parameter begins at ``first_element``."""

    def __init__(self, parameters: Iterable[nn.Parameter], first_element: int = 0):
        self.bit16_groups = [list(parameters)]
        partitions, at = [], 0
        for p in self.bit16_groups[0]:
            partitions.append(p.data.float().reshape(-1)[first_element:])
            low = SimpleNamespace(start=first_element, numel=len(partitions[-1]))
            high = SimpleNamespace(start=at)
            p._hp_mapping = SimpleNamespace(lp_fragment_address=low, hp_fragment_address=high)
            at += low.numel
        self.flat = torch.cat(partitions)
        self.single_partition_of_fp32_groups = [self.flat]
        self.optimizer = torch.optim.AdamW([self.flat])

    def step(self) -> None:
        self.flat.grad = torch.randn_like(self.flat)
        self.optimizer.step()


def model(dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    return nn.ModuleDict({"encoder": nn.Linear(5, 7), "llm": nn.Linear(3, 4)}).to(dtype)


def masters(module: nn.Module, folder, device: str = "none") -> MasterWeights:
    dtype = next(module.parameters()).dtype
    return MasterWeights(module, dtype, StateOffloader(OffloadConfig(device), "sft", folder))


def values(states: MasterWeights, prefix: str = "") -> dict[str, torch.Tensor]:
    return {k: f.tensor.clone() for k, f in states.fragments().items() if k.startswith(prefix)}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def switch(
    states: MasterWeights, trained: nn.Module, moments: bool = False, first_element: int = 0
) -> Zero:
    """Attach a new engine that trains the module ``trained``; returns its optimizer."""
    carried, steps = states.detach()
    zero = Zero(trained.parameters(), first_element)
    states.attach(zero, carried, steps if moments else None)
    return zero


@pytest.mark.parametrize("moments", [False, True])
def test_a_stage_that_does_not_train_them_loses_no_bit(tmp_path, moments):
    module = model()
    states = masters(module, tmp_path)
    assert states.detach() == ({}, 0.0) and states.fragments() == {} and states.offload() == 0
    zero = switch(states, module)
    zero.step()
    assert states.steps() == 1.0
    before, encoder = values(states), values(states, "master/encoder.")
    switch(states, module.llm)
    assert same(values(states, "master/encoder."), encoder)  # for the checkpoint
    assert set(states.masters("llm.")) == {"master/llm.weight", "master/llm.bias"}
    assert same(values(states, "master/"), {k: f.tensor for k, f in states.masters().items()})
    switch(states, module)
    assert same(values(states), {k: v for k, v in before.items() if k.startswith("master/")})
    states.live.init_moments(3.0)
    moments_written = {
        k: t.add_(1.0) for k, t in values(states).items() if not k.startswith("master/")
    }
    for key, view in states.live.edit():
        if key in moments_written:
            view.tensor.copy_(moments_written[key])
    switch(states, module, moments)
    assert states.steps() == (3.0 if moments else 0.0)
    assert same(values(states, "exp_avg"), moments_written if moments else {})


@pytest.mark.parametrize("moments", [False, True])
def test_another_partition_has_the_same_masters_and_moments(tmp_path, moments):
    module = model()
    states = masters(module, tmp_path)
    switch(states, module).step()
    before = values(states)
    switch(states, module, moments, first_element=2)
    expected = {k: t[2:] for k, t in before.items() if moments or k.startswith("master/")}
    assert same(values(states), expected)


def test_masters_of_an_earlier_stage_follow_into_another_branch(tmp_path):
    """The source's stage trains the encoder no more, the receiver's does."""
    module, second = model(), model()
    live = masters(second, tmp_path)
    switch(live, second).step()
    switch(live, second.llm)
    expected = values(live, "master/encoder.")
    states = masters(module, tmp_path)
    switch(states, module, first_element=2)
    states.replace(named_tensors(module, "encoder."), live)
    assert len(expected) == 2
    assert same(values(states, "master/encoder."), {k: t[2:] for k, t in expected.items()})


def test_fp32_weights_are_the_masters(tmp_path):
    module = model(torch.float32)
    states = masters(module, tmp_path)
    switch(states, module)
    switch(states, module.llm)
    assert set(values(states)) == {"master/llm.weight", "master/llm.bias"}


@pytest.mark.parametrize("source", ["branch", "folder", "weights"])
@pytest.mark.parametrize("trains", [False, True])
def test_another_encoder_brings_its_masters(tmp_path, source, trains):
    """Where the source has none, its weights become the masters of the parameters that train."""
    module, second = model(), model()
    live = masters(second, tmp_path)
    zero = switch(live, second)
    zero.step()
    expected = values(live, "master/encoder.")
    states = masters(module, tmp_path)
    switch(states, module)
    if not trains:
        switch(states, module.llm)
    states.live.init_moments(1.0)
    for key, view in states.live.edit():
        if not key.startswith("master/"):
            view.tensor.fill_(1.0)
    encoder = named_tensors(module, "encoder.")
    for name, weight in named_tensors(second, "encoder.").items():
        encoder[name].data.copy_(weight.data)
        encoder[name].requires_grad_(trains)
    if source == "branch":
        states.replace(encoder, live)
    else:
        masters_saved = live.fragments() if source == "folder" else {}
        tensor_fragments.write_folder(tmp_path / "source", masters_saved, {})
        states.replace(encoder, FragmentReader(tmp_path / "source"))
    if source == "weights":
        expected = {f"master/{k}": t.data.float().reshape(-1) for k, t in encoder.items() if trains}
    assert same(values(states, "master/encoder."), expected)
    assert not any(t.any() for t in values(states, "exp_avg/encoder.").values())
    assert all(t.all() for t in values(states, "exp_avg/llm.").values())


def test_saved_and_loaded(tmp_path):
    module = model()
    states = masters(module, tmp_path)
    switch(states, module)
    zero = switch(states, module.llm)
    zero.step()
    before = values(states)
    saved = {f"sft/{k}": f for k, f in states.fragments().items()}
    tensor_fragments.write_folder(tmp_path / "saved", saved, {})
    again = masters(module, tmp_path)
    switch(again, module.llm)
    again.load(PrefixReader(FragmentReader(tmp_path / "saved"), "sft/"), states.steps())
    assert same(values(again), before) and again.steps() == 1.0


@pytest.mark.parametrize("device", ["cpu", "disk"])
def test_offloaded_states_are_reloaded_when_they_are_read(tmp_path, device):
    module = model()
    states = masters(module, tmp_path, device)
    zero = switch(states, module)
    zero.step()
    before = values(states)
    assert (
        states.offload()
        == states.offloaded_bytes
        == 3 * 4 * sum(p.numel() for p in module.parameters())
    )
    assert zero.flat.numel() == 0
    assert same(values(states), before) and states.offloaded_bytes == 0
    states.offload()
    states.close()
    assert states.live is None and states.fragments() == {} and not list(tmp_path.iterdir())


@pytest.mark.launcher
@pytest.mark.parametrize("deepspeed", ["zero1", "zero2", "zero3"])
def test_two_ranks_lose_no_master_to_a_stage_a_resume_or_a_swap(launch, tmp_path, deepspeed):
    program = Path(__file__).parents[1] / "programs" / "master_weights_two.py"
    done = launch(program, tmp_path, deepspeed)
    assert done.returncode == 0, done.stdout[-3000:]
    results = json.loads((tmp_path / "found.json").read_text())
    assert results["left"] == []
    assert results["exchanged"] and results["left_out"] and results["missing"]
    assert results["encoder"] == 2 and results["from_live"]
    for name in ("uninterrupted", "resumed", "from_store"):
        assert results[name] == [2, 2, 2], name
    assert results["equal"] == [True] * 3
    assert results["swapped_live"] and results["kept"] and results["dormant"] == 2
