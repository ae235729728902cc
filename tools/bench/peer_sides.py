"""The sides that `peer_step.py` compares, each trained in this process, and that they agree."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import peer_trainer
import torch
from marks import Throughput
from peer_trainer import OwnCollator, PeerOptions, SpeechCollator

from dsasr import config
from dsasr.build import Builder
from dsasr.data.audio.decoding import decode
from dsasr.data.dataloader import bucketing, collate
from dsasr.data.manifests.registry import read_manifest
from dsasr.data.shards.writer import sample_key
from dsasr.engine import process_setup
from dsasr.engine.branch_engine import BranchEngine
from dsasr.engine.config import read_ds_config
from dsasr.engine.partitioner import partitioner
from dsasr.kernels import dispatch
from dsasr.model.encoders.protocol import valid_frames
from dsasr.recipe import Recipe
from dsasr.recipe import load as load_recipe
from dsasr.training import preflight
from dsasr.utils.errors import UserError
from dsasr.utils.memory import process_bytes

CASES = {"frozen": ("adaptor", "llm"), "all": ("encoder", "adaptor", "llm")}


CHANGES = {
    "ours": ("pad30", "random"),
    "peer": ("longest", "grouped", "fused", "adaptor", "deepspeed"),
}


MICRO = {"x2": 2, "x4": 4}


MAX_SECONDS = 30.0


PADDING = 0.03  # share of a batch here


@dataclass(frozen=True)
class Side:
    """One of ours and peer, its changes, and micro-batches of a step."""

    base: str
    changes: tuple[str, ...]
    accumulate: int

    @classmethod
    def parse(cls, name: str) -> Side:
        """Raises `UserError` for an unknown name."""
        base, *parts = name.split("+")
        changes = tuple(part for part in parts if part not in MICRO)
        unknown = [part for part in changes if part not in CHANGES.get(base, ())]
        if base not in CHANGES or unknown:
            known = "; ".join(f"{b} with {', '.join((*c, *MICRO))}" for b, c in CHANGES.items())
            raise UserError(f"unknown side '{name}': {known}, joined by +")
        return cls(base, changes, max([MICRO[p] for p in parts if p in MICRO], default=1))


def recipe(options: argparse.Namespace, side: Side, case: str, samples: int = 256) -> Recipe:
    """A recipe of one stage that trains the case's parts."""
    seconds = options.mean_seconds * options.utterances / side.accumulate / (1 - PADDING)
    frames = round(100 * max(seconds, options.longest_seconds)) + 1
    values = {
        "run": options.folder,
        "data": {
            "train": [{"name": "bench", "shards": options.shards}],
            "valid": [{"name": "bench", "shards": options.shards}],
            "augment": None,
            "dataloader": {
                "num_workers": options.workers,
                "batch": {
                    "frames": frames,
                    "samples": samples,
                    "min_seconds": 0.0,
                    "max_seconds": MAX_SECONDS,
                },
            },
        },
        "model": {
            "encoder": {"path": options.encoder, "pad_to": 30 if "pad30" in side.changes else 0},
            "adaptor": {"stack": options.stack},
            "llm": {"path": options.llm, "pack": options.pack},
            "pretrain": {"spec": None, "chunks": None},
            "sft": {"spec": False},
        },
        "stages": [
            {
                "name": "sft",
                "branch": "sft",
                "trains": dict.fromkeys(CASES[case], 2e-5),
                "steps": 10_000,
                "grad_accum_steps": side.accumulate,
            }
        ],
        "engine": {"deepspeed": options.deepspeed, "matmul": options.matmul},
    }
    if options.recipe:
        named = load_recipe(options.recipe, [])
        model = config.to_plain(named.model)
        model["encoder"]["dropout"] = 0.0
        model["pretrain"] |= {"spec": None, "chunks": None}
        model["sft"]["spec"] = False
        model["llm"]["pack"] = options.pack or model["llm"]["pack"]
        values["model"] = model
        values["data"] |= {"cmvn": named.data.cmvn, "phonemes": named.data.phonemes}
        # Not trained: a recipe must say where its encoder comes from.
        rates = {"encoder": 1e-3, "ctc": 1e-3}
        values["stages"] += [
            {"name": "pretrain", "branch": "pretrain", "trains": rates, "steps": 1}
        ]
    return config.build(Recipe, values)


def random_batches(size: int) -> None:
    """Let the planner cut batches of ``size`` utterances in random order."""

    def order(frames: np.ndarray, chars: np.ndarray, width: float, rng) -> np.ndarray:
        return rng.permutation(len(frames))

    def split(frames: np.ndarray, chars: np.ndarray, cfg: bucketing.BatchConfig) -> np.ndarray:
        firsts = np.arange(0, len(frames), size)
        return np.stack([firsts, np.minimum(firsts + size, len(frames))], 1)

    bucketing.bucket_order, bucketing.split_into_batches = order, split


def train_ours(options: argparse.Namespace, side: Side, case: str) -> dict[str, Any]:
    if "random" in side.changes:
        random_batches(options.utterances // side.accumulate)
    cfg = recipe(options, side, case)
    process_setup.set_threads(cfg.engine)
    dispatch.select(cfg.kernels)
    process_setup.init_distributed()
    libraries = process_bytes()
    builder, stage = Builder(cfg), cfg.stage("sft")
    preflight.check(builder)
    engine = BranchEngine(
        "sft", builder.module("sft", partitioner(cfg.engine)), cfg.engine, Path(options.folder)
    )
    engine.enter(stage)
    throughput = Throughput(options.warm_up, options.seconds)
    with builder.train_dataloader(stage, None) as loader:
        for number in count():
            batches = [next(loader) for _ in range(stage.grad_accum_steps)]
            report = engine.step(batches, number)
            if number % 10 == 0 and not torch.isfinite(report.sums["nll"][0]):
                raise RuntimeError(f"the loss of step {number} is not finite")
            for batch in batches:
                throughput.add(batch.durations)
            if throughput.step():
                break
    trained = sum(getattr(p, "ds_numel", p.numel()) for p in _trained(engine.module))
    return throughput.fields() | {"trained": trained, "libraries_mb": libraries / 2**20}


def _trained(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def peer_model(
    options: argparse.Namespace, side: Side, builder: Builder
) -> peer_trainer.SpeechModel:
    adaptor = builder.recipe.model.adaptor
    peer = PeerOptions(**dict.fromkeys(side.changes, True))
    if not options.recipe:
        return peer_trainer.load_model(options.encoder, options.llm, adaptor, peer)
    parts = builder.module("sft")
    llm = peer_trainer.load_llm(str(builder.llm_folder))
    return peer_trainer.OwnSpeechModel(parts.encoder, llm, adaptor, peer)


def collator(options: argparse.Namespace, side: Side, builder: Builder) -> SpeechCollator:
    front_end, stack = builder.front_end, builder.recipe.model.adaptor.stack
    if options.recipe:
        return OwnCollator(front_end, builder.encoder_shape, builder.tokenizer, stack)
    extractor = peer_trainer.WhisperFeatureExtractor(feature_size=front_end.bins)
    return SpeechCollator(extractor, builder.tokenizer, stack, "longest" in side.changes)


def train_peer(options: argparse.Namespace, side: Side, case: str) -> dict[str, Any]:
    torch.set_float32_matmul_precision(options.matmul)
    builder = Builder(recipe(options, Side.parse("ours"), case))
    libraries = process_bytes()
    model = peer_model(options, side, builder)
    model.freeze(CASES[case])
    throughput = Throughput(options.warm_up, options.seconds)
    if model.options.deepspeed:
        process_setup.init_distributed()
    peer_trainer.train(
        model, manifest_rows(options), collator(options, side, builder), throughput,
        Path(options.folder), options.utterances // side.accumulate, side.accumulate,
        options.workers, read_ds_config(options.deepspeed),
    )  # fmt: skip
    trained = sum(getattr(p, "ds_numel", p.numel()) for p in _trained(model))
    return throughput.fields() | {"trained": trained, "libraries_mb": libraries / 2**20}


def manifest_rows(options: argparse.Namespace) -> list[Any]:
    return [u for u in read_manifest(options.data).utterances if u.duration <= MAX_SECONDS]


def decode_with_silent_end(*args: Any, **options: Any) -> torch.Tensor:
    """Audio without the frame whose window only begins in it: transformers makes that, ours not."""
    wave = decode(*args, **options)
    wave[-400:] = 0.0
    return wave


def check(options: argparse.Namespace, side: Side, case: str) -> dict[str, Any]:
    """Loss and gradient of both on the same two utterances, in windows of 30 s."""
    ours30 = "ours" if options.recipe else "ours+pad30"
    cfg = recipe(options, Side.parse(ours30), "all", samples=2)
    builder = Builder(cfg)
    collate.decode = peer_trainer.decode = decode_with_silent_end
    with builder.train_dataloader(cfg.stage("sft"), None) as loader:
        batch = next(loader)
    ours = builder.module("sft").train()
    peer = peer_model(options, Side.parse("peer"), builder).train()
    peer.freeze(CASES["all"])
    with torch.no_grad():
        for linear, number in ((peer.projector[0], 1), (peer.projector[2], 2)):
            linear.weight.copy_(getattr(ours.adaptor, f"weight{number}"))
            linear.bias.copy_(getattr(ours.adaptor, f"bias{number}"))
    encode = peer.encode
    rows = {sample_key(row.id): row for row in manifest_rows(options)}
    inputs = collator(options, Side.parse("peer"), builder)([rows[key] for key in batch.keys])
    inputs.pop("seconds")
    # Ours has zeros in an utterance's last stack where the peer has frames of silence.
    lengths_B = ours.encoder.output_lengths(batch.feature_lengths_B)
    peer.encode = lambda *inputs: _masked(encode(*inputs), lengths_B)
    theirs, mine = peer(**inputs), ours(batch)
    theirs["loss"].backward()
    mine.loss.backward()
    a, b = ours.adaptor.weight1.grad, peer.projector[0].weight.grad
    errors = {
        "loss_error": abs(float(mine.loss.detach()) / float(theirs["loss"].detach()) - 1),
        "gradient_error": float((a - b).norm() / b.norm()),
    }
    return {name: float(f"{value:.2g}") for name, value in errors.items()}


def _masked(frames_BSE: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
    return frames_BSE * valid_frames(lengths_B, frames_BSE.shape[1])[..., None]
