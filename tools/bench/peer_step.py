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
from pathlib import Path
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from common import record
from peer_sides import CASES, Side, check, manifest_rows, train_ours, train_peer

from dsasr.data.shards.pack import PackConfig, pack
from dsasr.utils import distributed
from dsasr.utils.errors import UserError, run_tool
from dsasr.utils.library_warnings import silence_library_warnings

LADDER = (
    "ours", "peer", "peer+longest", "peer+longest+grouped", "peer+longest+grouped+fused",
    "peer+fused", "ours+pad30", "ours+random",
)  # fmt: skip
# With a recipe's encoder, which takes audio of any length.
RECIPE_LADDER = (
    "ours", "peer+deepspeed", "peer", "peer+grouped", "peer+fused", "peer+adaptor",
    "peer+grouped+fused+adaptor", "ours+random",
)  # fmt: skip
TOLERANCE = 1e-3


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
    # One process: no rank of a job that this one may be part of.
    environment = {k: v for k, v in os.environ.items() if k not in RANK_VARIABLES} | {
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
        raise UserError(f"ours and the peer are not the same model: {found}; fix that first")
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

RANK_VARIABLES = {
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
}
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
    rows = manifest_rows(options)
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
