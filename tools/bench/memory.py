"""Memory of a rank while it builds a stage's model and makes steps, beside what the plan predicts.

    DS_ACCELERATOR=cpu deepspeed --num_gpus 2 tools/bench/memory.py --recipe demo --stage joint

Above a baseline, taken when the libraries, the recipe's files and the process group are there:

- ``building``: the most held until the model is there, and ``entering`` until DeepSpeed has it;
- ``held``: what is resident after the last step, beside the plan's weights, gradients, optimizer
  states and buckets;
- ``peak``: the most held during a step, beside the plan's whole (without its reserve).

On a CPU that is the process's resident set without pages of files, looked at every 5 ms (and freed
memory is given back before ``held`` is read), on a GPU what torch's allocator has given out.
``--whole`` builds as before models were built in slices; ``--llm 1024x20`` puts a language model of
that width and depth with random weights, two files in bf16 and the recipe's tokenizer, in place of
the recipe's. Batches are synthetic: ``--batch 8x400x20`` of 8 utterances, 400 frames, 20 tokens.
One JSON line is appended to results.jsonl.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import tempfile
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from common import record

from dsasr import recipe
from dsasr.build import Builder
from dsasr.data.batch import Batch
from dsasr.data.dataloader.bucketing import FRAMES_PER_SECOND
from dsasr.demo.small_lm import make_random_lm
from dsasr.engine import process_setup
from dsasr.engine.branch_engine import BranchEngine
from dsasr.engine.partitioner import partitioner
from dsasr.kernels import dispatch
from dsasr.planning.measure_batch import Shape, synthetic_batch
from dsasr.planning.memory import GB, Machine, Traffic, between_steps, step_memory
from dsasr.planning.model_parts import count_parts
from dsasr.stages import StageConfig
from dsasr.utils import distributed
from dsasr.utils.errors import UserError, run_tool
from dsasr.utils.library_warnings import silence_library_warnings
from dsasr.utils.memory import process_bytes

MB = 1e6


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--stage", required=True)
    parser.add_argument("--whole", action="store_true", help="every rank builds the whole model")
    parser.add_argument("--llm", default="", metavar="WIDTHxLAYERS")
    parser.add_argument("--batch", default="4x400x20", metavar="UTTERANCESxFRAMESxTOKENS")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--local_rank", type=int, default=0, help="set by the launcher")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_args()


class Memory:
    """Bytes of this rank above a baseline."""

    def __init__(self):
        self.gpu = distributed.device().type == "cuda"
        self.base, self._most, self._over = 0, 0, threading.Event()
        if not self.gpu:
            self._watch = threading.Thread(target=self._sample, daemon=True)
            self._watch.start()
        self.base = self.resident()
        self.reset()

    def resident(self) -> int:
        gc.collect()
        if self.gpu:
            torch.cuda.synchronize()
            return torch.cuda.memory_allocated() - self.base
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
        return anonymous() - self.base

    def reset(self) -> None:
        self._most = 0
        if self.gpu:
            torch.cuda.reset_peak_memory_stats()

    def most(self) -> int:
        """Since the last reset."""
        return (torch.cuda.max_memory_allocated() if self.gpu else self._most) - self.base

    def _sample(self) -> None:
        while not self._over.wait(0.005):
            self._most = max(self._most, anonymous())

    def close(self) -> None:
        self._over.set()


def anonymous() -> int:
    """Resident bytes of this process that no file backs: those, the kernel may drop at any time."""
    return process_bytes("RssAnon") + process_bytes("RssShmem")


def measure(args: argparse.Namespace, cfg: recipe.Recipe, folder: Path) -> dict:
    stage = cfg.stage(args.stage)
    try:
        shape = Shape(*(int(x) for x in args.batch.split("x")))
    except (ValueError, TypeError):
        raise UserError(f"--batch {args.batch}: give UTTERANCESxFRAMESxTOKENS") from None
    build = Builder(cfg)
    sft = stage.branch == "sft"
    phonemes = 2 if sft else len(build.phonemes)
    tokens = build.tokenizer.vocab_size if sft else 1
    batch = synthetic_batch(shape, build.front_end, phonemes, tokens, build.frame_seconds)
    warm_up(cfg, stage, batch, folder)
    memory = Memory()
    module = build.module(stage.branch, None if args.whole else partitioner(cfg.engine))
    measured = {"building": memory.most()}
    branch = BranchEngine(stage.branch, module, cfg.engine, folder)
    branch.enter(stage)
    measured |= {"entering": memory.most(), "entered": memory.resident()}
    for number in range(args.steps):
        memory.reset()
        branch.step([batch] * stage.grad_accum_steps, number)
    measured |= {"peak": memory.most(), "held": memory.resident()}
    memory.close()
    return measured


def warm_up(cfg: recipe.Recipe, stage: StageConfig, batch: Batch, folder: Path) -> None:
    """What libraries, DeepSpeed and the ranks need once, whatever the model: two steps of the same
    kinds of layers, one of each, 32 wide (of an encoder that others trained: as wide as it is)."""
    model = cfg.model
    if cfg.pretrained_encoder is not None:  # one of its blocks, as wide as it is
        encoder = replace(cfg.pretrained_encoder, layers=1, weights=False)
    else:
        encoder = replace(model.encoder, width=32, heads=2, layers=1, ffn=32)
    small = replace(
        cfg,
        model=replace(
            model,
            encoder=encoder,
            adaptor=replace(model.adaptor, hidden=32),
            llm=replace(model.llm, path=str(folder / "small"), weights=True),
        ),
    )
    if distributed.is_main_rank():
        make_random_lm(folder / "small", Builder(cfg).tokenizer_folder, 32, 1)
    distributed.barrier()
    module = Builder(small).module(stage.branch, partitioner(cfg.engine))
    branch = BranchEngine(stage.branch, module, cfg.engine, folder)
    branch.enter(stage)
    for number in range(2):
        branch.step([batch] * stage.grad_accum_steps, number)
    branch.close()


def predict(args: argparse.Namespace, cfg: recipe.Recipe) -> tuple[dict[str, float], float]:
    stage = cfg.stage(args.stage)
    shape = [int(x) for x in args.batch.split("x")]
    seconds = shape[1] / FRAMES_PER_SECOND
    traffic = Traffic(seconds, shape[2] / seconds)
    batch = replace(stage.batch or cfg.data.dataloader.batch, frames=shape[0] * shape[1],
                    samples=shape[0], tokens=0)  # fmt: skip
    stage = replace(stage, batch=batch)
    machine = Machine(nodes=1, gpus=distributed.world_size(), reserve=0.0,
                      cpu=distributed.device().type == "cpu")  # fmt: skip
    parts = count_parts(cfg)
    total = sum(parts[name].parameters for name in cfg.parts(stage.branch))
    memory = step_memory(cfg, stage, machine, parts, traffic)
    predicted = {name: value * GB for name, value in memory.items()}
    predicted["held"] = between_steps(memory) * GB
    return predicted | {"peak": sum(memory.values()) * GB}, total


def main() -> None:
    args = parse()
    os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    silence_library_warnings()
    cfg = recipe.load(args.recipe, args.overrides)
    cfg.stage(args.stage)
    process_setup.set_threads(cfg.engine)
    dispatch.select(cfg.kernels)
    process_setup.init_distributed()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(distributed.broadcast(temporary))
        if args.llm:
            llm_folder = folder / "llm"
            if distributed.is_main_rank():
                width, layers = (int(x) for x in args.llm.split("x"))
                make_random_lm(llm_folder, Builder(cfg).tokenizer_folder, width, layers)
            distributed.barrier()
            cfg = recipe.load(args.recipe, [*args.overrides, f"model.llm.path={llm_folder}"])
        # Of this stage's branch alone: the other one is not built here.
        branch_recipe = replace(cfg, branch=cfg.stage(args.stage).branch)
        expected, total = predict(args, branch_recipe)
        measured = distributed.all_gather_object(measure(args, branch_recipe, folder))
        distributed.barrier()
    if distributed.is_main_rank():
        print_table(measured, expected, total)
        record("memory", recipe=args.recipe, stage=args.stage, whole=args.whole, llm=args.llm,
               batch=args.batch, overrides=args.overrides, ranks=distributed.world_size(),
               parameters=total, measured=measured, predicted=expected)  # fmt: skip


def print_table(measured: list[dict], expected: dict, total: int) -> None:
    print(f"{total / MB:.1f} M parameters; MB of each rank above its baseline")
    for name in ("building", "entering", "entered", "held", "peak"):
        cells = " ".join(f"{rank[name] / MB:>9.1f}" for rank in measured)
        most = max(rank[name] for rank in measured)
        beside = f"  predicted {expected[name] / MB:.1f}: {expected[name] / most:.3f} of it" if (
            name in expected) else ""  # fmt: skip
        print(f"{name:<10} {cells}{beside}")
    parts = ", ".join(f"{n} {v / MB:.1f}" for n, v in expected.items() if n not in measured[0])
    print(f"predicted: {parts}")


if __name__ == "__main__":
    distributed.end_process(run_tool(main))
