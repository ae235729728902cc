"""Training a speech LLM here and under transformers' Trainer: audio per second, and memory.

    python tools/bench/peer_step.py --encoder WHISPER --llm LM --data MANIFEST [--cases frozen all]
    python tools/bench/peer_step.py --recipe demo --data corpus/demo/train.jsonl

Both train the same model (a Whisper encoder, a two-layer adaptor, a causal LM; or those of a
recipe, nothing random) on the same recordings, transcripts and prompt, in float32 on a CPU, no
gradient checkpointing, with one worker process for the data and as many threads. ``ours`` is this
project's dataloader and engine on one rank; ``peer`` is `peer_trainer.py`. A step has about
``--utterances`` utterances' audio on each side. Case ``frozen`` trains adaptor and LM, ``all`` the
encoder too.

What makes the difference is shown by sides with changes, joined by "+":

- ``ours+pad30``: the encoder sees 30 s, as the peer's; ``ours+random``: batches at random
- ``peer+longest``: pads to the batch's longest utterance; ``peer+grouped``: batches of similar
  length; ``peer+fused``: this project's LM head, on target positions alone; ``peer+adaptor``: its
  adaptor, on valid frames alone; ``peer+deepspeed``: under our DeepSpeed settings
- ``+x2``, ``+x4``: a step of as many micro-batches

First, the loss and the adaptor's gradient of both must agree, to 1e-3, on the same utterances
padded to 30 s (and ending in 25 ms of silence). Each measurement is a fresh process; sides take
turns, round after round. One line a case and side is recorded: ``audio_s_per_s`` by the wall clock
and ``audio_s_per_cpu_s`` (of the process without its worker, for a busy machine), the process's
``peak_mb`` (resident set, without its worker; ``libraries_mb``: before there is a model), and how
many times as fast ours is, within each round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import peer_trainer
from common import record
from marks import Throughput
from peer_trainer import OwnCollator, PeerOptions, SpeechCollator

from dsasr import config
from dsasr.build import Builder
from dsasr.data.audio.decoding import decode
from dsasr.data.dataloader import bucketing, collate
from dsasr.data.manifests.registry import read_manifest
from dsasr.data.shards.pack import PackConfig, pack
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
from dsasr.utils import distributed
from dsasr.utils.errors import UserError, run_tool
from dsasr.utils.library_warnings import silence_library_warnings
from dsasr.utils.memory import process_bytes

CASES = {"frozen": ("adaptor", "llm"), "all": ("encoder", "adaptor", "llm")}
CHANGES = {
    "ours": ("pad30", "random"),
    "peer": ("longest", "grouped", "fused", "adaptor", "deepspeed"),
}
MICRO = {"x2": 2, "x4": 4}
LADDER = (
    "ours", "peer", "peer+longest", "peer+longest+grouped", "peer+longest+grouped+fused",
    "peer+fused", "ours+pad30", "ours+random",
)  # fmt: skip
# With a recipe's encoder, which takes audio of any length.
RECIPE_LADDER = (
    "ours", "peer+deepspeed", "peer", "peer+grouped", "peer+fused", "peer+adaptor",
    "peer+grouped+fused+adaptor", "ours+random",
)  # fmt: skip
MAX_SECONDS = 30.0
PADDING = 0.03  # share of a batch here
TOLERANCE = 1e-3


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


# -- ours ------------------------------------------------------------------------------------------


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


# -- the peer --------------------------------------------------------------------------------------


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
        model, _rows(options), collator(options, side, builder), throughput,
        Path(options.folder), options.utterances // side.accumulate, side.accumulate,
        options.workers, read_ds_config(options.deepspeed),
    )  # fmt: skip
    trained = sum(getattr(p, "ds_numel", p.numel()) for p in _trained(model))
    return throughput.fields() | {"trained": trained, "libraries_mb": libraries / 2**20}


def _rows(options: argparse.Namespace) -> list[Any]:
    return [u for u in read_manifest(options.data).utterances if u.duration <= MAX_SECONDS]


# -- the check -------------------------------------------------------------------------------------


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
    rows = {sample_key(row.id): row for row in _rows(options)}
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


# -- measuring -------------------------------------------------------------------------------------

CHILDREN = {"check": check, "ours": train_ours, "peer": train_peer}


def child(options: argparse.Namespace) -> None:
    """One measurement in this process; the last line printed is its JSON."""
    kind, name, case = options.child
    silence_library_warnings()
    found = CHILDREN[kind](options, Side.parse(name), case)
    print(json.dumps(found), flush=True)


def in_child(options: argparse.Namespace, kind: str, name: str, case: str) -> dict[str, Any]:
    """What a fresh process finds. Raises RuntimeError with its last words if it fails."""
    flags = [f"--{key.replace('_', '-')}={getattr(options, key)}" for key in (*KEYS, *HIDDEN)]
    command = [sys.executable, os.path.abspath(__file__), "--child", kind, name, case, *flags]
    environment = os.environ | {
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": str(options.threads),
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{case} {name}:\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(options: argparse.Namespace, case: str) -> None:
    found = in_child(options, "check", "ours", case)
    if max(found.values()) > TOLERANCE:
        raise UserError(f"ours and the peer are not the same model: {found}; mend that first")
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in options.sides}
    for number in range(options.rounds):
        for name in options.sides:
            runs[name].append(in_child(options, Side.parse(name).base, name, case))
            speed = runs[name][-1]["audio_s_per_s"]
            print(f"round {number + 1}, {case}, {name}: {speed:.2f}", file=sys.stderr, flush=True)
    for name, measured in runs.items():
        record("peer_step", case=case, side=name, **line(options, runs["ours"], measured), **found)


def line(
    options: argparse.Namespace, ours: list[dict[str, Any]], measured: list[dict[str, Any]]
) -> dict[str, Any]:
    """What is recorded of one side, beside its name."""
    if {m["trained"] for m in measured} != {m["trained"] for m in ours}:
        raise UserError("the sides train different parameters: a folder has more than its config")

    def middle(key: str, of: list[dict[str, Any]] = measured) -> float:
        return statistics.median(m[key] for m in of)

    ratios = [a["audio_s_per_s"] / b["audio_s_per_s"] for a, b in zip(ours, measured, strict=True)]
    rates = [m["audio_s_per_s"] for m in measured]
    return {
        "encoder": options.recipe or Path(options.encoder).name,
        "llm": options.recipe or Path(options.llm).name,
        "data": Path(options.data).resolve().parent.name,
        "parameters_trained": measured[0]["trained"],
        "dtype": "float32",
        "matmul": options.matmul,
        "deepspeed": options.deepspeed,
        "workers": options.workers,
        "rounds": options.rounds,
        "steps": measured[0]["steps"],
        "clock": "wall",
        "audio_s_per_step": round(middle("audio_s_per_step"), 1),
        "utterances_per_step": round(middle("utterances_per_step"), 1),
        "audio_s_per_s": round(statistics.median(rates), 3),
        "spread": round((max(rates) - min(rates)) / statistics.median(rates), 3),
        "audio_s_per_cpu_s": round(middle("audio_s_per_cpu_s"), 3),
        "peak_mb": round(middle("peak_mb"), 1),
        "libraries_mb": round(middle("libraries_mb"), 1),
        "ours_over_this": round(statistics.median(ratios), 3),
        "ours_over_this_range": [round(min(ratios), 3), round(max(ratios), 3)],
        "ours_over_this_by_cpu": round(
            middle("audio_s_per_cpu_s", ours) / middle("audio_s_per_cpu_s"), 3
        ),
        "our_peak_over_this": round(middle("peak_mb", ours) / middle("peak_mb"), 3),
    }


# -- the command -----------------------------------------------------------------------------------

# Options that a measurement's own process gets too.
KEYS = ("recipe", "encoder", "llm", "data", "utterances", "stack", "pack", "seconds", "warm_up",
        "workers", "matmul", "deepspeed", "threads")  # fmt: skip
HIDDEN = ("shards", "folder", "mean_seconds", "longest_seconds")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="", help="whose model and features both have")
    parser.add_argument("--encoder", default="", help="folder of a Whisper")
    parser.add_argument("--llm", default="", help="folder of a causal LM with its tokenizer")
    parser.add_argument("--data", required=True, help="a JSONL manifest with durations")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--sides", nargs="+", default=list(LADDER[:2]), help="first of all ours")
    parser.add_argument("--ladder", action="store_true", help="all sides that show a difference")
    parser.add_argument("--utterances", type=int, default=16, help="of a step, about")
    parser.add_argument("--stack", type=int, default=8, help="encoder frames of a speech token")
    parser.add_argument("--pack", type=int, default=0, help="model.llm.pack of ours")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20, help="of a measurement, at least")
    parser.add_argument("--warm-up", type=int, default=1, help="steps before it")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--matmul", default="highest", choices=("highest", "high", "medium"))
    parser.add_argument("--deepspeed", default="zero1")
    for name in HIDDEN:
        kind = float if name.endswith("seconds") else str
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=kind, help=argparse.SUPPRESS)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if bool(options.recipe) == bool(options.encoder and options.llm):
        raise UserError("give --recipe, or --encoder and --llm")
    if options.ladder:
        options.sides = list(RECIPE_LADDER if options.recipe else LADDER)
    for name in options.sides:
        if options.utterances % Side.parse(name).accumulate:
            raise UserError(f"--utterances {options.utterances}: no multiple of {name}'s parts")
    if options.sides[0] != "ours" or options.rounds < 1 or options.warm_up < 1:
        raise UserError("--sides: begin with ours; --rounds and --warm-up: at least 1")
    return options


def main() -> None:
    options = parse()
    if options.child:
        child(options)
        return
    rows = _rows(options)
    options.mean_seconds = statistics.fmean(row.duration for row in rows)
    options.longest_seconds = max(row.duration for row in rows)
    with tempfile.TemporaryDirectory(prefix="dsasr-peer-") as temporary:
        options.folder, options.shards = temporary, str(Path(temporary) / "shards")
        pack(rows, Path(options.shards), PackConfig(shard_size=100))
        for case in options.cases:
            measure(options, case)


if __name__ == "__main__":
    # A measurement's process may have joined a process group.
    distributed.end_process(run_tool(main))
