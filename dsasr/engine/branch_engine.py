"""One DeepSpeed engine per branch: enter a stage, take a step, offload, load another encoder.

With its neighbors in this package it is the only importer of deepspeed. How the optimizer's
parameter groups are swapped:

- *Within* a branch, entering a stage destroys the branch's engine and initializes a new one over
  the same (already partitioned) module, with exactly the stage's parts in the optimizer. With one
  optimizer over all parameters, a parameter frozen by ``requires_grad`` would still be updated by
  its stale Adam moments, and one unfrozen later would never receive gradients. fp32 masters are
  carried over by name, moments on request (`master_weights`).
- *Between* branches two engines live side by side over disjoint modules, so that a change of branch
  costs no more than offloading fp32 masters and moments (`offload`), and neither branch can change
  a bit of the other's ("Frozen is frozen").

How long this takes is measured by ``tools/bench/swap.py`` and recorded in tools/experiments/LOG.md.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Collection, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsasr.checkpoint import zero_partition
from dsasr.checkpoint.tensor_fragments import (
    Fragment,
    FragmentReader,
    PrefixReader,
    Reader,
    checksum,
)
from dsasr.data.batch import Batch
from dsasr.engine import zero_hooks
from dsasr.engine.config import (
    EngineConfig,
    deepspeed_settings,
    nvme_folder,
    precision,
    work_around_pinned_reads,
)
from dsasr.engine.deepspeed_import import import_deepspeed
from dsasr.engine.gradient_histograms import gradient_histograms
from dsasr.engine.master_weights import MasterWeights
from dsasr.engine.offload import StateOffloader
from dsasr.engine.step_report import StepReport
from dsasr.model import lora
from dsasr.model.outputs import add_sums
from dsasr.stages import StageConfig, learning_rate
from dsasr.utils import distributed
from dsasr.utils.errors import UserError


class BranchEngine:
    """A branch's module and the DeepSpeed engine of its stage.

    ``module``: whole, or partitioned already (`partitioner`). ``folder``: the run folder.
    """

    def __init__(self, name: str, module: nn.Module, config: EngineConfig, folder: Path):
        self.name = name
        self.module = module.to(distributed.device())
        # Parameters only: module.to(dtype) would round buffers such as rotary frequencies too.
        for parameter in self.module.parameters():
            parameter.data = parameter.data.to(precision(config))
        self.config = config
        self.stage: StageConfig | None = None
        self._engine = None
        self._hooks: dict[tuple[str, str], set[int]] = {}
        self._encoder_tensors: dict[str, Tensor] | None = None
        self._masters = MasterWeights(
            module, precision(config), StateOffloader(config.offload, name, folder)
        )
        self._nvme_folder = nvme_folder(config, folder, name) if config.nvme else None

    # -- stages ------------------------------------------------------------------------------

    def enter(self, stage: StageConfig) -> None:
        """Make exactly the stage's parts trainable; collective.

        Where the branch is in that stage, this only reloads what is offloaded. Raises `UserError`
        where the model lacks a part.
        """
        if self.stage is not None and stage.name == self.stage.name:
            self.reload()
            return
        carried, steps = self._masters.detach()
        self._destroy()
        self.stage = stage
        groups = self._parameter_groups(stage)
        self._hooks = zero_hooks.hook_ids(self.module)
        self._engine = self._initialize(stage, groups)
        optimizer = self._engine.optimizer
        self._masters.attach(optimizer, carried, steps if stage.keep_moments else None)

    def _parameter_groups(self, stage: StageConfig) -> list[dict[str, Any]]:
        groups = []
        for parameter in self.module.parameters():
            parameter.requires_grad_(False)
        for part in stage.trains:
            params = lora.part(self.module, part)
            if not params:
                raise UserError(f"stage '{stage.name}' trains '{part}', which this model lacks")
            for parameter in params:
                parameter.requires_grad_(True)
            lr = learning_rate(stage, part, 0)
            groups.append({"params": params, "lr": lr, "name": part})
        return groups

    def _initialize(self, stage: StageConfig, groups: list[dict[str, Any]]):
        deepspeed = import_deepspeed()
        config = deepspeed_settings(self.config, self._nvme_folder) | {
            "gradient_accumulation_steps": stage.grad_accum_steps,
            "gradient_clipping": self.config.max_grad_norm,
        }
        optimizer = torch.optim.AdamW(
            groups,
            betas=self.config.betas,
            eps=self.config.eps,
            weight_decay=stage.weight_decay,
            fused=True,
        )
        for leaf in zero_hooks.leaf_modules(self.module):
            deepspeed.utils.set_z3_leaf_module(leaf, True)
        # DeepSpeed casts buffers with the weights; position tables and the like must stay fp32.
        buffers = [(b, b.data) for b in self.module.buffers()]
        engine, *_ = deepspeed.initialize(model=self.module, optimizer=optimizer, config=config)
        for buffer, data in buffers:
            buffer.data = data
        work_around_pinned_reads(engine.optimizer)
        return engine

    def _destroy(self) -> None:
        if self._engine is None:
            return
        self._engine.destroy()
        zero_hooks.remove_hooks_since(self.module, self._hooks)
        self._engine = None
        gc.collect()

    # -- steps -------------------------------------------------------------------------------

    def step(self, batches: Sequence[Batch], step: int, histograms_every: int = 0) -> StepReport:
        """Take one optimizer step from this rank's ``grad_accum_steps`` micro-batches; collective.

        Its loss is the mean over the targets of all micro-batches of all ranks.

        ``step`` counts within the stage, for the learning rates and, where the module has a method
        ``warm_up``, for what it raises over the warm-up. Every ``histograms_every`` steps (0:
        never) the report has histograms of the gradients. The model seeds all its randomness
        (dropout, masks, chunks) from the batch, so that a resumed run repeats an uninterrupted one
        bit for bit.
        """
        assert self.stage is not None and len(batches) == self.stage.grad_accum_steps
        lrs = {part: learning_rate(self.stage, part, step) for part in self.stage.trains}
        # The groups are in the order of `trains`: `_parameter_groups` made them so.
        for group, lr in zip(self._optimizer_groups(), lrs.values(), strict=True):
            group["lr"] = lr
        self.module.train()
        if warm_up := getattr(self.module, "warm_up", None):
            warm_up(step, self.stage.warmup_steps)
        scale = self._loss_scale(batches)
        sums: dict[str, tuple[Tensor, Tensor]] = {}
        gradients = None
        for number, batch in enumerate(batches, 1):
            outputs = self._engine(batch.to(distributed.device()))
            self._engine.backward(outputs.loss_sum * scale.to(outputs.loss_sum.dtype))
            if histograms_every and number == len(batches) and not (step + 1) % histograms_every:
                parts = {part: lora.part(self.module, part) for part in self.stage.trains}
                gradients = gradient_histograms(parts)
            self._engine.step()
            add_sums(sums, outputs.sums)
        norm = self._engine.get_global_grad_norm()
        where = self.name, self.stage.name, step
        return StepReport(*where, sums, lrs, norm, tuple(batches), gradients)

    def _loss_scale(self, batches: Sequence[Batch]) -> Tensor:
        """Factor that turns a micro-batch's summed loss into its share of the step's mean loss: a
        scalar that the host does not wait for. Collective.

        DeepSpeed averages over micro-batches and ranks: that is undone here.
        """
        targets = sum(map(self.module.count_targets, batches))
        total = torch.full((), targets, dtype=torch.float64, device=distributed.device())
        distributed.all_reduce_sum(total)
        return distributed.world_size() * len(batches) / total.clamp_min(1)

    def _optimizer_groups(self) -> list[dict[str, Any]]:
        return self._engine.optimizer.optimizer.param_groups

    @contextmanager
    def evaluating(self):
        """The module in eval mode, without gradients; after an error it can be trained on."""
        training = self.module.training
        self.module.eval()
        try:
            with torch.no_grad():
                yield self.module
        except Exception:
            # The layers whose forward was cut short are still gathered.
            if self._engine is not None:
                self._engine.empty_partition_cache()
            raise
        finally:
            self.module.train(training)

    # -- offload and swap ------------------------------------------------------------------

    def offload(self) -> int:
        """Offload masters and moments as ``engine.offload`` says; returns the bytes moved."""
        return self._masters.offload()

    def reload(self) -> int:
        """Reload what is offloaded; returns the bytes moved."""
        return self._masters.reload()

    @property
    def offloaded_bytes(self) -> int:
        """The bytes offloaded at present."""
        return self._masters.offloaded_bytes

    def load_encoder(self, source: FragmentReader | BranchEngine) -> None:
        """Hot-swap: load the encoder of a published snapshot or of the other branch, and its CTC
        head where this branch has one; collective.

        From a snapshot each rank reads only its partition; from a branch of the same job it is a
        local copy. Where the stage trains the encoder, its masters are replaced too and its moments
        start again from zero; where it does not, low-precision weights keep their masters for a
        later stage that trains it. Raises `FragmentError` on all ranks, with nothing changed, when
        a snapshot is of another architecture, unreadable or not finite.
        """
        encoder = self._encoder()
        if isinstance(source, BranchEngine):
            zero_partition.copy_weights(source._encoder(), encoder)
        else:
            zero_partition.replace_weights(self.module, source, self._swapped())
        zero_partition.refresh_gathered(encoder.values())
        masters = source._masters if isinstance(source, BranchEngine) else source
        self._masters.replace(encoder, masters)

    def _encoder(self) -> dict[str, Tensor]:
        """The swapped tensors by name; cached: the lookup takes as long as a small swap."""
        if self._encoder_tensors is None:
            self._encoder_tensors = {}
            for prefix in self._swapped():
                self._encoder_tensors |= zero_partition.named_tensors(self.module, prefix)
        return self._encoder_tensors

    def _swapped(self) -> tuple[str, ...]:
        """The children that a hot-swap replaces."""
        has_head = getattr(self.module, "ctc", None) is not None
        return ("encoder.", "ctc.") if has_head else ("encoder.",)

    def checksum(self, prefix: str = "encoder.") -> str:
        """The checksum of the weights of all ranks, equal to a snapshot's; collective."""
        return checksum(zero_partition.weight_fragments(self.module, prefix))

    def masters(self, prefix: str) -> dict[str, Fragment]:
        """This rank's fragments of the fp32 masters, of parameters that this stage trains or, where
        weights are of low precision, an earlier one trained."""
        return self._masters.masters(prefix)

    # -- saving and loading ------------------------------------------------------------------

    def load_initial(
        self, reader: Reader, names: Collection[str], trained: Collection[str]
    ) -> None:
        """Load the weights ``names`` of another model, before the first stage; collective.

        Each rank reads its own partition, a tensor at a time. Of ``trained``, parameters that a
        later stage trains, low-precision weights keep the fp32 masters too. Raises `FragmentError`
        on all ranks when a weight is missing, of another shape, unreadable or not finite.
        """
        assert self._engine is None
        tensors = zero_partition.named_tensors(self.module)
        targets = {name: tensors[name] for name in tensors if name in names}
        zero_partition.load_tensors(targets, reader, finite=True)
        zero_partition.refresh_gathered(targets.values())
        self._masters.replace({n: t for n, t in targets.items() if n in trained}, reader)

    def fragments(self) -> dict[str, Fragment]:
        """This rank's weights, masters and moments; keys begin with the branch's name."""
        fragments = zero_partition.weight_fragments(self.module) | self._masters.fragments()
        return {f"{self.name}/{key}": fragment for key, fragment in fragments.items()}

    def adam_steps(self) -> float:
        """Adam's step count, which `load` takes."""
        return self._masters.steps()

    def load(self, reader: FragmentReader, stage: StageConfig | None, adam_steps: float) -> None:
        """Restore what `fragments` returned on any number of ranks; collective.

        ``stage``: the one that the branch was in; None: in none yet.
        """
        branch_reader = PrefixReader(reader, f"{self.name}/")
        if stage is not None:
            self.enter(stage)
        zero_partition.load_weights(self.module, branch_reader)
        zero_partition.refresh_gathered(self.module.parameters())
        self._masters.load(branch_reader, adam_steps)

    def close(self) -> None:
        """Destroy the engine and free its optimizer states; the module stays."""
        self._masters.close()
        self._destroy()
        if self._nvme_folder is not None:
            shutil.rmtree(self._nvme_folder, ignore_errors=True)
        self.stage = None
