"""A thousand kills: tools/soak.py over engines, precisions, ranks, both modes, LoRA, bad disks.

nice -n 19 python tools/soak_all.py [--kills 50] [--only NAME …] [--out FOLDER]

Each configuration is one row of tools/soak_results.jsonl; those that it has already are passed
over, so that it can be stopped and started again. The exit code is 1 if any row has a fault. The
recipe is the tests' (tests/programs/tiny.py); about a quarter of a minute a kill on a quiet core.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from dsasr.testing.soak import soak
from dsasr.utils.errors import UserError, run_tool

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "tools" / "soak_results.jsonl"
STEPS_PER_KILL = 3.6
PATIENCE = 7200.0  # seconds until it is a hang: at idle priority a start may take minutes
LORA = (
    "model.lora={}",
    "stages.ia_sft.trains={adaptor: 1.0e-3, lora: 1.0e-3}",
    "stages.joint.trains={encoder: 1.0e-4, adaptor: 1.0e-3, lora: 1.0e-3}",
)


@dataclass(frozen=True)
class Configuration:
    """What is killed: the engine, the number of ranks of a job, one job or two, LoRA, the disk."""

    zero: int
    precision: str
    ranks: int
    mode: str = "colocated"
    lora: bool = False
    disk: str = "whole"

    @property
    def name(self) -> str:
        parts = [self.mode, f"zero{self.zero}", self.precision, f"{self.ranks}r"]
        parts += ["lora"] * self.lora + [f"{self.disk}-disk"] * (self.disk != "whole")
        return "-".join(parts)

    def overrides(self, kills: int) -> list[str]:
        steps = round(STEPS_PER_KILL * kills)
        pretrain, ia_sft = round(0.49 * steps), round(0.41 * steps)
        return [
            *(f"engine.deepspeed=zero{self.zero}", f"engine.precision={self.precision}"),
            *(f"stages.pretrain.steps={pretrain}", f"stages.ia_sft.steps={ia_sft}"),
            *("stages.align.steps=6", f"stages.joint.steps={max(6, steps // 20)}"),
            *("checkpoint.every_steps=5", "evaluation.every=6"),
            *(LORA if self.lora else ()),
        ]


CONFIGURATIONS = (
    Configuration(3, "fp32", 2),
    Configuration(1, "bf16", 2),
    Configuration(2, "bf16", 2),
    Configuration(3, "bf16", 2),
    Configuration(1, "fp32", 3),
    Configuration(2, "fp32", 1),
    Configuration(3, "fp32", 1),
    Configuration(3, "bf16", 3),
    Configuration(1, "bf16", 2, "concurrent"),
    Configuration(2, "bf16", 1, "concurrent"),
    Configuration(3, "fp32", 2, "concurrent"),
    Configuration(2, "fp32", 2, "concurrent"),
    Configuration(3, "bf16", 1, "concurrent"),
    Configuration(1, "fp32", 1, "concurrent"),
    Configuration(3, "fp32", 2, lora=True),
    Configuration(2, "bf16", 2, "concurrent", lora=True),
    Configuration(3, "fp32", 2, disk="slow"),
    Configuration(1, "bf16", 1, "concurrent", disk="slow"),
    Configuration(3, "fp32", 2, disk="full"),
    Configuration(2, "bf16", 1, "concurrent", disk="full"),
    Configuration(1, "bf16", 1, lora=True),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="of each configuration")
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="configurations")
    parser.add_argument("--out", type=Path, help="keep the runs below this new folder")
    args = parser.parse_args()
    names = [c.name for c in CONFIGURATIONS]
    if unknown := [name for name in args.only if name not in names]:
        raise UserError(f"no configuration {unknown[0]}; there are {', '.join(names)}")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # where bits can be expected to repeat
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    rows = (
        [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    )
    done, faults = {row["name"] for row in rows}, sum(row["faults"] for row in rows)
    folder = args.out or Path(tempfile.mkdtemp(prefix="dsasr-soak-"))
    recipe = _tiny_recipe(folder / "recipe")
    for seed, configuration in enumerate(CONFIGURATIONS, 1):
        if configuration.name in done or (args.only and configuration.name not in args.only):
            continue
        row = run(configuration, recipe, folder / configuration.name, args.kills, seed)
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)
        faults += row["faults"]
        if not args.out and not row["faults"]:
            shutil.rmtree(folder / configuration.name)
    return 1 if faults else 0


def run(configuration: Configuration, recipe: Path, folder: Path, kills: int, seed: int) -> dict:
    """One row: the configuration, its kills by target, phase and job, and the number of faults."""
    result = soak(
        str(recipe), configuration.overrides(kills), folder, kills=kills, world=configuration.ranks,
        seed=seed, concurrent=configuration.mode == "concurrent",
        disk="" if configuration.disk == "whole" else configuration.disk, patience=PATIENCE,
        report=lambda line: print(f"{configuration.name}: {line}", flush=True),
    )  # fmt: skip
    for fault in result.faults:
        print(f"{configuration.name}: fault: {fault} (see {folder})", flush=True)
    return {
        "name": configuration.name,
        "kills": sum(result.kills.values()),
        **asdict(configuration),
        "seed": seed,
        **result.summary(),
        "date": datetime.date.today().isoformat(),
    }


def _tiny_recipe(folder: Path) -> Path:
    path = ROOT / "tests" / "programs" / "tiny.py"
    spec = importlib.util.spec_from_file_location("tiny", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return folder / "tiny.yaml" if (folder / "tiny.yaml").exists() else module.make(folder)


if __name__ == "__main__":
    sys.exit(run_tool(main))
