"""Export a trained run: safetensors, settings and tokenizer in one folder, to transcribe with.

The folder's llm/ is a plain language model of transformers.

example:
  dsasr export runs/demo --to models/demo
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dsasr.cli.arguments import command_parser

DTYPES = ("as-trained", "float32", "bfloat16")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_parser(__name__, __doc__)
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--to", type=Path, required=True, help="the new folder")
    parser.add_argument("--checkpoint", default="", help="step-… or folder; default: newest")
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0])
    parser.add_argument("--adapter", action="store_true",
                        help="of a run with LoRA: also its adapter, for peft")  # fmt: skip
    parser.add_argument("overrides", nargs="*", metavar="key=value",
                        help="where files are now, such as model.llm.path=…")  # fmt: skip
    args = parser.parse_intermixed_args(arguments)

    import torch

    from dsasr.build import Builder
    from dsasr.checkpoint.locate import open_run_checkpoint, recognizer_folder
    from dsasr.inference.export import export_run
    from dsasr.inference.model_from_run import run_recipe
    from dsasr.utils.library_warnings import silence_library_warnings

    silence_library_warnings()
    recipe = run_recipe(recognizer_folder(args.run), args.overrides)
    reader = open_run_checkpoint(args.run, args.checkpoint)
    dtype = None if args.dtype == DTYPES[0] else getattr(torch, args.dtype)
    folder = export_run(Builder(recipe), reader, args.to, dtype, args.adapter)
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    print(f"{folder}: {size / 1e6:.1f} MB, from {reader.folder}")
