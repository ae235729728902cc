"""What a hot-swap and a stage switch cost, beside the floor: bytes moved over copy bandwidth.

``DS_ACCELERATOR=cpu deepspeed --num_gpus 2 tools/bench/swap.py``; plain python: one rank. For each
encoder size a pretrain branch and an sft branch are held as a colocated run holds them. Measured,
by the wall clock, as the slowest rank's time:

- ``hot_swap``: the live encoder into the sft branch, in turn with ``floor``, a copy of as many
  bytes on all ranks at once; ``checksum``: the look that follows every swap of a run.
- ``publish`` into a store, and ``store_swap``: from there into the sft branch, with sha256 and
  finiteness checks.
- ``offload``: masters and moments of the pretrain branch to host memory and back.
- ``step``: one optimizer step of the pretrain branch on four seconds of audio a rank, which is far
  less than a real batch, so that the share of time found from it is too high rather than too low.
- ``switch``: the sft branch from the align stage (adaptor) to the joint one (encoder and all) and
  back; its floor: the new masters read from the weights and written once.

The share counts the method's schedule: three encoders published, swapped and checked, four stages
entered, over 7.3 M steps. From 300 M on the pretrain branch holds its encoder without masters and
moments, which a hot-swap does not touch, to fit in 20 GiB; ``offload`` and ``step`` are left out,
and the share is at --step-seconds. One JSON line a size is appended to results.jsonl.
"""

from __future__ import annotations

import argparse
import gc
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import record
from torch import nn

from dsasr.checkpoint.snapshot_store import SnapshotStore
from dsasr.data.batch import Batch
from dsasr.engine import process_setup
from dsasr.engine.branch_engine import BranchEngine
from dsasr.engine.config import EngineConfig, precision
from dsasr.engine.offload import OffloadConfig
from dsasr.model.encoders.conformer import Encoder, EncoderConfig
from dsasr.model.outputs import Outputs
from dsasr.schedule import Snapshot
from dsasr.stages import StageConfig
from dsasr.utils import distributed
from dsasr.utils.errors import run_tool
from dsasr.utils.progress import Bar

SIZES = {  # millions of parameters: width, layers (feed-forward 4x, 64 a head)
    1: (64, 8),
    10: (256, 8),
    30: (384, 11),
    100: (640, 14),
    300: (1024, 16),
    600: (1280, 16),
}
LIGHT = 300
SWAPS, SWITCHES, STEPS = 3, 4, 7_300_000
PRETRAIN = StageConfig("pretrain", "pretrain", {"encoder": 1e-4}, steps=10)
HEAD_ONLY = StageConfig("head", "sft", {"llm": 1e-4}, steps=10)
ALIGN = StageConfig("align", "sft", {"adaptor": 1e-4}, steps=10)
JOINT = StageConfig("joint", "sft", {"encoder": 1e-4, "adaptor": 1e-4, "llm": 1e-4}, steps=10)
MOST = 1 << 28  # bytes in one copy of the floor's; more is counted as several


class Parts(nn.Module):
    """The parts of a branch; only the encoder is ever run."""

    def __init__(self, width: int, layers: int, head: int):
        super().__init__()
        shape = EncoderConfig(width=width, layers=layers, heads=width // 64, ffn=4 * width)
        self.encoder = Encoder(shape)
        if head:
            self.adaptor = nn.Linear(width, width)
            self.llm = nn.Linear(head, head, bias=False)

    def count_targets(self, batch: Batch) -> int:
        return 1

    def forward(self, batch: Batch) -> Outputs:
        features = batch.features_BTF.to(next(self.parameters()).dtype)
        out = self.encoder(features, batch.feature_lengths_B)
        return Outputs(out.frames_BSE.float().square().mean(), torch.tensor(1.0), {})


def batch() -> Batch:
    """Four seconds of noise."""
    return Batch.blank(torch.randn(1, 400, 80), durations=(4.0,), seed=1)


def seconds(run: Callable[[], object]) -> float:
    """The slowest rank's time for what all ranks begin at once."""
    distributed.barrier()
    started = time.perf_counter()
    run()
    if distributed.device().type == "cuda":
        torch.cuda.synchronize()
    return max(distributed.all_gather_object(time.perf_counter() - started))


def alternate(sides: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each side, taken in turn after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, run in sides.items():
            elapsed = seconds(run)
            if turn:
                times[name].append(elapsed)
    return times


class Floor:
    """A copy of ``size`` bytes, in as few calls as memory allows."""

    def __init__(self, size: int):
        self.times = max(1, -(-size // MOST))
        make = {"dtype": torch.uint8, "device": distributed.device()}
        self.source = torch.randint(0, 255, (size // self.times,), **make)
        self.target = torch.empty_like(self.source)

    def __call__(self) -> None:
        for _ in range(self.times):
            self.target.copy_(self.source)

    @property
    def bytes(self) -> int:
        """Read and written."""
        return 2 * self.times * self.source.numel()


def measure(size: int, rounds: int, step_seconds: float, folder: Path) -> None:
    width, layers = SIZES[size]
    config = EngineConfig(offload=OffloadConfig("cpu"))
    sft = BranchEngine("sft", Parts(width, layers, 4 * width), config, folder)
    sft.enter(ALIGN)
    medians, over, rate = beside_live(size, sft, rounds, folder)
    gc.collect()
    medians |= switches(sft, max(rounds // 3, 1))
    sft.close()
    if distributed.is_main_rank():
        count = sum(p.ds_numel for p in sft.module.encoder.parameters())
        _record(count, medians, over, rate, step_seconds)


def beside_live(
    size: int, sft: BranchEngine, rounds: int, folder: Path
) -> tuple[dict[str, float | None], list[float], float]:
    """Seconds by name, the hot-swaps over their floors, and a rank's copy rate in bytes/s."""
    width, layers = SIZES[size]
    light, few = size >= LIGHT, max(rounds // 3, 1)
    medians: dict[str, float | None] = {"step": None, "offload": None}
    live = BranchEngine("pretrain", Parts(width, layers, 8 if light else 0), sft.config, folder)
    live.enter(HEAD_ONLY if light else PRETRAIN)
    if not light:  # before anything else: Adam's moments are there then
        medians["step"] = _median(lambda: live.step([batch()], 0), 2)
    encoder = [p.ds_tensor for p in sft.module.encoder.parameters()]
    moved_bytes = sum(t.numel() * t.element_size() for t in encoder)
    moved_bytes += sum(f.tensor.numel() * 4 for f in _moved_masters(live).values())
    floor = Floor(moved_bytes)
    swap = alternate({"hot_swap": lambda: sft.load_encoder(live), "floor": floor}, rounds)
    over = [a / b for a, b in zip(swap["hot_swap"], swap["floor"], strict=True)]
    medians |= {name: statistics.median(values) for name, values in swap.items()}
    medians |= through_store(live, sft, few, folder)
    if not light:
        medians["offload"] = _median(lambda: (live.offload(), live.reload()), few)
    live.close()
    return medians, over, floor.bytes / medians["floor"]


def through_store(
    live: BranchEngine, sft: BranchEngine, rounds: int, folder: Path
) -> dict[str, float]:
    store, snapshot = SnapshotStore(folder / "store"), Snapshot("encoder-1", 1, "drift")
    medians = {"publish": seconds(lambda: store.publish(live.module, {}, snapshot, {}))}
    medians["store_swap"] = _median(lambda: sft.load_encoder(store.open(snapshot.id)), rounds)
    medians["checksum"] = _median(sft.checksum, rounds)
    assert sft.checksum() == live.checksum() == store.manifest(snapshot.id)["checksum"]
    return medians


def switches(sft: BranchEngine, rounds: int) -> dict[str, float]:
    """From align to joint and back, after one turn that does not count."""
    there, back = [], []
    for _ in range(rounds + 1):
        there.append(seconds(lambda: sft.enter(JOINT)))
        back.append(seconds(lambda: sft.enter(ALIGN)))
    return {"switch": statistics.median(there[1:]), "switch_back": statistics.median(back[1:])}


def _median(run: Callable[[], object], rounds: int) -> float:
    return statistics.median(alternate({"it": run}, rounds)["it"])


def _moved_masters(live: BranchEngine) -> dict:
    """What a hot-swap copies beside the weights: where they are of low precision."""
    low = precision(live.config) is not torch.float32
    return live.masters("encoder.") if low else {}


def _record(
    count: int, medians: dict[str, float | None], over: list[float], rate: float, stated: float
) -> None:
    lowest = 2 * 4 * count / distributed.world_size() / rate  # of a switch
    switch = max(medians["switch"], medians["switch_back"])
    a_swap = medians["publish"] + medians["store_swap"] + medians["checksum"]
    cost = SWAPS * a_swap + SWITCHES * switch
    step = medians["step"] or stated
    milliseconds = {
        f"{name}_ms": None if value is None else round(1000 * value, 2)
        for name, value in medians.items()
    }
    record(
        "swap",
        encoder_parameters=count,
        ranks=distributed.world_size(),
        rounds=len(over),
        clock="wall",
        precision=str(precision(EngineConfig())).removeprefix("torch."),
        copy_gb_per_s=round(rate * distributed.world_size() / 1e9, 2),
        **milliseconds,
        hot_swap_over_floor=round(statistics.median(over), 3),
        hot_swap_over_floor_range=[round(min(over), 3), round(max(over), 3)],
        switch_floor_ms=round(1000 * lowest, 2),
        switch_over_floor=round(medians["switch"] / lowest, 2),
        step_seconds=round(step, 4),
        step_is="measured, 4 s of audio a rank" if medians["step"] else "stated",
        schedule={"swaps": SWAPS, "switches": SWITCHES, "steps": STEPS},
        schedule_cost_seconds=round(cost, 3),
        share_of_training=cost / (cost + STEPS * step),
    )


def room(size: int) -> str | None:
    """Why this size does not fit in the memory that is free, or None."""
    width, layers = SIZES[size]
    with torch.device("meta"):
        count = sum(p.numel() for p in Parts(width, layers, 4 * width).parameters())
    needed = (32 if size >= LIGHT else 48) * count
    if distributed.device().type == "cuda":
        free, needed = torch.cuda.mem_get_info()[0], needed // distributed.world_size()
    else:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable"))
    if free > needed:
        return None
    return f"{size} M left out: needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[*SIZES][1:], choices=SIZES)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--step-seconds", type=float, default=0.5, help="a step where none is measured"
    )
    parser.add_argument("--folder", help="where stores are made (default: the temporary folder)")
    parser.add_argument("--local_rank", type=int, default=0, help="set by the deepspeed launcher")
    options = parser.parse_args()
    process_setup.set_threads(EngineConfig())
    process_setup.init_distributed()
    for size in Bar(options.sizes, unit="size", disable=not distributed.is_main_rank()):
        reason = distributed.broadcast(room(size))
        if reason:
            if distributed.is_main_rank():
                Bar.write(reason)
            continue
        path = tempfile.mkdtemp(dir=options.folder) if distributed.is_main_rank() else None
        folder = Path(distributed.broadcast(path))
        try:
            measure(size, options.rounds, options.step_seconds, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        gc.collect()
    return 0


if __name__ == "__main__":
    distributed.end_process(run_tool(main))
