"""What a recipe says of the engine: DeepSpeed's JSON files by name, precision, disks."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from dsasr.config import nearest
from dsasr.engine.offload import OffloadConfig
from dsasr.utils import distributed
from dsasr.utils.errors import UserError
from dsasr.utils.packaged import packaged_folder

DS_CONFIGS = packaged_folder("ds_configs")


@dataclass(frozen=True)
class EngineConfig:
    # DeepSpeed JSON: a file of ds_configs/ by name (zero1 … zero3-nvme), or a path
    deepspeed: str = "zero3"
    # of weights and activations; auto: bf16 on a GPU, fp32 on a CPU
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    # fp32 products: medium may pass through bf16; on an AMD EPYC it takes oneDNN in place of MKL,
    # twice as fast and as exact
    matmul: Literal["highest", "high", "medium"] = "highest"
    max_grad_norm: float = 1.0  # global gradient norm that gradients are clipped to; 0: no clipping
    betas: tuple[float, float] = (0.9, 0.98)  # AdamW's β₁ and β₂, each in [0, 1)
    eps: float = 1e-8  # AdamW's ε
    # where the inactive branch's optimizer states go
    offload: OffloadConfig = field(default_factory=OffloadConfig)
    # zero3-nvme: folder on each machine's own disk, for master weights and moments
    nvme: str | None = None

    def __post_init__(self) -> None:
        swaps = on_nvme(read_ds_config(self.deepspeed))
        if swaps and not self.nvme:
            raise UserError(
                f"engine.deepspeed={self.deepspeed} keeps optimizer states on a disk: give "
                "engine.nvme=FOLDER, on each machine's own NVMe"
            )
        if self.nvme and not swaps:
            raise UserError(
                f"engine.nvme is for engine.deepspeed=zero3-nvme, not for {self.deepspeed}"
            )
        if not all(0 <= b < 1 for b in self.betas):
            raise UserError("engine.betas must lie in [0, 1)")


def read_ds_config(name_or_path: str) -> dict[str, Any]:
    """A DeepSpeed JSON by packaged name or path."""
    path = Path(name_or_path)
    if path.suffix != ".json":
        path = DS_CONFIGS / f"{name_or_path}.json"
    if not path.is_file():
        names = [p.stem for p in DS_CONFIGS.glob("*.json")]
        raise UserError(f"no DeepSpeed config '{name_or_path}'{nearest(name_or_path, names)}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None


def on_nvme(settings: dict[str, Any]) -> bool:
    """Whether DeepSpeed keeps optimizer states on a disk by these settings."""
    offload = settings.get("zero_optimization", {}).get("offload_optimizer") or {}
    return offload.get("device") == "nvme"


def nvme_folder(config: EngineConfig, run: Path, branch: str) -> Path:
    """A branch's own folder below ``engine.nvme``: other runs and branches have others."""
    place = hashlib.blake2b(str(Path(run).resolve()).encode(), digest_size=6).hexdigest()
    return Path(config.nvme).resolve() / f"dsasr-{place}" / branch


def settings(config: EngineConfig, swap_to: Path | None = None) -> dict[str, Any]:
    """DeepSpeed's settings, without those of a stage; ``swap_to``: `nvme_folder`, where needed."""
    held = read_ds_config(config.deepspeed) | {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": precision(config) is torch.bfloat16},
        "steps_per_print": 1 << 60,
    }
    if swap_to is not None and on_nvme(held):
        held["zero_optimization"]["offload_optimizer"]["nvme_path"] = str(swap_to)
    return held


def precision(config: EngineConfig) -> torch.dtype:
    """The dtype of weights and activations (masters and moments are always fp32)."""
    if config.precision == "auto":
        return torch.bfloat16 if distributed.device().type == "cuda" else torch.float32
    return torch.bfloat16 if config.precision == "bf16" else torch.float32


def read_gradients_whole(zero: Any) -> None:
    """Make DeepSpeed read gradients from a disk to where they belong; ``zero``: its ZeRO optimizer.

    A gradient's place in its group's locked buffer is any multiple of four bytes, a direct read
    needs one of 512. DeepSpeed 0.19 takes any part of a locked buffer to be fit for that: the read
    fails, nothing is said, and the step is taken with what the buffer held. Plain memory it reads
    by way of an aligned buffer of its own.
    """
    swapper = getattr(zero, "optimizer_swapper", None)
    if swapper is None:
        return
    read = swapper._swap_in_pinned_gradients

    def read_plain(aio_handle: Any, parameter: torch.Tensor, gradient_tensor: torch.Tensor) -> None:
        plain = torch.zeros_like(gradient_tensor, pin_memory=False)
        read(aio_handle, parameter, plain)
        gradient_tensor.copy_(plain)

    swapper._swap_in_pinned_gradients = read_plain
