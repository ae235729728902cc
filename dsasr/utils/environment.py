"""What a program runs on: machine, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dsasr.utils.package_data import CODE, PACKAGE

PACKAGES = ("torch", "deepspeed", "transformers", "peft", "triton", "numpy")


def environment() -> dict[str, Any]:
    """The machine's name, its GPUs and cores, versions, the commit, and the time (UTC).

    Neither the host's name nor a path is part of it.
    """
    import torch

    versions = {"python": platform.python_version(), **package_versions(PACKAGES)}
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    return {
        "machine": machine(),
        "gpus": torch.cuda.device_count(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "commit": commit([PACKAGE]),
        "versions": versions,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def package_versions(names: Sequence[str]) -> dict[str, str]:
    """Versions of the installed ones of ``names``."""
    versions = {}
    for name in names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def machine() -> str:
    """The GPU's name where there is one, else the CPU's."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(x for x in lines if x.startswith("model name")).split(":", 1)[1].strip()
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def commit(paths: Sequence[Path] = (), ignore: str = "") -> str:
    """The short commit of the checkout that this code is in, with "+" where files below ``paths``
    have changed since, other than ``ignore``; "unknown" outside of a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(CODE), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        return done.stdout.strip()

    try:
        # An installed package may lie inside of another project's checkout.
        git("ls-files", "--error-unmatch", "--", str(PACKAGE / "__init__.py"))
        names = map(str, paths)
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *names).splitlines()
        if ignore:
            changed = [line for line in changed if not line.endswith(ignore)]
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
