"""The systems of the experiment, and their recipes.

All see the same corpus and language model and make the same number of sft steps. Pretraining takes
the same number of encoded views of an utterance: CR-CTC, with two views a step, gets half the
steps. What a system really took, in audio-hours and minutes, stands in its results.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dsasr.errors import UserError


@dataclass(frozen=True)
class Sizes:
    """Optimizer steps: ``pretrain`` of one view, ``sft`` without ``joint``; the last ``final`` of
    the ``sft`` steps are on the final encoder where it is swapped."""

    pretrain: int
    align: int
    sft: int
    joint: int
    final: int


@dataclass(frozen=True)
class System:
    """``labels``: what CTC learns; ``views``: 2 is CR-CTC. ``asynchronous``: align and IA-SFT run
    beside pretraining, on snapshots; else everything after align is joint SFT. ``swaps``: newer
    snapshots are taken during IA-SFT; without, the early one stays until joint SFT, which always
    begins with the final encoder. ``joint``: late joint SFT follows."""

    name: str
    label: str
    labels: str = "phonemes"
    views: int = 1
    asynchronous: bool = True
    swaps: bool = True
    joint: bool = True


SYSTEMS = (
    System("conventional", "1 character CTC, joint SFT", "characters", asynchronous=False),
    System("phoneme", "2 phoneme CTC, joint SFT", asynchronous=False),
    System("paper", "3 the paper's: CR-CTC, swaps, late joint", views=2),
    System("no-swap", "4a the paper's, one early snapshot", views=2, swaps=False),
    System("no-joint", "4b the paper's, no joint SFT", views=2, joint=False),
    System("paper-ctc", "3' the paper's with plain CTC"),
)

# Rates of the joint stages. Conventional joint SFT trains all parts from the start; late joint SFT
# only polishes.
SFT = {"adaptor": 1.0e-3, "llm": 1.0e-3}
CONVENTIONAL = {"encoder": 3.0e-4, **SFT}
LATE = {"encoder": 5.0e-5, "adaptor": 1.0e-4, "llm": 1.0e-4}

PHONEMIZERS = {
    "synth": {"kind": "stored"},
    "read": {"kind": "espeak"},
    "digits": {"kind": "lexicon", "lexicons": ["dsasr/recipes/digits.lexicon"]},
}
SIZES = {
    "synth": Sizes(pretrain=2400, align=40, sft=1240, joint=60, final=400),
    "read": Sizes(pretrain=1600, align=40, sft=760, joint=40, final=300),
    "digits": Sizes(pretrain=800, align=40, sft=360, joint=40, final=200),
}
SHORT = Sizes(pretrain=24, align=4, sft=16, joint=4, final=4)


def named(name: str) -> System:
    """Raises `UserError` for a name that there is not."""
    found = [s for s in SYSTEMS if s.name == name]
    if not found:
        raise UserError(f"no system '{name}': use {', '.join(s.name for s in SYSTEMS)}")
    return found[0]


def stages(system: System, sizes: Sizes) -> list[dict[str, Any]]:
    """The stage table of ``system``."""
    steps = max(2, sizes.pretrain // system.views)
    pretrain = {"name": "pretrain", "branch": "pretrain", "steps": steps, "warmup": steps // 40}
    pretrain["trains"] = {"encoder": 1.0e-3, "ctc": 1.0e-3}
    pretrain["objective"] = "cr_ctc" if system.views == 2 else "ctc"
    align = {"name": "align", "trains": {"adaptor": 1.0e-3}, "steps": sizes.align}
    if not system.asynchronous:
        rest = [{"name": "joint", "trains": CONVENTIONAL, "steps": sizes.sft + sizes.joint}]
    else:
        after = sizes.final if system.swaps else 0
        given = {"swaps": system.swaps, "after_final": after}
        length = sizes.sft + (0 if system.joint else sizes.joint)
        rest = [{"name": "ia_sft", "trains": SFT, "steps": length, **given}]
        rest += [{"name": "joint", "trains": LATE, "steps": sizes.joint}] * system.joint
    sft = [{**s, "branch": "sft", "warmup": min(20, s["steps"] // 4)} for s in (align, *rest)]
    return [pretrain, *sft]


def recipe(system: System, kind: str, sizes: Sizes, seed: int, corpus: Path, run: Path) -> dict:
    """The whole recipe of one run on the corpus of ``kind``."""
    text = (Path(__file__).parent / "base.yaml").read_text(encoding="utf-8")
    values = yaml.safe_load(text.replace("{corpus}", str(corpus)))
    phonemizer = {"kind": "characters"} if system.labels == "characters" else PHONEMIZERS[kind]
    values["data"] |= {"phonemizer": phonemizer, "phonemes": f"{corpus}/{system.labels}.json"}
    drift = values["drift"] | ({} if system.asynchronous else {"mode": "final"})
    if kind == "digits":
        values["evaluation"]["rules"] = "plain"
    if kind != "synth":  # the synthetic voices speak at many speeds already
        values["data"]["augment"]["speeds"] = [0.9, 1.0, 1.1]
    return values | {
        "run": str(run),
        "seed": seed,
        "stages": stages(system, sizes),
        "drift": drift,
    }


def aligner(kind: str, sizes: Sizes, corpus: Path, run: Path) -> dict:
    """The recipe of what places the phonemes for all systems: a phoneme CTC of a seed of its own.

    Labels by a compared system's own head would make its encoder look better than the others.
    """
    values = recipe(named("phoneme"), kind, sizes, 0, corpus, run)
    looks = {key: values[key] | {"every": 0} for key in ("allocation", "evaluation")}
    return values | looks | {"stages": values["stages"][:1]}
