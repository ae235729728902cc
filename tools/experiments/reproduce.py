"""Run the experiment: every system with every seed, one after another; finished ones are kept.

python tools/experiments/reproduce.py --set synth --corpus corpus/experiment --runs runs/experiment

A run that was stopped goes on from its checkpoint; its result appears in
tools/experiments/results/SET/SYSTEM-seedN.json when it is measured, and is not made again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parent))
import systems
from systems import SHORT, SIZES, SYSTEMS, Sizes, System, named

from dsasr import run_data
from dsasr.errors import UserError, run_tool
from dsasr.evaluation import trials
from dsasr.evaluation.hallucination import written
from dsasr.files import atomic_write, text_lines
from dsasr.recogniser import events, finished

TOOLS = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"


def train(values: dict[str, Any], ranks: int) -> Path:
    """Train a recipe to its end, or on from where it stopped; returns the run folder."""
    run = Path(values["run"])
    if finished(run):
        return run
    path = run.with_suffix(".yaml")
    atomic_write(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    with socket.create_server(("127.0.0.1", 0)) as free:  # other trainings may hold the usual port
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner"]
    launcher += ["--num_gpus", str(ranks), "--master_port", str(port)]
    command = [*launcher, str(TOOLS.parent / "dsasr" / "train.py"), "--recipe", str(path)]
    with open(run.with_suffix(".log"), "a", encoding="utf-8") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
    if code or not finished(run):
        raise UserError(f"training {run} failed: see {run.with_suffix('.log')}")
    return run


def tool(name: str, *arguments: Any) -> None:
    command = [sys.executable, str(TOOLS / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"tools/{name} failed: {(done.stderr or done.stdout).strip()[-500:]}")


def before_joint(run: Path) -> Path:
    """The snapshot that the sft branch took last."""
    taken = [e["snapshot"] for e in events(run) if e["event"] == "swap"]
    return run / "snapshots" / taken[-1]


def measure(run: Path, corpus: Path, aligner: Path, args: argparse.Namespace) -> None:
    """The whole suite, and the encoder before and after joint SFT, into the run folder."""
    data = [d for d in (corpus / "shards" / "test", corpus / "shards" / "nonspeech") if d.is_dir()]
    tool("evaluate.py", run, "--data", *data, "--suite", "--report",
         "--clips", args.clips, "--limit", args.limit)  # fmt: skip
    tool("allocation.py", before_joint(run), run, "--data", data[0], "--aligner", aligner,
         "--utterances", args.probe, "--no-control", "--no-random",
         "--out", run / "allocation.jsonl")  # fmt: skip


def per_clip(found: trials.Trials, rules: str) -> dict[str, dict[str, list]]:
    """What bootstraps need of each clip, by condition, in the order of keys."""
    out: dict[str, dict[str, list]] = {}
    for condition in sorted(found.conditions()):
        rows = sorted((r for r in found.rows if r.condition == condition), key=lambda r: r.key)
        scores = {u.key: u.units for u in found.scores(condition, rules).utterances}
        held: dict[str, list] = {"lang": [r.lang for r in rows]}
        if rows[0].reference is None:
            held["characters"] = [written(r.hypothesis) for r in rows]
            held["seconds"] = [round(r.seconds, 3) for r in rows]
        else:
            held["flagged"] = [int(trials.flagged(r)) for r in rows]
        if scores:
            held["errors"] = [scores[r.key].errors for r in rows]
            held["units"] = [scores[r.key].reference for r in rows]
        out[condition] = held
    return out


def result(system: System, kind: str, seed: int, sizes: Sizes, run: Path) -> dict[str, Any]:
    """All that is kept of a finished and measured run."""
    data = run_data.collect(run)
    rows = [json.loads(x) for x in text_lines(run / "allocation.jsonl")]
    before, after = ({k: v for k, v in r.items() if k not in ("run", "data")} for r in rows)
    rules = "plain" if kind == "digits" else "standard"
    found = trials.read(run / "transcripts.jsonl")
    hours = run_data.audio_hours(data)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=TOOLS
    ).stdout.strip()
    return {
        "set": kind,
        "system": system.name,
        "label": system.label,
        "seed": seed,
        "commit": commit,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "when": time.strftime("%Y-%m-%d"),
        "sizes": asdict(sizes),
        "recipe": {k: data_recipe(run)[k] for k in ("stages", "drift")},
        "train_seconds": data.longest,
        "stage_seconds": {
            e["name"]: e["stage_seconds"] for e in data.events if e["event"] == "stage_end"
        },
        "audio_hours": hours,
        "swaps": sum(e["event"] == "swap" for e in data.events),
        "before": before,
        "after": after,
        "cka_through_joint": after.get("cka_to_first"),
        "examples": data.trial["hallucination"]["examples"][:20],
        "clips": per_clip(found, rules),
    }


def data_recipe(run: Path) -> dict[str, Any]:
    return yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--set", choices=sorted(SIZES), default="synth", dest="kind")
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--runs", type=Path, required=True, help="folder for the run folders")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--systems", nargs="+", default=[s.name for s in SYSTEMS])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--limit", type=int, default=0, help="test utterances; 0: all")
    parser.add_argument("--clips", type=int, default=10, help="of each non-speech sound")
    parser.add_argument("--probe", type=int, default=300, help="utterances of the probe set")
    parser.add_argument("--short", action="store_true", help="a few steps a stage: no result")
    return parser.parse_args()


def result_file(args: argparse.Namespace, system: System, seed: int) -> Path:
    return args.results / args.kind / f"{system.name}-seed{seed}.json"


def main() -> int:
    args = parse()
    sizes = SHORT if args.short else SIZES[args.kind]
    chosen = [named(name) for name in args.systems]
    order = [(s, seed) for seed in args.seeds for s in sorted(chosen, key=SYSTEMS.index)]
    args.runs.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    aligner = args.runs / "aligner"
    if not all(result_file(args, *pair).is_file() for pair in order):
        print(f"{args.kind} aligner", flush=True)
        train(systems.aligner(args.kind, sizes, args.corpus, aligner), args.ranks)
    for number, (system, seed) in enumerate(order, 1):
        name = f"{system.name}-seed{seed}"
        kept = result_file(args, system, seed)
        clock = f"{(time.monotonic() - started) / 60:.0f} min"
        head = f"[{number}/{len(order)}] {args.kind} {name} ({clock})"
        if kept.is_file():
            print(f"{head}: kept", flush=True)
            continue
        print(f"{head}: training", flush=True)
        recipe = systems.recipe(system, args.kind, sizes, seed, args.corpus, args.runs / name)
        run = train(recipe, args.ranks)
        print(f"{head}: measuring", flush=True)
        measure(run, args.corpus, aligner, args)
        found = result(system, args.kind, seed, sizes, run)
        kept.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(kept, json.dumps(found, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
