"""The systems of the experiment, and their recipes.

A run of a system is two jobs, as of a concurrent run: a pretraining that publishes snapshots, and
an sft job that loads them. Systems that differ in the second alone share the first, which does not
depend on it. An sft job steps beside pretraining as in a colocated run of ratio 1:1: an encoder
published k steps after the first one is loaded at sft step k.

All use the same corpus and language model, make the same numbers of pretrain and sft steps, and
encode the same number of frames a step: CR-CTC, with two views, takes half the utterances.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from dsasr.utils.errors import UserError


@dataclass(frozen=True)
class Sizes:
    """Optimizer steps. ``sft`` are those between align and joint; the last ``final`` of them are on
    the final encoder where newer encoders are swapped in. ``frames``, ``sft_frames``: feature
    frames that the encoder encodes in a step of either job."""

    pretrain: int
    align: int
    sft: int
    joint: int
    final: int
    frames: int = 3000
    sft_frames: int = 2000


@dataclass(frozen=True)
class Pretraining:
    """``labels``: the targets of CTC; ``views``: 2 is CR-CTC. ``drift``: snapshots are published as
    the encoder drifts, not only at the end."""

    name: str
    labels: str = "phonemes"
    views: int = 1
    drift: bool = True


@dataclass(frozen=True)
class System:
    """``asynchronous``: align and IA-SFT run beside pretraining, on snapshots. ``swaps``: newer
    ones are swapped in during IA-SFT; without, the early one stays until joint SFT, which always
    begins with the final encoder. ``joint``: ``whole`` trains the encoder from align on, ``late``
    at the end; ``none`` is the ``late`` system before its joint SFT."""

    name: str
    label: str
    pretraining: Pretraining
    asynchronous: bool = True
    swaps: bool = True
    joint: Literal["whole", "late", "none"] = "late"


CHARACTERS = Pretraining("characters", "characters", drift=False)
PHONEMES = Pretraining("phonemes")
CONSISTENT = Pretraining("phonemes-cr", views=2)
PRETRAININGS = (CHARACTERS, PHONEMES, CONSISTENT)

SYSTEMS = (
    System("conventional", "1 character CTC, joint SFT", CHARACTERS, False, joint="whole"),
    System("phoneme", "2 phoneme CTC, joint SFT", PHONEMES, False, joint="whole"),
    System("late-joint", "2' phoneme CTC, late joint", PHONEMES, False),
    System("paper", "3 the paper's: CR-CTC, swaps, late joint", CONSISTENT),
    System("paper-ctc", "3' the paper's with plain CTC", PHONEMES),
    System("no-swap", "4a the paper's, one early snapshot", CONSISTENT, swaps=False),
    System("no-joint", "4b the paper's, no joint SFT", CONSISTENT, joint="none"),
)

# Rates. Conventional joint SFT trains all parts from the start; late joint SFT only polishes.
PRETRAIN = {"encoder": 1.0e-3, "ctc": 1.0e-3}
SFT = {"adaptor": 1.0e-3, "llm": 1.0e-3}
CONVENTIONAL = {"encoder": 3.0e-4, **SFT}
LATE = {"encoder": 5.0e-5, "adaptor": 1.0e-4, "llm": 1.0e-4}

PHONEMIZERS = {
    "synth": {"kind": "stored"},
    "read": {"kind": "espeak"},
    "digits": {"kind": "lexicon", "lexicons": ["digits.lexicon"]},
}
SIZES = {
    "synth": Sizes(pretrain=1600, align=40, sft=1100, joint=60, final=500),
    "read": Sizes(pretrain=1200, align=40, sft=760, joint=40, final=300),
    "digits": Sizes(pretrain=1200, align=40, sft=760, joint=40, final=300),
}
SHORT = Sizes(pretrain=24, align=4, sft=16, joint=4, final=4)


def named(name: str) -> System:
    """The system of a name. Raises `UserError` for an unknown one."""
    matches = [s for s in SYSTEMS if s.name == name]
    if not matches:
        raise UserError(f"no system '{name}': use {', '.join(s.name for s in SYSTEMS)}")
    return matches[0]


def trained(system: System) -> System:
    """The system whose sft job ``system`` is a checkpoint of: its own, or that with joint SFT."""
    if system.joint != "none":
        return system
    key = (system.pretraining, system.asynchronous, system.swaps, "late")
    return next(s for s in SYSTEMS if (s.pretraining, s.asynchronous, s.swaps, s.joint) == key)


def before_joint(sizes: Sizes) -> int:
    """The sft job's step after which late joint SFT begins."""
    return sizes.align + sizes.sft


def stages(system: System, sizes: Sizes) -> list[dict[str, Any]]:
    """The stage table of ``system``."""
    pre = system.pretraining
    batch = {"frames": sizes.frames // pre.views, "max_seconds": 12}
    pretrain = {"name": "pretrain", "branch": "pretrain", "steps": sizes.pretrain}
    pretrain |= {"warmup_steps": sizes.pretrain // 40, "trains": PRETRAIN, "batch": batch}
    pretrain["objective"] = "cr_ctc" if pre.views == 2 else "ctc"
    rest = [{"name": "align", "trains": {"adaptor": 1.0e-3}, "steps": sizes.align}]
    if system.joint == "whole":
        rest += [{"name": "joint", "trains": CONVENTIONAL, "steps": sizes.sft + sizes.joint}]
    else:
        swaps = {
            "swaps": system.swaps,
            "steps_after_final_swap": sizes.final if system.swaps else 0,
        }
        rest += [{"name": "ia_sft", "trains": SFT, "steps": sizes.sft, **swaps}]
        rest += [{"name": "joint", "trains": LATE, "steps": sizes.joint}]
    batch = {"frames": sizes.sft_frames, "max_seconds": 12}
    common = {"branch": "sft", "batch": batch}
    sft = [{**s, **common, "warmup_steps": min(20, s["steps"] // 4)} for s in rest]
    return [pretrain, *sft]


def _recipe(system: System, kind: str, sizes: Sizes, seed: int, corpus: Path, run: Path) -> dict:
    """The recipe values that both jobs of a run on the corpus of ``kind`` share."""
    text = (Path(__file__).parent / "base.yaml").read_text(encoding="utf-8")
    values = yaml.safe_load(text.replace("{corpus}", str(corpus)))
    labels = system.pretraining.labels
    phonemizer = {"kind": "characters"} if labels == "characters" else PHONEMIZERS[kind]
    values["data"] |= {"phonemizer": phonemizer, "phonemes": f"{corpus}/{labels}.json"}
    if kind == "digits":
        values["evaluation"]["rules"] = "plain"
    if kind != "synth":  # the synthetic voices speak at many speeds already
        values["data"]["augment"]["speeds"] = [0.9, 1.0, 1.1]
    return values | {"run": str(run), "seed": seed, "stages": stages(system, sizes)}


def pretraining(
    variant: Pretraining, kind: str, sizes: Sizes, seed: int, corpus: Path, run: Path
) -> dict:
    """The recipe of a pretraining; its snapshots are in ``run``/snapshots."""
    user = next(s for s in SYSTEMS if s.pretraining == variant)
    values = _recipe(user, kind, sizes, seed, corpus, run)
    drift = values["drift"] | ({} if variant.drift else {"mode": "final"})
    # All snapshots are kept: the sft jobs start after pretraining.
    return values | {"branch": "pretrain", "drift": drift, "store": {"keep": 1000}}


def sft(
    system: System,
    kind: str,
    sizes: Sizes,
    seed: int,
    corpus: Path,
    run: Path,
    store: Path,
    published: Sequence[int],
) -> dict:
    """The recipe of the sft job of a system, on the encoders in ``store``.

    ``published`` are their pretrain steps, rising; the last one is the final encoder's.
    """
    values = _recipe(system, kind, sizes, seed, corpus, run)
    first = published[0] if system.asynchronous else published[-1]
    # What comes after the last step is loaded when a stage needs the final encoder.
    last = sizes.align + sizes.sft + sizes.joint - 1
    swaps = [{"pretrain": p, "sft": min(p - first, last)} for p in published if p >= first]
    drift = values["drift"] | {"mode": "fixed", "swaps": swaps}
    values |= {"branch": "sft", "drift": drift, "store": {"path": str(store)}}
    if system.joint == "late":  # one checkpoint right before joint SFT, one at the end
        steps = before_joint(sizes)
        values["checkpoint"] = {"every_steps": steps, "every_minutes": 0, "keep": 2}
    return values


def aligner(kind: str, sizes: Sizes, corpus: Path, run: Path) -> dict:
    """The recipe of the aligner of all systems: a phoneme CTC of another seed.

    Labels by the head of a compared system would favor its encoder.
    """
    return pretraining(PHONEMES, kind, sizes, 0, corpus, run)
