"""What the argument parsers of all commands have in common."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterable
from pathlib import Path

from dsasr.utils.errors import UserError


def command_parser(module: str, doc: str) -> argparse.ArgumentParser:
    """The parser of a command from its module's ``__name__`` and ``__doc__``.

    The docstring's first paragraph is the description; the rest, examples, follows the options.
    """
    words = module.removeprefix("dsasr.cli.").replace(".", " ").replace("_", "-")
    description, _, examples = doc.partition("\n\n")
    return argparse.ArgumentParser(
        prog=f"dsasr {words}",
        description=description,
        epilog=examples.strip() or None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # a wrong option is an error, not the one that begins like it
    )


def add_recipe(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """``--recipe`` (empty where it is not ``required`` and not given) and overrides."""
    parser.add_argument(
        "--recipe", required=required, default="", help="a packaged recipe's name, or a YAML file"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe overrides")


def add_machines(parser: argparse.ArgumentParser) -> None:
    """``--ranks`` and ``--hostfile``: where the launcher starts ranks."""
    parser.add_argument(
        "--ranks", type=int, default=0,
        help="of a machine (default: one a GPU; one where there is no GPU)",
    )  # fmt: skip
    parser.add_argument(
        "--hostfile", type=Path, help="DeepSpeed's list of machines, a line 'HOST slots=GPUS' each"
    )


def count(text: str) -> int:
    """An argument that counts something: an integer, at least 0."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text}: it must be at least 0")
    return number


def positive(text: str) -> int:
    """An integer, at least 1."""
    if (number := count(text)) == 0:
        raise argparse.ArgumentTypeError("0: it must be at least 1")
    return number


def milliseconds(text: str) -> int:
    """A duration such as ``640ms`` or ``0.64s``, in milliseconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s)", text.strip())
    value = float(match[1]) * (1000 if match[2] == "s" else 1) if match else 0.0
    if not 1 <= value <= 60_000 or value % 1:
        raise argparse.ArgumentTypeError(f"{text}: give a duration such as 640ms")
    return int(value)


def add_chunk(parser: argparse.ArgumentParser) -> None:
    """``--chunk``, for ``chunk_ms`` of `DecodeConfig`."""
    parser.add_argument(
        "--chunk", type=milliseconds, default=0, metavar="640ms",
        help="encode in chunks of this length, as live streams are, each with 4 chunks to its "
        "left (default: whole utterances)",
    )  # fmt: skip


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    """``--overwrite``, for `check_new`."""
    parser.add_argument(
        "--overwrite", action="store_true", help="replace files of --out that are there already"
    )


def check_new(paths: Iterable[Path], overwrite: bool) -> None:
    """Raise `UserError` for a file that is there already, unless it may be overwritten, and for
    one that cannot be written: before the work whose result it is to hold."""
    for path in paths:
        if path.is_dir():
            raise UserError(f"--out: {path} is a folder: give the name of a file")
        if path.exists() and not overwrite:
            raise UserError(f"--out: {path} is there already: give another, or --overwrite")
        parent = path.parent
        while not parent.exists():
            parent = parent.parent
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise UserError(f"--out: {path} cannot be written into {parent}")
