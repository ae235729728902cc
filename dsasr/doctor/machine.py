"""What a rank finds out about its machine alone: versions, code, GPUs, links. No waits beyond
`SECONDS`."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import os
import platform
import socket
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dsasr.utils.environment import PACKAGES, package_versions
from dsasr.utils.package_data import PACKAGE

SECONDS = 10.0  # that nvidia-smi may take: a GPU that has fallen off the bus lets it hang
MEMORY_IN_USE = 1.0  # GB that the driver itself may take of a GPU
# nvidia-smi's names (--help-query-gpu); what a GPU does not have reads "[N/A]" or the like.
FIELDS = (
    "index", "name", "memory.used", "memory.total", "ecc.errors.uncorrected.volatile.total",
    "remapped_rows.pending", "remapped_rows.failure", "retired_pages.pending",
    "clocks_throttle_reasons.hw_thermal_slowdown",
    "clocks_throttle_reasons.hw_power_brake_slowdown",
    "pcie.link.gen.max", "pcie.link.width.current",  # an idle GPU lowers its generation
)  # fmt: skip
PLAIN = 5  # of them that every driver has: it refuses a query with a name that it does not know
PCIE_GB = {1: 0.25, 2: 0.5, 3: 0.985, 4: 1.969, 5: 3.938, 6: 7.563}  # GB/s of a lane, one way


@dataclass(frozen=True)
class Gpu:
    """One GPU as nvidia-smi reports it; ``troubles`` say what is wrong with it."""

    index: int
    name: str
    used: float = 0.0  # GB, before this job takes any
    total: float = 0.0  # GB
    pcie: float = 0.0  # GB/s, one way; 0: not known
    troubles: tuple[str, ...] = ()


@dataclass(frozen=True)
class Link:
    """What connects the ranks; ``rate``: GB/s one way, 0: not known."""

    name: str = ""
    rate: float = 0.0


def node_name() -> str:
    """The node as Slurm calls it, else the host's name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def is_first_rank() -> bool:
    """Whether this is the first rank of its node, which speaks for the others of it."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def now() -> float:
    """This machine's wall clock, in seconds since 1970."""
    return time.time()


def versions() -> dict[str, str]:
    """Versions of what must be equal on all ranks, the code of this package included."""
    import torch

    found = {"python": platform.python_version(), **package_versions(PACKAGES)}
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
        with contextlib.suppress(RuntimeError, AttributeError):
            found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        if driver := _smi("--query-gpu=driver_version", "--format=csv,noheader"):
            found["driver"] = driver.splitlines()[0].strip()
    return {**found, "dsasr's code": code_digest()}


def code_digest(package: Path = PACKAGE) -> str:
    """A short hash of the package's Python files: two checkouts of one version may differ."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:10]


# -- GPUs ----------------------------------------------------------------------------------------


def gpus() -> tuple[list[Gpu], str]:
    """The machine's GPUs, and why they are not known (empty: they are)."""
    for count in (len(FIELDS), PLAIN):
        query = f"--query-gpu={','.join(FIELDS[:count])}"
        if (text := _smi(query, "--format=csv,noheader,nounits")) is not None:
            break
    else:
        return [], f"nvidia-smi does not answer within {SECONDS:g} s, or is not there"
    return parse_gpus(text), ""


def gpus_of_node() -> tuple[list[Gpu], str]:
    """`gpus` on the first rank of a node that computes on GPUs, nothing on others; call it before
    any rank takes memory of a GPU."""
    from dsasr.utils import distributed

    if not is_first_rank():
        return [], ""
    if distributed.device().type == "cuda":
        return gpus()
    given = os.environ.get("SLURM_GPUS_ON_NODE", "0")
    if given not in ("", "0") and os.environ.get("DS_ACCELERATOR") != "cpu":
        return [], f"Slurm has given it {given} GPUs, and torch sees none"
    return [], ""


def parse_gpus(text: str) -> list[Gpu]:
    """GPUs from nvidia-smi's CSV with the columns `FIELDS`; lines that are none are skipped."""
    found = []
    for cells in csv.reader(text.splitlines(), skipinitialspace=True):
        row = dict(zip(FIELDS, (cell.strip() for cell in cells), strict=False))
        with contextlib.suppress(ValueError, KeyError):
            found.append(_gpu(row))
    return found


def _gpu(row: Mapping[str, str]) -> Gpu:
    def count(key: str) -> int:
        value = row.get(key, "")
        return int(value) if value.isdigit() else 0

    troubles = []
    if errors := count("ecc.errors.uncorrected.volatile.total"):
        troubles.append(f"{errors} uncorrected memory errors since its last reset")
    if row.get("remapped_rows.failure") == "1" or row.get("remapped_rows.failure") == "Yes":
        troubles.append("a memory row could not be remapped")
    pending = {row.get("remapped_rows.pending"), row.get("retired_pages.pending")}
    if pending & {"1", "Yes"}:
        troubles.append("memory waits for a reset to be taken out of use")
    for key in FIELDS[8:10]:
        if row.get(key) == "Active":
            troubles.append(f"slowed down by {key.rpartition('.')[2].replace('_', ' ')}")
    used = count("memory.used") * 1.048576e-3  # MiB
    if used > MEMORY_IN_USE:
        troubles.append(f"{used:.1f} GB of its memory are another process's")
    lane = PCIE_GB.get(count("pcie.link.gen.max"), 0.0)
    return Gpu(
        int(row["index"]), row["name"], used, count("memory.total") * 1.048576e-3,
        lane * count("pcie.link.width.current"), tuple(troubles),
    )  # fmt: skip


def _smi(*arguments: str) -> str | None:
    """What nvidia-smi prints; None where it is missing, fails or hangs."""
    try:
        done = subprocess.run(
            ["nvidia-smi", *arguments], capture_output=True, text=True, timeout=SECONDS
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None


# -- links ---------------------------------------------------------------------------------------


def inside_link(gpu: Gpu | None) -> Link:
    """Between the GPUs of a node: NVLink, else PCIe; not known between CPU ranks."""
    if gpu is None:
        return Link()
    text = _smi("nvlink", "--status", "-i", str(gpu.index)) or ""
    if rate := parse_nvlink(text):
        return Link("NVLink", rate)
    return Link("PCIe", gpu.pcie)


def parse_nvlink(text: str) -> float:
    """GB/s one way over all links of a GPU, from lines such as ``Link 0: 26.562 GB/s``."""
    total = 0.0
    for line in text.splitlines():
        words = line.split()
        if len(words) == 4 and words[0] == "Link" and words[3] == "GB/s":
            with contextlib.suppress(ValueError):
                total += float(words[2])
    return total


def network_link(system: Path = Path("/sys/class"), route: Path = Path("/proc/net/route")) -> Link:
    """Of a node to others: all its InfiniBand ports that are up, else the network interface that
    NCCL and Gloo are set to use, else that of the default route."""
    rates = []
    for port in sorted(system.glob("infiniband/*/ports/*")):
        with contextlib.suppress(OSError, ValueError, IndexError):
            if "ACTIVE" in (port / "state").read_text(encoding="utf-8"):
                rates.append(float((port / "rate").read_text(encoding="utf-8").split()[0]) / 8)
    if rates:
        return Link(f"{len(rates)} InfiniBand port{'s' * (len(rates) > 1)}", sum(rates))
    given = os.environ.get("NCCL_SOCKET_IFNAME") or os.environ.get("GLOO_SOCKET_IFNAME") or ""
    name = given.lstrip("^=").split(",")[0] if not given.startswith("^") else ""
    name = name or _default_interface(route)
    with contextlib.suppress(OSError, ValueError):
        megabits = float((system / "net" / name / "speed").read_text(encoding="utf-8"))
        if name and megabits > 0:
            return Link(name, megabits / 8000)
    return Link(name)


def _default_interface(route: Path) -> str:
    with contextlib.suppress(OSError, IndexError):
        for line in route.read_text(encoding="utf-8").splitlines()[1:]:
            fields = line.split()
            if fields[1] == "00000000":
                return fields[0]
    return ""
