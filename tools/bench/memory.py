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
from dsasr.demo.small_lm import make_random_lm
from dsasr.engine import branch_engine
from dsasr.engine.branch_engine import BranchEngine, partitioner
from dsasr.kernels import dispatch
from dsasr.planning import batch_search, cluster_sizing
from dsasr.planning.batch_trial import Shape, status, synthetic_batch
from dsasr.stages import StageConfig
from dsasr.utils import distributed
from dsasr.utils.errors import UserError, run_tool

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
        self.base = self.held()
        self.reset()

    def held(self) -> int:
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
    return status("RssAnon") + status("RssShmem")


def measure(args: argparse.Namespace, chosen: recipe.Recipe, folder: Path) -> dict:
    stage = batch_search.stage_of(chosen, args.stage)
    try:
        shape = Shape(*(int(x) for x in args.batch.split("x")))
    except (ValueError, TypeError):
        raise UserError(f"--batch {args.batch}: give UTTERANCESxFRAMESxTOKENS") from None
    build = Builder(chosen)
    sft = stage.branch == "sft"
    phonemes = 2 if sft else len(build.phonemes)
    tokens = build.tokenizer.vocab_size if sft else 1
    batch = synthetic_batch(shape, chosen.model.encoder.mels, phonemes, tokens)
    warm_up(chosen, stage, batch, folder)
    memory = Memory()
    module = build.module(stage.branch, None if args.whole else partitioner(chosen.engine))
    found = {"building": memory.most()}
    branch = BranchEngine(stage.branch, module, chosen.engine, folder)
    branch.enter(stage)
    found |= {"entering": memory.most(), "entered": memory.held()}
    for number in range(args.steps):
        memory.reset()
        branch.step([batch] * stage.grad_accum_steps, number)
    found |= {"peak": memory.most(), "held": memory.held()}
    memory.close()
    return found


def warm_up(chosen: recipe.Recipe, stage: StageConfig, batch: Batch, folder: Path) -> None:
    """What libraries, DeepSpeed and the ranks need once, whatever the model: two steps of the same
    kinds of layers, one of each, 32 wide."""
    model = chosen.model
    small = replace(
        chosen,
        model=replace(
            model,
            encoder=replace(model.encoder, width=32, heads=2, layers=1, ffn=32),
            adaptor=replace(model.adaptor, hidden=32),
            llm=replace(model.llm, path=str(folder / "small"), weights=True),
        ),
    )
    if distributed.is_main_rank():
        make_random_lm(folder / "small", Builder(chosen).tokenizer_folder, 32, 1)
    distributed.barrier()
    module = Builder(small).module(stage.branch, partitioner(chosen.engine))
    branch = BranchEngine(stage.branch, module, chosen.engine, folder)
    branch.enter(stage)
    for number in range(2):
        branch.step([batch] * stage.grad_accum_steps, number)
    branch.close()


def predict(args: argparse.Namespace, chosen: recipe.Recipe) -> tuple[dict[str, float], float]:
    stage = batch_search.stage_of(chosen, args.stage)
    shape = [int(x) for x in args.batch.split("x")]
    seconds = shape[1] / cluster_sizing.FRAMES
    traffic = cluster_sizing.Traffic(seconds, shape[2] / seconds)
    batch = replace(stage.batch or chosen.data.dataloader.batch, frames=shape[0] * shape[1],
                    samples=shape[0], tokens=0)  # fmt: skip
    stage = replace(stage, batch=batch)
    machine = cluster_sizing.Machine(nodes=1, gpus=distributed.world_size(), reserve=0.0,
                             cpu=distributed.device().type == "cpu")  # fmt: skip
    made = cluster_sizing.step(chosen, stage, machine, traffic)
    total = sum(p.parameters for n, p in cluster_sizing.parts(chosen).items()
                if n in chosen.parts(stage.branch))  # fmt: skip
    gb = cluster_sizing.GB
    by_part = {n: v * gb for n, v in made.memory.items()}
    return by_part | {"held": made.held * gb, "peak": made.peak * gb}, total


def main() -> None:
    args = parse()
    os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    recipe.quiet()
    chosen = recipe.load(args.recipe, args.overrides)
    batch_search.stage_of(chosen, args.stage)
    branch_engine.set_threads(chosen.engine)
    dispatch.select(chosen.kernels)
    branch_engine.init_distributed()
    with tempfile.TemporaryDirectory() as own:
        folder = Path(distributed.broadcast(own))
        if args.llm:
            place = folder / "llm"
            if distributed.is_main_rank():
                width, layers = (int(x) for x in args.llm.split("x"))
                make_random_lm(place, Builder(chosen).tokenizer_folder, width, layers)
            distributed.barrier()
            chosen = recipe.load(args.recipe, [*args.overrides, f"model.llm.path={place}"])
        # Of this stage's branch alone: the other one is not built here.
        one = replace(chosen, branch=batch_search.stage_of(chosen, args.stage).branch)
        expected, total = predict(args, one)
        found = distributed.all_gather_object(measure(args, one, folder))
        distributed.barrier()
    if distributed.is_main_rank():
        tell(found, expected, total)
        record("memory", recipe=args.recipe, stage=args.stage, whole=args.whole, llm=args.llm,
               batch=args.batch, overrides=args.overrides, ranks=distributed.world_size(),
               parameters=total, measured=found, predicted=expected)  # fmt: skip


def tell(found: list[dict], expected: dict, total: int) -> None:
    print(f"{total / MB:.1f} M parameters; MB of each rank above its baseline")
    for name in ("building", "entering", "entered", "held", "peak"):
        cells = " ".join(f"{one[name] / MB:>9.1f}" for one in found)
        most = max(one[name] for one in found)
        beside = f"  predicted {expected[name] / MB:.1f}: {expected[name] / most:.3f} of it" if (
            name in expected) else ""  # fmt: skip
        print(f"{name:<10} {cells}{beside}")
    parts = ", ".join(f"{n} {v / MB:.1f}" for n, v in expected.items() if n not in found[0])
    print(f"predicted: {parts}")


if __name__ == "__main__":
    distributed.end_process(run_tool(main))
