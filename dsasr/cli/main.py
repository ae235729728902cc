"""The table of commands, and the entry point that runs one of them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from types import ModuleType

import dsasr
from dsasr.config import nearest
from dsasr.utils.errors import UserError, run_tool

COMMANDS = {
    "init": "from a folder of recordings to shards, a recipe and the commands to run",
    "train": "train a recipe, one rank a GPU",
    "plan": "time and memory on a cluster, batch sizes that fit, padding",
    "timeline": "stages, learning rates and encoder swaps of a recipe before it is trained",
    "watch": "a run in the terminal: stages, losses, drift, error rates, speed, drops",
    "ls": "a table of the runs below a folder",
    "doctor": "versions, GPUs, clocks, network and disks of a job's machines",
    "stop": "have a running job save a checkpoint and end",
    "submit": "train or evaluate under Slurm",
    "evaluate": "error rates and hallucinations of a trained run",
    "transcribe": "transcribe audio files",
    "serve": "a model over HTTP: files, live audio, a page with a microphone",
    "export": "a trained run as one folder of safetensors",
    "report": "an HTML page of one or more runs",
    "probe": "entropy allocation of encoders: NSE, PAI, CSAI, H0-H1, CKA",
    "checkpoints": "list, average or compare checkpoints",
    "snapshots": "list, verify or prune encoder snapshots",
    "replay": "the overrides that repeat a run's encoder swaps",
    "data make-shards": "pack recordings and transcripts into shards",
    "data index": "index shards that other tools made",
    "data inspect": "an HTML page of shards: histograms, players, the oddest utterances",
    "data verify": "read every sample of shards and list the bad ones",
    "data cmvn": "mean and variance of the features",
    "data phonemes": "the phoneme vocabulary",
    "data tokenizer": "train a sentencepiece tokenizer",
    "data confusions": "what a CTC head takes for what, for text-only training",
    "demo corpus": "synthesize a small bilingual speech corpus",
    "demo lm": "train a small language model for it",
}
GROUPS = {name.split()[0] for name in COMMANDS if " " in name}


def usage(group: str = "") -> str:
    """The list of commands, or of those of ``group``."""
    names = [name for name in COMMANDS if not group or name.split()[0] == group]
    prog = f"dsasr {group}".strip()
    lines = [f"usage: {prog} COMMAND …", "", "commands:"]
    lines += [f"  {name:<18}{COMMANDS[name]}" for name in names]
    example = f"dsasr {names[0]} --help"
    return "\n".join([*lines, "", f"Each command explains itself, with an example: {example}"])


def load(name: str) -> ModuleType:
    """The module of a command."""
    return importlib.import_module("dsasr.cli." + name.replace(" ", ".").replace("-", "_"))


def dispatch(words: Sequence[str]) -> int | None:
    """Run the command that ``words`` begin with. Raises `UserError` if there is none."""
    for length in (2, 1):
        name = " ".join(words[:length])
        if name in COMMANDS:
            return load(name).main(list(words[length:]))
    if list(words) == ["--version"]:
        print(f"dsasr {dsasr.__version__}")
        return 0
    group = words[0] if words and words[0] in GROUPS else ""
    rest = words[1:] if group else words
    if not rest or rest[0] in ("-h", "--help"):
        print(usage(group))
        return 0
    name = f"{group} {rest[0]}".strip()
    raise UserError(f"there is no command 'dsasr {name}'{nearest(name, list(COMMANDS))}")


def main(words: Sequence[str] | None = None) -> int:
    """The exit code of the command that ``words`` (default: the process's arguments) name."""
    words = sys.argv[1:] if words is None else words
    return run_tool(lambda: dispatch(words))
