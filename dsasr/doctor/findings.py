"""From what the ranks measured to a table, and a line for each thing that falls short."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from dsasr.doctor.machine import Gpu, Link
from dsasr.doctor.measure import Transfer

# **Ours.** Where a measurement falls short.
CLOCK_SECONDS = 2.0  # between two clocks: S3 and munge refuse minutes
SLOWEST = 0.8  # of the median rank's products
LINK_SHARE = 0.4  # of the link's rate, that an all-reduce must reach
MARGIN = 1.2  # of what the plan needs, that must be there
ENOUGH_BYTES = 16e6  # read by all ranks together, to judge the rate by
SMALL_SECONDS = 1.0  # a checkpoint that is written in less is not judged by its rate
SHOWN = ("python", "torch", "cuda", "driver")  # of the versions
MB, GB = 1e6, 1e9


@dataclass(frozen=True)
class Report:
    """What one rank has measured."""

    rank: int
    node: str
    host: str
    versions: Mapping[str, str] = field(default_factory=dict)
    gpus: Sequence[Gpu] = ()  # of the node, as its first rank reports
    gpu_problem: str = ""
    has_gpu: bool = False
    products: float = 0.0  # TFLOP/s
    clock: float = 0.0  # seconds ahead of rank 0's
    all_reduce: float = 0.0  # GB/s
    link: Link = field(default_factory=Link)
    sees_folder: bool = True
    read: Transfer = field(default_factory=Transfer)
    write: Transfer = field(default_factory=Transfer)


@dataclass(frozen=True)
class Needs:
    """Of a whole job. Bytes and seconds; 0: nothing, or not known."""

    read: float = 0.0  # bytes a second that all ranks read from the shards
    read_stage: str = ""  # the stage that reads so fast
    checkpoint: float = 0.0  # bytes of the largest checkpoint
    space: float = 0.0  # bytes that checkpoints and snapshots take
    save_seconds: float = 0.0  # in which a checkpoint must be written
    save_reason: str = ""
    problem: str = ""  # why the plan is not known; empty: it is


@dataclass(frozen=True)
class Row:
    """A line of the table; ``short``: what falls short and what to do, empty: nothing does."""

    check: str
    measured: str
    needed: str = ""
    short: str = ""


@dataclass(frozen=True)
class Job:
    """The folder that the job writes, its free bytes, and what the plan needs of the machines."""

    folder: str = ""
    free: float = 0.0
    needs: Needs = field(default_factory=Needs)


def examine(reports: Sequence[Report], job: Job) -> list[Row]:
    """The table's rows, in the order in which they are measured."""
    nodes = list(dict.fromkeys(report.node for report in reports))
    ranks = f"{len(reports)} on {_names(nodes)}"
    rows = [Row("ranks", ranks), _versions(reports), _gpus(reports), _products(reports)]
    if len(reports) > 1:
        rows += [_clocks(reports), _all_reduce(reports)]
    if job.folder:
        rows += _disks(reports, job)
    if job.needs.problem:
        rows.append(Row("plan", "not known", "", ""))
    return rows


def _versions(reports: Sequence[Report]) -> Row:
    reports = [report for report in reports if report.versions]  # of the first rank of each node
    names = list(dict.fromkeys(name for report in reports for name in report.versions))
    different = []
    for name in names:
        by_version = _grouped(reports, lambda r, name=name: r.versions.get(name, "none"))
        if len(by_version) > 1:
            machines = "; ".join(f"{v} on {_names(_nodes(r))}" for v, r in by_version.items())
            different.append(f"{name}: {machines}")
    first = reports[0].versions
    shown = ", ".join(f"{n} {first[n]}" for n in SHOWN if n in first)
    short = ""
    if different:
        short = (
            f"{' / '.join(different)}: install the same on all nodes (one environment on a shared "
            "file system, or slurm.container)"
        )
    return Row("versions", shown, "equal", short)


def _gpus(reports: Sequence[Report]) -> Row:
    known = [gpu for report in reports for gpu in report.gpus]
    kinds = _counted(gpu.name for gpu in known)
    troubles = [
        f"GPU {gpu.index} ({gpu.name}) of {report.node}: {trouble}"
        for report in reports for gpu in report.gpus for trouble in gpu.troubles
    ]  # fmt: skip
    lacking = [r for r in reports if r.gpu_problem]
    if not any(r.has_gpu for r in reports) and not lacking:
        return Row("GPUs", "none: ranks on CPUs")
    if len({gpu.name for gpu in known}) > 1:
        troubles.append(f"GPUs of several kinds: {kinds}; the slowest sets the pace")
    if lacking:
        troubles.append(f"{_names(_nodes(lacking))}: {lacking[0].gpu_problem}")
    bare = _nodes(r for r in reports if not r.has_gpu)
    if bare and not lacking:
        troubles.append(f"{_names(bare)}: torch sees no GPU for some of its ranks")
    advice = (
        ": leave the node out (slurm.options: [--exclude=NODE]) and have it reset or serviced"
        if troubles else ""
    )  # fmt: skip
    return Row("GPUs", kinds or "not known", "no errors", "; ".join(troubles) + advice)


def _products(reports: Sequence[Report]) -> Row:
    rates = [report.products for report in reports]
    median = statistics.median(rates)
    judged = len(reports) > 1 and all(r.has_gpu for r in reports)  # cores have other work too
    slow = [r for r in reports if judged and r.products < SLOWEST * median]
    low, high = f"{min(rates):.3g}", f"{max(rates):.3g}"
    measured = f"{low if low == high else f'{low}–{high}'} TFLOP/s a rank"
    short = ""
    if slow:
        named = ", ".join(f"rank {r.rank} on {r.node} ({r.products:.3g})" for r in slow[:8])
        short = (
            f"{named}: below {SLOWEST:.0%} of the median, {median:.3g} TFLOP/s; all ranks wait for "
            "the slowest: look for another process, heat or a power limit there, or leave it out"
        )
    needed = f"≥ {SLOWEST:.0%} of median" if judged else ""
    return Row("products", measured, needed, short)


def _clocks(reports: Sequence[Report]) -> Row:
    offsets = [report.clock for report in reports]
    spread = max(offsets) - min(offsets)
    short = ""
    if spread > CLOCK_SECONDS:
        middle = statistics.median(offsets)
        off = _nodes(r for r in reports if abs(r.clock - middle) > CLOCK_SECONDS / 2)
        short = f"the clocks of {_names(off)} are off: start chronyd or ntpd there"
    return Row("clocks", f"{spread:.3g} s apart", f"≤ {CLOCK_SECONDS:g} s", short)


def _all_reduce(reports: Sequence[Report]) -> Row:
    rate = min(report.all_reduce for report in reports)
    links = [r.link for r in reports if r.link.rate]
    if not links:
        name = next((r.link.name for r in reports if r.link.name), "link")
        return Row("all-reduce", f"{_rate(rate * GB)} ({name}: rate not known)")
    link = min(links, key=lambda link: link.rate)
    needed = f"{link.name}: {_rate(link.rate * GB)}"
    short = ""
    if rate < LINK_SHARE * link.rate:
        short = (
            f"{_rate(rate * GB)}, {rate / link.rate:.0%} of the link ({needed}): "
            "NCCL_DEBUG=INFO tells which way NCCL takes; give slurm.network=INTERFACE, NCCL_IB_HCA"
        )
    return Row("all-reduce", _rate(rate * GB), needed, short)


# -- disks ---------------------------------------------------------------------------------------


def _disks(reports: Sequence[Report], job: Job) -> list[Row]:
    return [_shared(reports, job), _read(reports, job.needs), *_write(reports, job)]


def _shared(reports: Sequence[Report], job: Job) -> Row:
    blind = _nodes(r for r in reports if not r.sees_folder)
    if not blind:
        return Row("run folder", "the same on all nodes" if len(reports) > 1 else job.folder)
    short = (
        f"{_names(blind)} do not see what rank 0 writes to {job.folder}: give run=FOLDER on a file "
        "system that all nodes share"
    )
    return Row("run folder", f"another on {_names(blind)}", "one", short)


def _read(reports: Sequence[Report], needs: Needs) -> Row:
    if problem := _problem(reports, "read"):
        return Row("reading", "failed", "", f"{problem}: check data.train and the file system")
    total = _total(reports, "read")
    if not total:
        return Row("reading", "no shard to read here")
    needed = f"{_rate(needs.read)} ({needs.read_stage})" if needs.read else ""
    short = ""
    if sum(r.read.bytes for r in reports) < ENOUGH_BYTES:
        return Row("reading", f"{_rate(total)}, of too little to judge by")
    if needs.read and total < MARGIN * needs.read:
        short = (
            f"{_rate(total)} of the {_rate(needs.read)} that stage {needs.read_stage} reads, and a "
            "fifth to spare: copy the shards to the nodes' own disks "
            "(data.dataloader.source.cache_gb), or use a faster file system"
        )
    return Row("reading", _rate(total), needed, short)


def _write(reports: Sequence[Report], job: Job) -> list[Row]:
    needs = job.needs
    if problem := _problem(reports, "write"):
        return [Row("writing", "failed", "", f"{problem}: check run={job.folder}")]
    total = _total(reports, "write")
    seconds = needs.checkpoint / total if total else 0.0
    needed = short = ""
    if needs.checkpoint:
        needed = f"{_size(needs.checkpoint)} a checkpoint: {seconds:.3g} s"
        if needs.save_seconds and seconds > max(needs.save_seconds, SMALL_SECONDS):
            short = (
                f"a checkpoint of {_size(needs.checkpoint)} takes {seconds:.3g} s at "
                f"{_rate(total)}, longer than {needs.save_reason} leaves ({needs.save_seconds:.3g} "
                f"s): save less often, raise slurm.signal, or put run on a faster file system"
            )
    rows = [Row("writing", _rate(total), needed, short)]
    space = short = ""
    if needs.space:
        space = f"{_size(needs.space)} for checkpoints and snapshots"
        if job.free < needs.space:
            short = (
                f"{_size(job.free)} are free in {job.folder}, {space}: free some, lower "
                "checkpoint.keep and store.keep, or give run=FOLDER elsewhere"
            )
    rows.append(Row("free space", _size(job.free), space, short))
    return rows


def _problem(reports: Sequence[Report], kind: str) -> str:
    """What kept the first rank that failed from reading or writing, and how many others."""
    failed = [r for r in reports if getattr(r, kind).problem]
    if not failed:
        return ""
    more = f", and {len(failed) - 1} more ranks" if len(failed) > 1 else ""
    return f"{getattr(failed[0], kind).problem} (rank {failed[0].rank} on {failed[0].node}{more})"


def _total(reports: Sequence[Report], kind: str) -> float:
    """Bytes a second of all ranks together."""
    transfers = [getattr(r, kind) for r in reports]
    seconds = max(t.seconds for t in transfers)
    return sum(t.bytes for t in transfers) / seconds if seconds else 0.0


# -- words ---------------------------------------------------------------------------------------


def _rate(rate: float) -> str:
    return f"{rate / GB:.3g} GB/s" if rate >= GB else f"{rate / MB:.3g} MB/s"


def _size(size: float) -> str:
    return f"{size / GB:,.3g} GB" if size >= GB else f"{size / MB:.3g} MB"


def _nodes(reports: Iterable[Report]) -> list[str]:
    return list(dict.fromkeys(report.node for report in reports))


def _names(nodes: Sequence[str], most: int = 6) -> str:
    more = f" and {len(nodes) - most} more" if len(nodes) > most else ""
    return f"{', '.join(nodes[:most])}{more}"


def _grouped(reports: Sequence[Report], key: Callable[[Report], str]) -> dict[str, list[Report]]:
    groups: dict[str, list[Report]] = {}
    for report in reports:
        groups.setdefault(key(report), []).append(report)
    return groups


def _counted(names: Iterable[str]) -> str:
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return ", ".join(f"{count} × {name}" for name, count in counts.items())
