"""What a rank sets up before it has a model: threads, precision of products, the process group."""

from __future__ import annotations

import datetime
import logging
import os

import torch

from dsasr.engine import shared_buffers
from dsasr.engine.config import EngineConfig
from dsasr.utils import distributed
from dsasr.utils.errors import UserError


def set_threads(config: EngineConfig) -> None:
    """Set the precision of matrix products, and share this machine's CPU cores among its ranks.

    OMP_NUM_THREADS, where it is set, decides on the cores.
    """
    torch.set_float32_matmul_precision(config.matmul)
    if distributed.device().type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        local = int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1")))
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local))


def init_distributed(timeout: float = 0.0) -> None:
    """Join the job's process group; a process without a launcher becomes a group of one.

    ``timeout``: seconds after which a collective that still waits fails (0: torch's default).
    """
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    for key, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        os.environ.setdefault(key, value)
    if os.environ["WORLD_SIZE"] == "1":
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "0")
    if distributed.device().type == "cuda":
        if int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
            raise UserError(
                f"rank {os.environ['RANK']} has no GPU: this machine has "
                f"{torch.cuda.device_count()}, start no more ranks (deepspeed --num_gpus)"
            )
        torch.cuda.set_device(distributed.device())
    backend = "nccl" if distributed.device().type == "cuda" else "gloo"
    options = {"timeout": datetime.timedelta(seconds=timeout)} if timeout else {}
    shared_buffers.unlink_left()
    deepspeed.init_distributed(
        dist_backend=backend, verbose=False, auto_mpi_discovery=False, **options
    )
    shared_buffers.unlink_own()
