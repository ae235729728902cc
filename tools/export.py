"""Export a trained run: safetensors, settings and tokenizer in one folder, ready to be passed on.

python tools/export.py runs/demo --to models/demo
python tools/transcribe.py models/demo speech.wav
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from dsasr import config
from dsasr.build import Builder
from dsasr.checkpoint.locate import open_run_checkpoint
from dsasr.inference.export import export_run
from dsasr.recipe import Recipe, quiet
from dsasr.utils.errors import UserError, run_tool

DTYPES = {"as-trained": None, "float32": torch.float32, "bfloat16": torch.bfloat16}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--to", type=Path, required=True, help="the new folder")
    parser.add_argument("--checkpoint", default="", help="step-… or folder; default: newest")
    parser.add_argument("--dtype", choices=DTYPES, default="as-trained")
    parser.add_argument("--adapter", action="store_true",
                        help="of a run with LoRA: also what it learned, for peft")  # fmt: skip
    parser.add_argument("overrides", nargs="*", metavar="key=value",
                        help="where files are now, such as model.llm.path=…")  # fmt: skip
    args = parser.parse_intermixed_args()
    quiet()
    places = [p for p in (args.run, args.run / "sft") if (p / "recipe.yaml").is_file()]
    if not places:
        raise UserError(f"{args.run} is no run folder: it has no recipe.yaml")
    values = config.read_recipe(str(places[0] / "recipe.yaml"))
    recipe = config.build(Recipe, config.override(values, args.overrides))
    reader = open_run_checkpoint(args.run, args.checkpoint)
    done = export_run(Builder(recipe), reader, args.to, DTYPES[args.dtype], args.adapter)
    size = sum(f.stat().st_size for f in done.rglob("*") if f.is_file())
    print(f"{done}: {size / 1e6:.1f} MB, from {reader.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
