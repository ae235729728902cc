"""What the argument parsers of all commands have in common."""

from __future__ import annotations

import argparse


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
    )


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """``--recipe`` and ``key=value`` overrides."""
    parser.add_argument("--recipe", required=True, help="a packaged recipe's name, or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe overrides")
