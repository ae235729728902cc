"""One DeepSpeed engine a branch: enter a stage, make a step, offload, take another encoder.

The only importer of deepspeed. How parameter groups are swapped, and why so:

- *Within* a branch, entering a stage destroys the branch's engine and initializes a new one over
  the same (already partitioned) module with exactly the stage's parts in the optimizer. A parameter
  that is frozen by ``requires_grad`` under one optimizer over everything still moves (its Adam
  moments are stale), and one that is unfrozen later never gets gradients; a new engine has neither
  fault. fp32 masters are carried over by name, moments on request (`master_weights`).
- *Between* branches two engines live side by side over disjoint modules, so taking turns costs
  nothing but offloading fp32 masters and moments (`offload`), and neither branch can
  touch a bit of the other's.

Measured by ``tools/bench/swap.py`` on two CPU ranks (tools/experiments/LOG.md), encoders of 12 to
605 M: entering the joint stage, which trains the encoder, takes 0.8 to 6.8 s, going back to align
0.7 to 0.8 s; a hot-swap takes 1.03 to 1.8 times the copying of its bytes. At the method's schedule
all of it is 0.001% of the training.
"""

from __future__ import annotations

import datetime
import functools
import gc
import logging
import os
import shutil
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsasr.checkpoint import zero_partition
from dsasr.checkpoint.tensor_fragments import Fragment, FragmentReader, PrefixReader, checksum
from dsasr.data.batch import Batch
from dsasr.engine import zero_hooks
from dsasr.engine.config import (
    EngineConfig,
    nvme_folder,
    on_nvme,
    precision,
    read_ds_config,
    read_gradients_whole,
    settings,
)
from dsasr.engine.master_weights import MasterWeights
from dsasr.engine.offload import StateOffloader
from dsasr.model import lora
from dsasr.model.layerwise_init import Cut
from dsasr.stages import StageConfig, learning_rate
from dsasr.utils import distributed
from dsasr.utils.errors import UserError


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step was. ``sums`` are this rank's (sum, count), not yet reduced.

    ``grad_norm`` is a tensor, for its value waits for the optimizer's kernels; a plain inf where
    DeepSpeed, which looks before it takes the step, found it not finite.
    """

    branch: str
    stage: str
    step: int
    sums: dict[str, tuple[Tensor, Tensor]]
    lrs: dict[str, float]
    grad_norm: Tensor | float | None
    batches: tuple[Batch, ...]


def init_distributed(limit: float = 0.0) -> None:
    """Join the job's process group; a lone process becomes a group of one.

    ``limit`` > 0: a collective that waits for so many seconds fails (0: after torch's default).
    """
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    for key, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        os.environ.setdefault(key, value)
    if os.environ["WORLD_SIZE"] == "1":
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "0")
    if distributed.device().type == "cuda":
        if int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
            raise UserError(
                f"rank {os.environ['RANK']} has no GPU: this machine has "
                f"{torch.cuda.device_count()}, start no more ranks (deepspeed --num_gpus)"
            )
        torch.cuda.set_device(distributed.device())
    backend = "nccl" if distributed.device().type == "cuda" else "gloo"
    timeout = {"timeout": datetime.timedelta(seconds=limit)} if limit else {}
    deepspeed.init_distributed(
        dist_backend=backend, verbose=False, auto_mpi_discovery=False, **timeout
    )


@functools.lru_cache(maxsize=1)
def partitioner(config: EngineConfig) -> Cut | None:
    """What builds a model in slices (`dsasr.model.layerwise_init`); None under ZeRO-1 and 2.

    Parameters are cut as `deepspeed.initialize` would cut them, and sent from rank 0 as it would
    send them, but one layer's at a time and before the next layer is there.
    """
    # Optimizer states have no part in it, wherever they are to lie.
    held = settings(config, Path(config.nvme or "."))
    if held.get("zero_optimization", {}).get("stage") != 3:
        return None
    import deepspeed

    # Given a module, even an empty one, it also puts in ZeRO-3's linear function, as initialize
    # does for a model that is not yet cut.
    zero = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=held)

    def cut(parameters: Sequence[nn.Parameter]) -> None:
        for parameter in parameters:
            parameter.data = parameter.data.to(distributed.device(), precision(config))
            zero._convert_to_zero_parameters([parameter])

    return cut


def check_disk(config: EngineConfig) -> None:
    """Raise `UserError` where optimizer states are to lie on a disk and DeepSpeed cannot do it."""
    if not on_nvme(read_ds_config(config.deepspeed)):
        return
    from deepspeed.ops.op_builder import AsyncIOBuilder

    try:
        AsyncIOBuilder().load(verbose=False)
    except Exception as error:  # of compilers and loaders, in as many ways
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"engine.deepspeed={config.deepspeed}: DeepSpeed's async_io cannot be built here "
            f"({reason}): install libaio-dev and a C++ compiler, or give zero3-offload"
        ) from None
    try:
        Path(config.nvme).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"engine.nvme={config.nvme} cannot be written: {error}") from None


def set_threads(config: EngineConfig) -> None:
    """Share a CPU's cores out over the ranks on this machine, unless OMP_NUM_THREADS says how."""
    torch.set_float32_matmul_precision(config.matmul)
    if distributed.device().type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        local = int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1")))
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local))


class BranchEngine:
    """A module, whole or cut already (`partitioner`), and the DeepSpeed engine of its stage."""

    def __init__(self, name: str, module: nn.Module, config: EngineConfig, folder: Path):
        self.name = name
        # Weights only: module.to(dtype) would round buffers such as rotary frequencies too.
        self.module = module.to(distributed.device())
        for parameter in self.module.parameters():
            parameter.data = parameter.data.to(precision(config))
        self.config = config
        self.stage: StageConfig | None = None
        self._engine = None
        self._hooks: dict[tuple[str, str], set[int]] = {}
        self._own_encoder: dict[str, Tensor] | None = None
        self._masters = MasterWeights(
            module, precision(config), StateOffloader(config.offload, name, folder)
        )
        self._disk = nvme_folder(config, folder, name) if config.nvme else None

    # -- stages ------------------------------------------------------------------------------

    def enter(self, stage: StageConfig) -> None:
        """Make exactly the stage's parts trainable. No-op unless the stage changed; collective."""
        if self.stage is not None and stage.name == self.stage.name:
            self.reload()
            return
        carried, steps = self._masters.leave()
        self._destroy()
        self.stage = stage
        groups = self._groups(stage)
        self._hooks = zero_hooks.present(self.module)
        self._engine = self._initialize(stage, groups)
        optimizer = self._engine.optimizer
        self._masters.enter(optimizer, carried, steps if stage.keep_moments else None)

    def _groups(self, stage: StageConfig) -> list[dict[str, Any]]:
        groups = []
        for parameter in self.module.parameters():
            parameter.requires_grad_(False)
        for part in stage.trains:
            params = lora.part(self.module, part)
            if not params:
                raise UserError(f"stage '{stage.name}' trains '{part}', which this model lacks")
            for parameter in params:
                parameter.requires_grad_(True)
            rate = learning_rate(stage, part, 0)
            groups.append({"params": params, "lr": rate, "name": part})
        return groups

    def _initialize(self, stage: StageConfig, groups: list[dict[str, Any]]):
        import deepspeed

        config = settings(self.config, self._disk) | {
            "gradient_accumulation_steps": stage.grad_accum_steps,
            "gradient_clipping": self.config.max_grad_norm,
        }
        optimizer = torch.optim.AdamW(
            groups,
            betas=self.config.betas,
            eps=self.config.eps,
            weight_decay=stage.weight_decay,
            fused=distributed.device().type == "cuda",
        )
        for block in zero_hooks.blocks(self.module):
            deepspeed.utils.set_z3_leaf_module(block, True)
        # DeepSpeed casts buffers with the weights; tables of positions and the like must stay fp32.
        buffers = [(b, b.data) for b in self.module.buffers()]
        engine, *_ = deepspeed.initialize(model=self.module, optimizer=optimizer, config=config)
        for buffer, data in buffers:
            buffer.data = data
        read_gradients_whole(engine.optimizer)
        return engine

    def _destroy(self) -> None:
        if self._engine is None:
            return
        self._engine.destroy()
        zero_hooks.remove_since(self.module, self._hooks)
        self._engine = None
        gc.collect()

    # -- steps -------------------------------------------------------------------------------

    def step(self, batches: Sequence[Batch], step: int) -> StepReport:
        """One optimizer step from this rank's ``grad_accum_steps`` micro-batches; collective.

        The model seeds all its randomness (dropout, masks, chunks) from the batch, so that a
        resumed run repeats an uninterrupted one bit for bit.
        """
        assert self.stage is not None and len(batches) == self.stage.grad_accum_steps
        lrs = {part: learning_rate(self.stage, part, step) for part in self.stage.trains}
        for group, lr in zip(self._optimizer_groups(), lrs.values(), strict=True):
            group["lr"] = lr
        self.module.train()
        sums: dict[str, tuple[Tensor, Tensor]] = {}
        for batch in batches:
            outputs = self._engine(batch.to(distributed.device()))
            self._engine.backward(outputs.loss)
            self._engine.step()
            for name, (total, count) in outputs.sums.items():
                old = sums.get(name, (0.0, 0.0))
                sums[name] = (old[0] + total, old[1] + count)
        norm = self._engine.get_global_grad_norm()
        return StepReport(self.name, self.stage.name, step, sums, lrs, norm, tuple(batches))

    def _optimizer_groups(self) -> list[dict[str, Any]]:
        return self._engine.optimizer.optimizer.param_groups

    @contextmanager
    def evaluating(self):
        """The module in eval mode, without gradients."""
        training = self.module.training
        self.module.eval()
        try:
            with torch.no_grad():
                yield self.module
        finally:
            self.module.train(training)

    # -- offload and swap ------------------------------------------------------------------

    def offload(self) -> int:
        """Move masters and moments to where they are offloaded to; returns the bytes moved."""
        return self._masters.offload()

    def reload(self) -> int:
        return self._masters.reload()

    @property
    def offloaded_bytes(self) -> int:
        """What lies in the offload place at present."""
        return self._masters.offloaded_bytes

    def load_encoder(self, source: FragmentReader | BranchEngine) -> None:
        """Hot-swap: take the encoder of a published snapshot or of the other branch; collective.

        From a snapshot each rank reads only the slices that it holds; from a branch of the same job
        it is a local copy. Where the encoder is trainable its masters follow and its moments start
        again from zero; where it is not, low-precision weights keep their masters for a later stage
        that trains it. Raises `FragmentError` on all ranks, with nothing changed, when a snapshot
        is of another architecture, unreadable or not finite.
        """
        own = self._encoder()
        if isinstance(source, BranchEngine):
            zero_partition.copy_weights(source._encoder(), own)
        else:
            zero_partition.replace_weights(self.module, source, "encoder.")
        zero_partition.refresh_gathered(own.values())
        self._masters.replace(own, source._masters if isinstance(source, BranchEngine) else source)

    def _encoder(self) -> dict[str, Tensor]:
        """The encoder's tensors by name; looked up once, for that takes as long as a small swap."""
        if self._own_encoder is None:
            self._own_encoder = zero_partition.tensors(self.module, "encoder.")
        return self._own_encoder

    def checksum(self, prefix: str = "encoder.") -> str:
        """Of the weights of all ranks, comparable to a snapshot's; collective."""
        return checksum(zero_partition.weights(self.module, prefix))

    def masters(self, prefix: str) -> dict[str, Fragment]:
        """This rank's pieces of the fp32 masters, where the branch trains the parameter."""
        return self._masters.trained(prefix)

    # -- saving and loading ------------------------------------------------------------------

    def fragments(self) -> dict[str, Fragment]:
        """This rank's weights, masters and moments, keyed below the branch's name."""
        held = zero_partition.weights(self.module) | self._masters.fragments()
        return {f"{self.name}/{key}": fragment for key, fragment in held.items()}

    def adam_steps(self) -> float:
        return self._masters.steps()

    def load(self, reader: FragmentReader, stage: StageConfig | None, adam_steps: float) -> None:
        """Restore what `fragments` gave, written by any number of ranks; collective."""
        below = PrefixReader(reader, f"{self.name}/")
        if stage is None:
            zero_partition.load_weights(self.module, below)
            return
        self.enter(stage)
        zero_partition.load_weights(self.module, below)
        zero_partition.refresh_gathered(self.module.parameters())
        self._masters.load(below, adam_steps)

    def close(self) -> None:
        """Destroy the engine and free what it held; the module stays."""
        self._masters.close()
        self._destroy()
        if self._disk is not None:
            shutil.rmtree(self._disk, ignore_errors=True)
        self.stage = None
