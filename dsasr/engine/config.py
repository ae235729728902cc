"""The recipe's engine settings: DeepSpeed JSON by name, precision, optimizer states on disk."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from dsasr.config import nearest
from dsasr.engine.deepspeed_keys import check_keys
from dsasr.engine.offload import OffloadConfig
from dsasr.utils import distributed, ranges
from dsasr.utils.errors import UserError, message_of
from dsasr.utils.package_data import packaged_folder
from dsasr.utils.ranges import Dropout, NonNegativeFloat, PositiveFloat

DS_CONFIGS = packaged_folder("ds_configs")


@dataclass(frozen=True)
class EngineConfig:
    # DeepSpeed JSON: a file of ds_configs/ by name (zero1 … zero3-nvme), or a path; keys that
    # training is not tested with are refused
    deepspeed: str = "zero3"
    # of weights and activations; auto: bf16 on a GPU, fp32 on a CPU
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    # fp32 matrix products: medium may pass through bf16; on an AMD EPYC it takes oneDNN in place of
    # MKL, twice as fast and as exact
    matmul: Literal["highest", "high", "medium"] = "highest"
    # global gradient norm that gradients are clipped to; 0: no clipping
    max_grad_norm: NonNegativeFloat = 1.0
    betas: tuple[Dropout, Dropout] = (0.9, 0.98)  # AdamW's β₁ and β₂, each in [0, 1)
    eps: PositiveFloat = 1e-8  # AdamW's ε
    # where the inactive branch's optimizer states go
    offload: OffloadConfig = field(default_factory=OffloadConfig)
    # zero3-nvme: folder on each machine's own disk, for master weights and moments
    nvme: str | None = None

    def __post_init__(self) -> None:
        ranges.check(self)
        settings = read_ds_config(self.deepspeed)
        check_keys(settings, self.deepspeed)
        needs_nvme = on_nvme(settings)
        if needs_nvme and not self.nvme:
            raise UserError(
                f"engine.deepspeed={self.deepspeed} keeps optimizer states on a disk: give "
                "engine.nvme=FOLDER, on each machine's own NVMe"
            )
        if self.nvme and not needs_nvme:
            raise UserError(
                f"engine.nvme is for engine.deepspeed=zero3-nvme, not for {self.deepspeed}"
            )


def read_ds_config(name_or_path: str) -> dict[str, Any]:
    """A DeepSpeed JSON by packaged name or path."""
    path = Path(name_or_path)
    if path.suffix != ".json":
        path = DS_CONFIGS / f"{name_or_path}.json"
    if not path.is_file():
        names = [p.stem for p in DS_CONFIGS.glob("*.json")]
        raise UserError(f"no DeepSpeed config '{name_or_path}'{nearest(name_or_path, names)}")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    zero = settings.get("zero_optimization", {}) if isinstance(settings, dict) else None
    if not isinstance(zero, dict):
        raise UserError(f"{path} must hold a mapping, and so must its zero_optimization")
    return settings


def on_nvme(settings: dict[str, Any]) -> bool:
    """Whether DeepSpeed keeps optimizer states on a disk under these settings."""
    offload = settings.get("zero_optimization", {}).get("offload_optimizer") or {}
    return offload.get("device") == "nvme"


def check_nvme(config: EngineConfig) -> None:
    """Raise `UserError` where the recipe keeps optimizer states on a disk and DeepSpeed cannot."""
    if not on_nvme(read_ds_config(config.deepspeed)):
        return
    from deepspeed.ops.op_builder import AsyncIOBuilder

    try:
        AsyncIOBuilder().load(verbose=False)
    except Exception as error:  # compilers and loaders raise many types
        raise UserError(
            f"engine.deepspeed={config.deepspeed}: DeepSpeed's async_io cannot be built here "
            f"({message_of(error)}): install libaio-dev and a C++ compiler, or give zero3-offload"
        ) from None
    try:
        Path(config.nvme).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"engine.nvme={config.nvme} cannot be written: {error}") from None


def nvme_folder(config: EngineConfig, run: Path, branch: str) -> Path:
    """A folder below ``engine.nvme`` for one branch of one run, unique on this machine."""
    digest = hashlib.blake2b(str(Path(run).resolve()).encode(), digest_size=6).hexdigest()
    return Path(config.nvme).resolve() / f"dsasr-{digest}" / branch


def deepspeed_settings(config: EngineConfig, nvme_path: Path | None = None) -> dict[str, Any]:
    """DeepSpeed's settings, without those of a stage; ``nvme_path``: `nvme_folder`, if needed."""
    settings = read_ds_config(config.deepspeed) | {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": precision(config) is torch.bfloat16},
        "steps_per_print": 1 << 60,
    }
    if nvme_path is not None and on_nvme(settings):
        settings["zero_optimization"]["offload_optimizer"]["nvme_path"] = str(nvme_path)
    return settings


def precision(config: EngineConfig) -> torch.dtype:
    """The dtype of weights and activations (masters and moments are always fp32)."""
    if config.precision == "auto":
        return torch.bfloat16 if distributed.device().type == "cuda" else torch.float32
    return torch.bfloat16 if config.precision == "bf16" else torch.float32


def work_around_pinned_reads(zero: Any) -> None:
    """Let DeepSpeed read gradients from a disk correctly; ``zero``: its ZeRO optimizer.

    A gradient's offset in its group's pinned buffer is any multiple of 4 bytes; a direct read needs
    a multiple of 512. DeepSpeed 0.19 takes any part of a pinned buffer to be aligned: the read
    fails without an error, and the step uses what the buffer had before. A gradient in pageable
    memory it reads through an aligned buffer of its own.
    """
    swapper = getattr(zero, "optimizer_swapper", None)
    if swapper is None:
        return
    read = swapper._swap_in_pinned_gradients

    def read_pageable(aio_handle: Any, parameter: torch.Tensor, gradient_tensor: torch.Tensor):
        pageable = torch.zeros_like(gradient_tensor, pin_memory=False)
        read(aio_handle, parameter, pageable)
        gradient_tensor.copy_(pageable)

    swapper._swap_in_pinned_gradients = read_pageable
