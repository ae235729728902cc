"""Examine a job's machines: one rank, as ``dsasr doctor`` and slurm/job.sh start it.

Exit code 0: nothing falls short; 1: something does; 2: a mistake in the recipe; 3: no end in time.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    here = os.path.dirname(os.path.abspath(__file__))  # as in train.py
    sys.path[:] = [p for p in sys.path if os.path.abspath(p or os.getcwd()) != here]
    sys.path.insert(0, os.path.dirname(os.path.dirname(here)))

import argparse
import datetime
import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsasr.utils.errors import Failure, UserError, first_line, run_tool

SHORT, MISTAKE, LATE = 1, 2, 3  # exit codes
JOIN_SECONDS = 120.0  # in which all ranks must have come: the slowest still loads its libraries
SECONDS = 180.0  # of the whole, after all libraries are loaded


@dataclass(frozen=True)
class Places:
    """Where the job reads and writes, as rank 0 takes it from the recipe."""

    folder: str = ""
    shards: tuple[tuple[str, ...], ...] = ()  # of each rank
    source: dict[str, Any] | None = None  # plain values of a `StorageConfig`


class TimeLimit:
    """Ends this process where it takes over ``seconds``, and says in what: ``doing``."""

    def __init__(self, seconds: float):
        self.doing = "the start"
        self._timer = threading.Timer(seconds, self._end, [seconds])
        self._timer.daemon = True
        self._timer.start()

    def _end(self, seconds: float) -> None:
        rank = os.environ.get("RANK", "0")
        print(
            f"doctor: rank {rank} on {socket.gethostname()} has not ended within {seconds:g} s; it "
            f"was at {self.doing}", file=sys.stderr, flush=True,
        )  # fmt: skip
        os._exit(LATE)

    def close(self) -> None:
        self._timer.cancel()


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="", help="a packaged recipe's name, or a YAML file")
    parser.add_argument("--local_rank", type=int, default=0, help="set by the deepspeed launcher")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe overrides")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    os.environ.setdefault("LOCAL_RANK", str(options.local_rank))
    if options.overrides and not options.recipe:
        raise UserError(f"{options.overrides[0]}: overrides need --recipe NAME|FILE")
    limit = TimeLimit(SECONDS + JOIN_SECONDS)
    try:
        return examine(options, limit)
    finally:
        limit.close()


def examine(options: argparse.Namespace, limit: TimeLimit) -> int:
    """Measure on all ranks, print on rank 0; the exit code, the same on all ranks."""
    from dsasr.doctor import findings, machine
    from dsasr.utils import distributed

    limit.doing = "nvidia-smi"
    gpus, problem = machine.gpus_of_node()  # before any rank takes memory
    recipe, mistake = None, ""
    if distributed.is_main_rank() and options.recipe:
        recipe, mistake = load(options)
    limit.doing = "joining the other ranks"
    join()
    try:
        mistake = distributed.broadcast(mistake)
        if mistake:
            if distributed.is_main_rank():
                raise UserError(mistake)
            return MISTAKE
        report, free = measure(limit, recipe, gpus, problem)
        limit.doing = "gathering the reports"
        reports = distributed.all_gather_object(report)
        code = 0
        if distributed.is_main_rank():
            limit.doing = "the plan"
            job = plan(recipe, reports, free)
            rows = findings.examine(reports, job)
            show(rows, job.needs.problem)
            code = SHORT if any(row.short for row in rows) else 0
        return distributed.broadcast(code)
    finally:
        distributed.destroy_process_group()


def load(options: argparse.Namespace) -> tuple[Any, str]:
    """The recipe, or what is wrong with it; other ranks wait for rank 0's word."""
    from dsasr import recipe

    try:
        return recipe.load(options.recipe, options.overrides), ""
    except (UserError, Failure) as error:
        return None, str(error)


def join() -> None:
    """Join the other ranks' process group. Raises `Failure` that names those which do not come."""
    import torch
    import torch.distributed as dist

    from dsasr.doctor import machine
    from dsasr.launch import rendezvous
    from dsasr.utils import distributed

    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if world == 1:
        return
    rendezvous.check_master(JOIN_SECONDS / 4)
    wait = datetime.timedelta(seconds=JOIN_SECONDS)
    store = None
    try:
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world, rank == 0, wait,
            wait_for_workers=False,
        )  # fmt: skip
        keys = [f"here/{r}" for r in range(world)]
        store.set(keys[rank], machine.node_name())
        store.wait(keys, wait)
    except (RuntimeError, OSError) as error:
        where = f"rank 0 at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        if rank or store is None:
            raise Failure(f"rank {rank} does not reach {where}: {first_line(error)}") from None
        late = ", ".join(str(r) for r in range(world) if not store.check([keys[r]]))
        raise Failure(
            f"ranks {late} have not come to {where} within {JOIN_SECONDS:g} s: look at those "
            "nodes, the network and its firewall"
        ) from None
    device = distributed.device()
    if device.type == "cuda":
        if device.index >= torch.cuda.device_count():
            raise UserError(f"rank {rank} has no GPU: this machine has {torch.cuda.device_count()}")
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, store=dist.PrefixStore("doctor", store), rank=rank, world_size=world, timeout=wait
    )


def measure(limit: TimeLimit, recipe: Any, gpus: list, gpu_problem: str) -> tuple[Any, float]:
    """(this rank's `Report`, free bytes where the run is to be); collective."""
    from dsasr.data.shards.storage import ShardStorage, StorageConfig
    from dsasr.doctor import machine, measure
    from dsasr.doctor.findings import Report
    from dsasr.utils import distributed

    rank, world = distributed.rank(), distributed.world_size()
    here = distributed.broadcast(places(recipe, world))
    limit.doing = "matrix products"
    rate = measure.products()
    limit.doing = "comparing clocks"
    clock = measure.clock_offset()
    hosts = set(distributed.all_gather_object(socket.gethostname()))
    limit.doing = "the all-reduce"
    all_reduce = measure.all_reduce()
    link = machine.network_link() if len(hosts) > 1 else machine.inside_link((gpus or [None])[0])
    seen, free, folder = True, 0.0, Path(here.folder)
    written = read = measure.Transfer()
    if here.folder:
        limit.doing = f"writing to {here.folder}"
        seen = measure.sees_folder(measure.existing(folder))
        written = measure.write(folder)
        if distributed.is_main_rank():
            free = measure.free_bytes(folder)
        distributed.barrier()
        limit.doing = "reading shards"
        storage = ShardStorage(StorageConfig(**(here.source or {})))
        read = measure.read(here.shards[rank], storage)
    limit.doing = "versions"
    versions = machine.versions() if machine.is_first_rank() else {}
    return Report(
        rank, machine.node_name(), socket.gethostname(), versions, gpus, gpu_problem,
        distributed.device().type == "cuda", rate, clock, all_reduce, link, seen, read, written,
    ), free  # fmt: skip


def places(recipe: Any, world: int) -> Places:
    """Of rank 0's recipe; nothing without one."""
    if recipe is None:
        return Places()
    from dataclasses import asdict

    from dsasr.doctor.measure import GIVEN_UP, within
    from dsasr.doctor.needs import run_folder, shards_of_ranks

    source = recipe.data.dataloader.source
    try:
        shards = within(GIVEN_UP, lambda: shards_of_ranks(recipe, world))
    except (UserError, Failure, OSError) as error:
        print(f"doctor: data.train is not read: {error}", flush=True)
        shards = [[] for _ in range(world)]
    return Places(str(run_folder(recipe)), tuple(map(tuple, shards)), asdict(source))


def plan(recipe: Any, reports: Sequence[Any], free: float) -> Any:
    """What the job needs, as `findings.examine` takes it."""
    from dsasr.doctor.findings import Job, Needs

    if recipe is None:
        return Job()
    from dsasr.doctor.needs import machine_of, needs, run_folder

    gpus = [gpu.total for report in reports for gpu in report.gpus]
    nodes = len({report.host for report in reports})
    machine = machine_of(
        len(reports), nodes, min(gpus, default=0.0) if reports[0].has_gpu else 0.0,
        min(report.products for report in reports), min(r.all_reduce for r in reports),
    )  # fmt: skip
    try:
        needed = needs(recipe, machine)
    except UserError as error:
        needed = Needs(problem=str(error))
    return Job(str(run_folder(recipe)), free, needed)


def show(rows: Sequence[Any], plan_problem: str) -> None:
    """Print the table, and a line for each thing that falls short."""
    from dsasr.utils.terminal import one_line

    marked = [("", "measured", "needed", "")]
    marked += [
        (r.check, r.measured, r.needed, "short" if r.short else "ok" if r.needed else "")
        for r in rows
    ]
    cells = [[one_line(cell) for cell in row] for row in marked]
    widths = [max(len(row[i]) for row in cells) for i in range(4)]
    for row in cells:
        print("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip())
    if plan_problem:
        print(f"the plan's figures are not known: {plan_problem}")
    for row in rows:
        if row.short:
            print(f"short: {row.check}: {row.short}")
    sys.stdout.flush()


if __name__ == "__main__":
    code = run_tool(main)
    from dsasr.utils import distributed

    distributed.end_process(code)
