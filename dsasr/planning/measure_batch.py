"""The child process of `batch_search`: builds a stage as a run would, steps synthetic batches,
measures peak memory.

Memory is measured as it limits a run: on a GPU what the allocator reserved, on a CPU the process's
resident set. A limit below what the machine has is enforced: on a GPU by the allocator's share, on
a CPU by the kernel (``RLIMIT_DATA``), so that too large a batch ends this process and no other.
"""

from __future__ import annotations

import os
import resource
import tempfile
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dsasr.data.audio.frontends import FrontEnd
from dsasr.data.batch import Batch
from dsasr.data.dataloader.bucketing import FRAMES_PER_SECOND
from dsasr.utils.errors import UserError
from dsasr.utils.memory import available_bytes, process_bytes

if TYPE_CHECKING:
    from dsasr.recipe import Recipe
    from dsasr.stages import StageConfig

PHONEMES_PER_SECOND = 20  # faster than anyone speaks
OUT_OF_MEMORY = ("alloc", "out of memory", "not enough memory")  # in torch's and others' messages


@dataclass(frozen=True)
class Shape:
    """The size of a batch whose samples are all alike."""

    samples: int
    frames: int  # feature frames of a sample
    tokens: int  # of a sample's transcript, the end token included


def serve(pipe: Any, log: str, recipe: Recipe, stage: str, memory: int) -> None:
    """Send ("ready", …), then step the batches that come and send ("peak", (bytes, seconds)),
    until the pipe closes. An error ends it: ("memory", how), ("user", text), ("error", traceback).

    What libraries print goes to the file ``log``.
    """
    handle = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    try:
        probe = StageProbe(recipe, stage, memory)
        pipe.send(("ready", (probe.device_name, probe.memory, probe.resident)))
        while True:
            try:
                shapes = pipe.recv()
            except EOFError:
                return
            pipe.send(("peak", probe.peak(shapes)))
    except UserError as error:
        pipe.send(("user", str(error)))
    except BaseException as error:  # the parent process reports it
        kind = "memory" if is_out_of_memory(error) else "error"
        with suppress(OSError):
            pipe.send((kind, "out of memory" if kind == "memory" else traceback.format_exc()))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, (RuntimeError, OSError)) and any(t in text for t in OUT_OF_MEMORY)


def synthetic_batch(
    shape: Shape,
    front_end: FrontEnd,
    phonemes: int,
    tokens: int,
    frame_seconds: float = 0.04,
) -> Batch:
    """A batch of that shape: noise for features, labels below ``phonemes`` and ``tokens``;
    ``frame_seconds`` of the encoder, which must have more frames than labels."""
    count = shape.samples
    hop = front_end.rate // FRAMES_PER_SECOND
    rows = front_end.frames((shape.frames - 1) * hop + front_end.window)
    seconds = shape.frames / FRAMES_PER_SECOND
    spoken = max(1, int(seconds * min(PHONEMES_PER_SECOND, 1 / (1.5 * frame_seconds))))
    labels = torch.arange(spoken) % max(phonemes - 1, 1) + 1  # no two alike beside each other
    said = max(shape.tokens, 1)
    generator = torch.Generator().manual_seed(0)
    return Batch.blank(
        torch.randn(count, rows, front_end.bins, generator=generator),
        phonemes_BP=labels.repeat(count, 1),
        tokens_BU=torch.randint(tokens, (count, said), generator=generator),
        keys=tuple(f"synthetic-{i}" for i in range(count)),
        durations=(shape.frames / 100,) * count,
        seed=1,
    )


class StageProbe:
    """A stage's branch in its engine, and the other one offloaded beside it if the job has both."""

    def __init__(self, recipe: Recipe, stage: str, memory: int) -> None:
        from dsasr.build import Builder
        from dsasr.engine import process_setup
        from dsasr.kernels import dispatch
        from dsasr.planning.memory import stages_beside
        from dsasr.utils import distributed
        from dsasr.utils.library_warnings import silence_library_warnings

        silence_library_warnings()
        process_setup.set_threads(recipe.engine)
        dispatch.select(recipe.kernels)
        process_setup.init_distributed()
        self.device = distributed.device()
        self.gpu = self.device.type == "cuda"
        self.memory = memory or free_bytes(self.device)
        self.device_name = torch.cuda.get_device_name(self.device) if self.gpu else "the CPU"
        self.builder, self.folder = Builder(recipe), tempfile.TemporaryDirectory()
        self.stage = recipe.stage(stage)
        self.front_end = self.builder.front_end
        for other in stages_beside(recipe, self.stage)[-1:]:  # the one that usually trains most
            self._enter(other).offload()
        self.branch = self._enter(self.stage)
        self.resident = self._current()
        if self.resident > self.memory:
            raise MemoryError
        self._limit()

    def _enter(self, stage: StageConfig) -> Any:
        """A branch that has made a small step, so that its optimizer has its moments."""
        from dsasr.engine.branch_engine import BranchEngine
        from dsasr.engine.partitioner import partitioner

        module = self.builder.module(stage.branch, partitioner(self.builder.recipe.engine))
        branch = BranchEngine(
            stage.branch, module, self.builder.recipe.engine, Path(self.folder.name)
        )
        branch.enter(stage)
        self._step(branch, stage, Shape(1, 64, 4))
        return branch

    def peak(self, shapes: tuple[Shape, ...]) -> tuple[int, float]:
        """(peak bytes over one step of each shape, seconds of the slowest step)."""
        self._reset()
        slowest = 0.0
        for shape in shapes:
            started = time.perf_counter()
            self._step(self.branch, self.stage, shape)
            if self.gpu:
                torch.cuda.synchronize()
            slowest = max(slowest, time.perf_counter() - started)
        return self._peak(), slowest

    def _step(self, branch: Any, stage: StageConfig, shape: Shape) -> None:
        sft = stage.branch == "sft"
        phonemes = 2 if sft else len(self.builder.phonemes)
        tokens = self.builder.tokenizer.vocab_size if sft else 1
        seconds = self.builder.frame_seconds
        batch = synthetic_batch(shape, self.front_end, phonemes, tokens, seconds)
        branch.step([batch] * stage.grad_accum_steps, 0)

    def _limit(self) -> None:
        """Limit this process's memory from here on.

        The kernel counts what is mapped. DeepSpeed maps gigabytes of buckets that a CPU never
        touches, so the limit is on what is mapped beyond the present state, with a quarter of slack
        for what the heap maps and does not use. What decides is the resident set.
        """
        if self.gpu:
            total = torch.cuda.get_device_properties(self.device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, self.memory / total), self.device)
            return
        room = max(int(1.25 * self.memory) - process_bytes("VmRSS"), 1 << 20)
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (process_bytes("VmData") + room, hard))

    def _current(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.gpu else process_bytes("VmRSS")

    def _reset(self) -> None:
        if self.gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here

    def _peak(self) -> int:
        return torch.cuda.max_memory_reserved(self.device) if self.gpu else process_bytes("VmHWM")


def free_bytes(device: torch.device) -> int:
    """Free bytes of the GPU, or of the machine within its control group's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_bytes()
