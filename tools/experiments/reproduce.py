"""Run the experiment: every system with every seed, side by side; finished ones are kept.

python tools/experiments/reproduce.py --set synth --corpus corpus/experiment --runs runs/experiment

A job that was stopped goes on from its checkpoint; a system's result appears in
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
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parent))
import systems
from systems import PRETRAININGS, SHORT, SIZES, SYSTEMS, Pretraining, System, named

from dsasr import config
from dsasr.checkpoint.locate import list_checkpoints
from dsasr.evaluation import suite_results
from dsasr.evaluation.hallucination import Example, written
from dsasr.inference.model_from_run import events, finished, run_recipe
from dsasr.recipe import Recipe
from dsasr.reporting import run_data
from dsasr.utils.errors import UserError, run_tool
from dsasr.utils.io import atomic_write, read_lines

TOOLS = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
CONTROLLED = 1  # the seed whose encoders have the probes' controls
# What a finished job must have been made by.
DECIDING = ("seed", "data", "model", "stages", "drift")


# -- commands ----------------------------------------------------------------------------------


def train(values: dict[str, Any], ranks: int) -> Path:
    """Train a recipe to its end, or on from where it stopped; returns the job's folder.

    Raises `UserError` if the folder holds a run of another recipe, or training fails.
    """
    folder = Path(values["run"]) / values["branch"]
    if finished(folder):
        wanted = asdict(config.build(Recipe, values))
        held = asdict(run_recipe(folder))
        changed = [k for k in DECIDING if wanted[k] != held[k]]
        if changed:
            raise UserError(f"{folder} was trained with other {', '.join(changed)}: delete it")
        return folder
    path = folder.parent.with_suffix(".yaml")
    atomic_write(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    with socket.create_server(("127.0.0.1", 0)) as free:  # other trainings may hold the usual port
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner"]
    launcher += ["--num_gpus", str(ranks), "--master_port", str(port)]
    command = [*launcher, str(TOOLS.parent / "dsasr" / "train.py"), "--recipe", str(path)]
    with open(path.with_suffix(".log"), "a", encoding="utf-8") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=_one()).returncode
    if code or not finished(folder):
        raise UserError(f"training {folder} failed: see {path.with_suffix('.log')}")
    return folder


def tool(name: str, *arguments: Any) -> None:
    command = [sys.executable, str(TOOLS / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=_one())
    if done.returncode:
        raise UserError(f"tools/{name} failed: {(done.stderr or done.stdout).strip()[-500:]}")


def _one() -> dict[str, str]:
    """A core for each process: several are at work."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


# -- one system --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """A system's two job folders, and the checkpoint of the second that it stands for."""

    system: System
    pretrain: Path
    sft: Path
    checkpoint: Path

    def stages(self) -> list[str]:
        table = [s["name"] for s in data_recipe(self.sft)["stages"]]
        return [name for name in table if self.system.joint != "none" or name != "joint"]


def train_system(args: argparse.Namespace, system: System, seed: int, pretrain: Path) -> Trained:
    """The sft job of ``system`` on the snapshots of a finished pretraining."""
    whole = systems.trained(system)
    published = [e["pretrain"] for e in events(pretrain) if e["event"] == "published"]
    run, store = args.runs / f"seed{seed}" / whole.name, pretrain.parent / "snapshots"
    given = (args.kind, args.sizes, seed, args.corpus, run, store, published)
    folder = train(systems.sft(whole, *given), args.ranks)
    places = list_checkpoints(folder / "checkpoints")
    if system.joint == "none":
        wanted = f"step-{systems.before_joint(args.sizes):010d}"
        places = [p for p in places if p.name == wanted]
        if not places:
            raise UserError(f"{folder}/checkpoints/{wanted} is missing: delete {folder}")
    return Trained(system, pretrain, folder, places[-1])


def listen(found: Trained, args: argparse.Namespace) -> Path:
    """The transcripts of the whole suite, beside the checkpoint's job, with which they go."""
    shards = args.corpus / "shards"
    data = [d for d in (shards / "test", shards / "nonspeech") if d.is_dir()]
    suite = f"{found.checkpoint.name}-limit{args.limit}-clips{args.clips}"
    heard = found.sft / f"{suite}.heard.jsonl"
    if not heard.is_file():
        tool("evaluate.py", found.sft, "--checkpoint", found.checkpoint.name, "--data", *data,
             "--suite", "--clips", args.clips, "--limit", args.limit, "--out", heard)  # fmt: skip
    return heard


def probe(
    pretrain: Path, found: Sequence[Trained], aligner: Path, controls: str, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """The allocation rows of the final encoder, with which all systems enter joint SFT, and of the
    systems. With ``controls`` = first the final encoder has the control of shuffled labels, and the
    second row is that of a random encoder; with none there are none, which saves half the time."""
    last = max(pretrain.parent.glob("snapshots/encoder-*"))
    metrics = pretrain.parent.with_suffix(".allocation.jsonl")
    data = args.probe or args.corpus / "shards" / "test"
    tool("allocation.py", last, *(f.checkpoint for f in found), "--data", data,
         "--aligner", aligner, "--utterances", args.utterances,
         "--control", controls, "--random", controls, "--out", metrics)  # fmt: skip
    rows = [json.loads(line) for line in read_lines(metrics)]
    return [{k: v for k, v in row.items() if k not in ("run", "measured")} for row in rows]


def per_clip(found: suite_results.Trials, rules: str) -> dict[str, dict[str, list]]:
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
            held["flagged"] = [int(suite_results.flagged(r)) for r in rows]
        if scores:
            held["errors"] = [scores[r.key].errors for r in rows]
            held["units"] = [scores[r.key].reference for r in rows]
        out[condition] = held
    return out


def varied(examples: Sequence[Example], most: int) -> list[Example]:
    """At most so many, taken in turn of every kind, condition and language."""
    groups: dict[tuple[str, ...], list[Example]] = {}
    for one in examples:
        groups.setdefault((one.kind, one.condition, one.lang), []).append(one)
    turns = zip_longest(*groups.values())
    return [one for turn in turns for one in turn if one is not None][:most]


def result(
    found: Trained,
    before: dict,
    random: dict | None,
    after: dict,
    seed: int,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """All that is kept of a trained system, its encoder measured before joint SFT and after."""
    heard = suite_results.read(listen(found, args))
    jobs = [run_data.collect(folder) for folder in (found.pretrain, found.sft)]
    stages = found.stages()
    jobs = [replace(j, metrics=[m for m in j.metrics if m["stage"] in stages]) for j in jobs]
    ends = [e for j in jobs for e in j.events if e["event"] == "stage_end"]
    seconds = {e["name"]: e["stage_seconds"] for e in ends if e["name"] in stages}
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=TOOLS
    ).stdout.strip()
    return {
        "set": args.kind,
        "system": found.system.name,
        "label": found.system.label,
        "seed": seed,
        "commit": commit,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "when": time.strftime("%Y-%m-%d"),
        "sizes": asdict(args.sizes),
        "recipe": {k: data_recipe(found.sft)[k] for k in ("stages", "drift")},
        "train_seconds": sum(seconds.values()),
        "stage_seconds": seconds,
        "audio_hours": sum(map(run_data.audio_hours, jobs)),
        "swaps": sum(e["event"] == "swap" and e["stage"] in stages for e in jobs[1].events),
        "ctc": next(m["ctc"] for m in reversed(jobs[0].metrics) if "ctc" in m),
        "random": random,
        "before": before,
        "after": after,
        "cka_through_joint": after.get("cka_to_first"),
        "examples": [asdict(e) for e in varied(heard.hallucinations().examples, 40)],
        "clips": per_clip(heard, "plain" if args.kind == "digits" else "standard"),
    }


def data_recipe(run: Path) -> dict[str, Any]:
    return yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))


# -- all of them -------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--set", choices=sorted(SIZES), default="synth", dest="kind")
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--runs", type=Path, required=True, help="folder for the run folders")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--systems", nargs="+", default=[s.name for s in SYSTEMS])
    parser.add_argument("--ranks", type=int, default=1, help="of each training")
    parser.add_argument("--jobs", type=int, default=0, help="at once (default: one a core)")
    parser.add_argument("--limit", type=int, default=0, help="test utterances; 0: all")
    parser.add_argument("--clips", type=int, default=10, help="of each non-speech sound")
    parser.add_argument("--probe", help="shards of the probe set (default: the test set)")
    parser.add_argument("--utterances", type=int, default=0, help="of the probe set; 0: all")
    parser.add_argument("--short", action="store_true", help="a few steps a stage: no result")
    args = parser.parse_args()
    args.sizes = SHORT if args.short else SIZES[args.kind]
    args.jobs = args.jobs or max(1, (os.cpu_count() or 1) // args.ranks)
    return args


def result_file(args: argparse.Namespace, system: System, seed: int) -> Path:
    return args.results / args.kind / f"{system.name}-seed{seed}.json"


def family(
    args: argparse.Namespace,
    chosen: Pretraining,
    users: Sequence[System],
    seed: int,
    aligner: Future[Path],
) -> None:
    """A pretraining, and the systems that use it; jobs that are done are not done again."""
    started = time.monotonic()

    def tell(what: str) -> None:
        minutes = (time.monotonic() - started) / 60
        print(f"{args.kind} seed {seed}, {chosen.name} ({minutes:.0f} min): {what}", flush=True)

    tell("pretraining")
    run = args.runs / f"seed{seed}" / chosen.name
    values = systems.pretraining(chosen, args.kind, args.sizes, seed, args.corpus, run)
    pretrain = train(values, args.ranks)
    found = []
    for system in users:
        tell(f"{system.name}: training")
        found.append(train_system(args, system, seed, pretrain))
    tell("measuring encoders")
    controls = "first" if seed == CONTROLLED else "none"
    before, *after = probe(pretrain, found, aligner.result(), controls, args)
    random = after.pop(0) if seed == CONTROLLED else None
    for one, row in zip(found, after, strict=True):
        tell(f"{one.system.name}: the suite")
        path = result_file(args, one.system, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = result(one, before, random, row, seed, args)
        atomic_write(path, json.dumps(kept, ensure_ascii=False, allow_nan=False) + "\n")
    tell("done")


def main() -> int:
    args = parse()
    chosen = [named(name) for name in args.systems]
    args.runs.mkdir(parents=True, exist_ok=True)
    families = []
    for seed in args.seeds:
        missing = [s for s in chosen if not result_file(args, s, seed).is_file()]
        for pre in PRETRAININGS:
            if users := [s for s in missing if s.pretraining == pre]:
                families.append((pre, users, seed))
    if not families:
        return 0
    with ThreadPoolExecutor(args.jobs) as pool:
        values = systems.aligner(args.kind, args.sizes, args.corpus, args.runs / "aligner")
        aligner = pool.submit(train, values, args.ranks)
        made = [aligner, *(pool.submit(family, args, *given, aligner) for given in families)]
        try:
            for one in made:
                one.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
