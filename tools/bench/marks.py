"""Where the time and the memory of a step go: marks in its queue, a profile, the peak."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from common import clock
from gathered_weights import GatheredWeights
from torch.profiler import ProfilerActivity, profile

from dsasr.data.batch import Batch
from dsasr.engine.branch_engine import BranchEngine
from dsasr.utils import distributed
from dsasr.utils.memory import process_bytes

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


class Marks:
    """Where the steps' parts begin: events in a GPU's queue, else by the clock of `common`.

    Ranks that wait for each other are timed by the wall.
    """

    def __init__(self):
        self.gpu = distributed.device().type == "cuda"
        self.clock = (
            "wall" if distributed.world_size() > 1 and not self.gpu else clock(distributed.device())
        )
        self._now = time.process_time if self.clock == "cpu time" else time.perf_counter
        self.steps: list[list[tuple[str, Any]]] = []

    def __call__(self, name: str) -> None:
        """From here on it is ``name``."""
        if self.gpu:
            at = torch.cuda.Event(enable_timing=True)
            at.record()
        else:
            at = self._now()
        if self.steps:
            self.steps[-1].append((name, at))

    def step(self) -> None:
        self.steps.append([])
        self("upload")

    def clear(self) -> None:
        self.steps.clear()

    def seconds(self) -> tuple[list[float], dict[str, float]]:
        """Of every step, and the mean of each part."""
        if self.gpu:
            torch.cuda.synchronize()
        whole, parts = [], defaultdict(float)
        for marks in self.steps:
            for (name, start), (_, end) in pairwise(marks):
                parts[name] += self._between(start, end) / len(self.steps)
            whole.append(self._between(marks[0][1], marks[-1][1]))
        return whole, dict(parts)

    def _between(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1000 if self.gpu else end - start

    def watch(self, branch: BranchEngine) -> None:
        """Mark the parts of the branch's steps; its stage must have been entered."""
        module = branch.module
        parts = {"encoder": module.encoder}
        if branch.name == "pretrain":
            parts["ctc"] = module.ctc
        else:
            parts |= {"adaptor": module.adaptor, "llm": module.llm.base_model, "head": module.head}
        below = dict(zip(list(parts)[1:], parts, strict=False))
        last = list(parts)[-1]
        for name, part in parts.items():
            part.register_forward_pre_hook(lambda *_, name=name: self(f"{name} forward"))
            above = next((a for a, b in below.items() if b == name), "")
            part.register_forward_hook(
                lambda _, __, out, name=name, above=above: self._after(name, above, out)
            )
        engine = branch._engine
        engine.backward = self._marked(engine.backward, f"{last} backward")
        engine.step = self._marked(engine.step, "optimizer")

    def _marked(self, call, name: str):
        def run(*args, **kwargs):
            self(name)
            out = call(*args, **kwargs)
            self("rest")
            return out

        return run

    def _after(self, name: str, above: str, out: Any) -> None:
        self("rest")
        out = out if isinstance(out, torch.Tensor) else out[0]
        if above and out.requires_grad:  # its gradient is there: its backward pass begins
            out.register_hook(lambda _: self(f"{name} backward"))


def profiled(branch: BranchEngine, group: Sequence[Batch], number: int) -> dict[str, Any]:
    """Communication, waits and gathered weights of one more step.

    On a GPU one wait for the device is the profiler's. On a CPU "waits" are the values asked for,
    most of them of tensors that would lie on the host.
    """
    gpu = distributed.device().type == "cuda"
    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if gpu else [])
    gathered = GatheredWeights(branch)
    with profile(activities=kinds, acc_events=True) as profiler, gathered.watch():
        branch.step(group, number)
    talk, waits = 0.0, {}
    for event in profiler.key_averages():
        key = event.key
        if "nccl" in key.lower():
            talk += event.self_device_time_total
        elif not gpu and key.startswith(("gloo:", "c10d::")):
            talk += event.self_cpu_time_total
        if key in WAITS or (key == "aten::_local_scalar_dense" and not gpu):
            waits[key] = event.count
    found = {"communication_ms": round(talk / 1000, 3), "waits": waits}
    return found | {"gathered": gathered.fields()} if gathered.partitioned else found


class Throughput:
    """Audio trained on per second, by the wall clock and of the process's CPU time, and its peak.

    Measured after ``warm_up`` steps (at least one) until ``seconds`` have passed, two steps at
    least.
    """

    def __init__(self, warm_up: int, seconds: float):
        self.warm_up, self.limit = warm_up, seconds
        self.steps = self.utterances = 0
        self.audio = self.started = self.took = 0.0
        self.cpu_started = self.cpu_took = 0.0

    def add(self, durations: Sequence[float]) -> None:
        """A micro-batch of utterances of ``durations`` seconds."""
        self.audio += sum(durations)
        self.utterances += len(durations)

    def step(self) -> bool:
        """A step has ended; returns whether enough were measured."""
        self.steps += 1
        if self.steps == self.warm_up:
            self.audio, self.utterances = 0.0, 0
            restart_peak()
            self.started, self.cpu_started = time.perf_counter(), time.process_time()
        self.took = time.perf_counter() - self.started
        self.cpu_took = time.process_time() - self.cpu_started
        return self.steps >= self.warm_up + 2 and self.took >= self.limit

    def fields(self) -> dict[str, float]:
        """audio_s_per_s, audio_s_per_cpu_s, audio_s_per_step, utterances_per_step, steps, peak_mb.

        What others do on the machine changes CPU time least, with one thread.
        """
        steps = self.steps - self.warm_up
        return {
            "audio_s_per_s": self.audio / self.took,
            "audio_s_per_cpu_s": self.audio / self.cpu_took,
            "audio_s_per_step": self.audio / steps,
            "utterances_per_step": self.utterances / steps,
            "steps": steps,
            "peak_mb": peak() / 2**20,
        }


def restart_peak() -> None:
    """From here on counts what `peak` gives."""
    if distributed.device().type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """The most bytes held: of the device, or of this process on a CPU."""
    if distributed.device().type == "cuda":
        return torch.cuda.max_memory_allocated()
    return process_bytes("VmHWM")
