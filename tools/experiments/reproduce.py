"""Run the experiment: every system with every seed, in parallel; finished ones are kept.

python tools/experiments/reproduce.py --set synth --corpus corpus/experiment --runs runs/experiment

A stopped job resumes from its checkpoint; a system's result appears in
tools/experiments/results/SET/SYSTEM-seedN.json when it is measured, and is not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
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
from dsasr.entropy_allocation.allocation_row import AllocationRow
from dsasr.evaluation.hallucination import Example, count_characters
from dsasr.evaluation.results import Results, read_results
from dsasr.inference.model_from_run import run_recipe
from dsasr.recipe import Recipe
from dsasr.reporting import run_data
from dsasr.tracking.run_log import is_finished, read_events
from dsasr.utils.errors import UserError, run_tool
from dsasr.utils.io import atomic_write, read_lines

DSASR = (sys.executable, "-m", "dsasr.cli")
RESULTS = Path(__file__).parent / "results"
CONTROLLED = 1  # the seed whose encoders have the controls of the probes
# The recipe keys in which a finished job must agree.
DECISIVE = ("seed", "data", "model", "stages", "drift")


# -- commands ----------------------------------------------------------------------------------


def train(values: dict[str, Any], ranks: int) -> Path:
    """Train a recipe to its end, or on from where it stopped; returns the job's folder.

    Raises `UserError` if the folder holds a run of another recipe, or training fails.
    """
    folder = Path(values["run"]) / values["branch"]
    if is_finished(folder):
        expected = asdict(config.build(Recipe, values))
        trained = asdict(run_recipe(folder))
        changed = [k for k in DECISIVE if expected[k] != trained[k]]
        if changed:
            raise UserError(f"{folder} was trained with other {', '.join(changed)}: delete it")
        return folder
    path = folder.parent.with_suffix(".yaml")
    atomic_write(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    command = [*DSASR, "train", "--recipe", str(path), "--ranks", str(ranks)]
    with open(path.with_suffix(".log"), "a", encoding="utf-8") as log:
        code = subprocess.run(
            command, stdout=log, stderr=subprocess.STDOUT, env=_one_thread()
        ).returncode
    if code or not is_finished(folder):
        raise UserError(f"training {folder} failed: see {path.with_suffix('.log')}")
    return folder


def run_dsasr(command: str, *arguments: Any) -> None:
    """Run another command of dsasr. Raises `UserError` if it fails."""
    words = [*DSASR, command, *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, env=_one_thread())
    if done.returncode:
        raise UserError(f"dsasr {command} failed: {(done.stderr or done.stdout).strip()[-500:]}")


def _one_thread() -> dict[str, str]:
    """The environment of a process with one thread: several run in parallel."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


# -- one system --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """A system's two job folders, and the checkpoint of the second that is the system."""

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
    published = [e["pretrain"] for e in read_events(pretrain) if e["event"] == "published"]
    run, store = args.runs / f"seed{seed}" / whole.name, pretrain.parent / "snapshots"
    recipe = systems.sft(whole, args.kind, args.sizes, seed, args.corpus, run, store, published)
    folder = train(recipe, args.ranks)
    checkpoints = list_checkpoints(folder / "checkpoints")
    if system.joint == "none":
        name = f"step-{systems.before_joint(args.sizes):010d}"
        checkpoints = [p for p in checkpoints if p.name == name]
        if not checkpoints:
            raise UserError(f"{folder}/checkpoints/{name} is missing: delete {folder}")
    return Trained(system, pretrain, folder, checkpoints[-1])


def transcribe_suite(trained: Trained, args: argparse.Namespace) -> Path:
    """The transcripts of the whole suite, in the checkpoint's job folder."""
    shards = args.corpus / "shards"
    data = [d for d in (shards / "test", shards / "nonspeech") if d.is_dir()]
    suite = f"{trained.checkpoint.name}-limit{args.limit}-clips{args.clips}"
    out = trained.sft / f"{suite}.transcripts.jsonl"
    if not out.is_file():
        run_dsasr(
            "evaluate", trained.sft, "--checkpoint", trained.checkpoint.name, "--data", *data,
            "--suite", "--clips", args.clips, "--limit", args.limit, "--out", out,
        )  # fmt: skip
    return out


def probe(
    pretrain: Path,
    trained: Sequence[Trained],
    aligner: Path,
    controls: str,
    args: argparse.Namespace,
) -> list[AllocationRow]:
    """The allocation rows of the final encoder, with which all systems enter joint SFT, and of the
    systems, CKA being to the first.

    With ``controls`` = first, the final encoder has the control of shuffled frames, and the second
    row is that of a random encoder; with none there are neither, which saves half the time.
    """
    last = max(pretrain.parent.glob("snapshots/encoder-*"))
    metrics = pretrain.parent.with_suffix(".allocation.jsonl")
    data = args.probe or args.corpus / "shards" / "test"
    run_dsasr(
        "probe", last, *(t.checkpoint for t in trained), "--data", data, "--aligner", aligner,
        "--utterances", args.utterances, "--control", controls, "--random", controls,
        "--out", metrics, "--overwrite",
    )  # fmt: skip
    rows = [AllocationRow.from_json(json.loads(line)) for line in read_lines(metrics)]
    return [without_paths(row) for row in rows]


def without_paths(row: AllocationRow) -> AllocationRow:
    """``row`` without the folders of this machine, for the results."""
    return replace(row, encoder=replace(row.encoder, run=None), settings={})


def per_clip(results: Results, rules: str) -> dict[str, dict[str, list]]:
    """The counts of each clip that bootstraps need, by condition, in the order of keys."""
    out: dict[str, dict[str, list]] = {}
    for condition in sorted(results.conditions()):
        rows = sorted((r for r in results.rows if r.condition == condition), key=lambda r: r.key)
        scores = {u.key: u.units for u in results.scores(condition, rules).utterances}
        clips: dict[str, list] = {"lang": [r.lang for r in rows]}
        if rows[0].reference is None:
            clips["characters"] = [count_characters(r.hypothesis) for r in rows]
            clips["seconds"] = [round(r.seconds, 3) for r in rows]
        else:
            clips["flagged"] = [int(r.hallucinated) for r in rows]
        if scores:
            clips["errors"] = [scores[r.key].errors for r in rows]
            clips["units"] = [scores[r.key].reference for r in rows]
        out[condition] = clips
    return out


def varied(examples: Sequence[Example], limit: int) -> list[Example]:
    """At most ``limit`` examples, in turn of every kind, condition and language."""
    groups: dict[tuple[str, ...], list[Example]] = {}
    for e in examples:
        groups.setdefault((e.kind, e.condition, e.lang), []).append(e)
    turns = zip_longest(*groups.values())
    return [e for turn in turns for e in turn if e is not None][:limit]


def result(
    trained: Trained,
    before: AllocationRow,
    random: AllocationRow | None,
    after: AllocationRow,
    seed: int,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """The result of a trained system, with its encoder's rows before joint SFT and after."""
    results = read_results(transcribe_suite(trained, args))
    jobs = [run_data.collect(folder) for folder in (trained.pretrain, trained.sft)]
    stages = trained.stages()
    jobs = [replace(j, metrics=[m for m in j.metrics if m["stage"] in stages]) for j in jobs]
    ends = [e for j in jobs for e in j.events if e["event"] == "stage_end"]
    seconds = {e["name"]: e["stage_seconds"] for e in ends if e["name"] in stages}
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent
    ).stdout.strip()
    return {
        "set": args.kind,
        "system": trained.system.name,
        "label": trained.system.label,
        "seed": seed,
        "commit": commit,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "when": time.strftime("%Y-%m-%d"),
        "sizes": asdict(args.sizes),
        "recipe": {k: data_recipe(trained.sft)[k] for k in ("stages", "drift")},
        "train_seconds": sum(seconds.values()),
        "stage_seconds": seconds,
        "audio_hours": sum(map(run_data.audio_hours, jobs)),
        "swaps": sum(e["event"] == "swap" and e["stage"] in stages for e in jobs[1].events),
        "ctc": next(m["ctc"] for m in reversed(jobs[0].metrics) if "ctc" in m),
        "random": random and random.to_json(),
        "before": before.to_json(),
        "after": after.to_json(),
        "examples": [asdict(e) for e in varied(results.hallucinations().examples, 40)],
        "clips": per_clip(results, "plain" if args.kind == "digits" else "standard"),
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
    pretraining: Pretraining,
    users: Sequence[System],
    seed: int,
    aligner: Future[Path],
) -> None:
    """A pretraining, and the systems that use it; finished jobs are not repeated."""
    started = time.monotonic()

    def log(what: str) -> None:
        minutes = (time.monotonic() - started) / 60
        name = f"{args.kind} seed {seed}, {pretraining.name}"
        print(f"{name} ({minutes:.0f} min): {what}", flush=True)

    log("pretraining")
    run = args.runs / f"seed{seed}" / pretraining.name
    values = systems.pretraining(pretraining, args.kind, args.sizes, seed, args.corpus, run)
    pretrain = train(values, args.ranks)
    jobs = []
    for system in users:
        log(f"{system.name}: training")
        jobs.append(train_system(args, system, seed, pretrain))
    log("measuring encoders")
    controls = "first" if seed == CONTROLLED else "none"
    before, *after = probe(pretrain, jobs, aligner.result(), controls, args)
    random = after.pop(0) if seed == CONTROLLED else None
    for trained, row in zip(jobs, after, strict=True):
        log(f"{trained.system.name}: the suite")
        path = result_file(args, trained.system, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        values = result(trained, before, random, row, seed, args)
        atomic_write(path, json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n")
    log("done")


def main() -> int:
    args = parse()
    selected = [named(name) for name in args.systems]
    args.runs.mkdir(parents=True, exist_ok=True)
    families = []
    for seed in args.seeds:
        missing = [s for s in selected if not result_file(args, s, seed).is_file()]
        for pre in PRETRAININGS:
            if users := [s for s in missing if s.pretraining == pre]:
                families.append((pre, users, seed))
    if not families:
        return 0
    with ThreadPoolExecutor(args.jobs) as pool:
        values = systems.aligner(args.kind, args.sizes, args.corpus, args.runs / "aligner")
        aligner = pool.submit(train, values, args.ranks)
        futures = [aligner, *(pool.submit(family, args, *job, aligner) for job in families)]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
