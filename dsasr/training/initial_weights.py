"""Weights of another model that a fresh run starts with: ``model.init_from``, ``encoder_from``.

What each source gives is decided once, on rank 0, before any model is built: names, shapes,
settings and vocabularies are compared, and what does not fit is refused. Then each rank reads its
own partition of each weight (`BranchEngine.load_initial`). Both branches are built and filled at
the start, so that every checkpoint has all of it and a resumed run needs the source no more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dsasr.build import Builder
from dsasr.checkpoint import export_folder, kept_head, zero_partition
from dsasr.checkpoint.tensor_fragments import FragmentError, on_all_ranks
from dsasr.checkpoint.weight_source import (
    PARTS,
    WeightSource,
    locate_source,
    open_source,
    part_of,
)
from dsasr.engine.branch_engine import BranchEngine
from dsasr.recipe import SOURCES
from dsasr.tracking.monitor import Monitor
from dsasr.training.branch_switcher import BranchSwitcher
from dsasr.training.resume import starts_afresh
from dsasr.training.source_fit import Shapes, SourceFit
from dsasr.utils import distributed
from dsasr.utils.errors import UserError

Counts = dict[str, tuple[int, int]]  # part → tensors, parameters


@dataclass(frozen=True)
class InitialWeights:
    """What a run takes from one source: plain data, the same on all ranks."""

    key: str  # encoder_from or init_from
    folder: str  # verified
    names: frozenset[str]  # of the weights that are taken
    taken: Counts
    left: Counts  # in the source, unused
    head: frozenset[str]  # of the CTC head that the run keeps beside its model
    fresh: Counts  # in the model, from no source


# -- plan --------------------------------------------------------------------------------------


def plan(builder: Builder) -> list[InitialWeights]:
    """What a fresh run takes from each source of its recipe; collective.

    Rank 0 verifies checksums and compares. Raises `UserError` on all ranks for a source that is
    missing, torn, or does not fit the recipe's model.
    """
    model = builder.recipe.model
    if not any(getattr(model, key) for key in SOURCES):
        return []
    plans, problem = [], ""
    if distributed.is_main_rank():
        try:
            plans = _plan(builder)
        except (UserError, FragmentError, OSError) as error:
            problem = str(error)
    plans, problem = distributed.broadcast((plans, problem))
    if problem:
        raise UserError(problem)
    return plans


def _plan(builder: Builder) -> list[InitialWeights]:
    recipe = builder.recipe
    shapes: dict[str, tuple[int, ...]] = {}
    for branch in recipe.branches:
        tensors = zero_partition.named_tensors(builder.empty_module(branch))
        shapes |= {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    found: dict[str, tuple[WeightSource, set[str], set[str]]] = {}
    for key in SOURCES:
        path = getattr(recipe.model, key)
        if not path:
            continue
        try:
            source = open_source(locate_source(Path(path)))
            fit = SourceFit(builder, shapes, source, key)
            found[key] = source, fit.weight_names(), fit.kept_head
        except (UserError, FragmentError, OSError) as error:
            raise UserError(f"model.{key}={path}: {error}") from None
    fresh = _count(shapes.keys() - set().union(*(names for _, names, _ in found.values())), shapes)
    return [
        InitialWeights(
            key,
            str(source.folder),
            frozenset(names),
            _count(names, shapes),
            _count(source.shapes.keys() - names - head, source.shapes),
            frozenset(head),
            fresh,
        )
        for key, (source, names, head) in found.items()
    ]


def _count(names: Iterable[str], shapes: Shapes) -> Counts:
    counts: Counts = {}
    for name in names:
        tensors, parameters = counts.get(part_of(name), (0, 0))
        counts[part_of(name)] = tensors + 1, parameters + math.prod(shapes[name])
    return {part: counts[part] for part in PARTS if part in counts}


def check(builder: Builder) -> None:
    """`plan` for ``--check``: nothing where the run would go on from a checkpoint."""
    if starts_afresh(builder.recipe):
        plan(builder)


# -- load --------------------------------------------------------------------------------------


def keep_files(builder: Builder, plans: Iterable[InitialWeights]) -> None:
    """Copy into the run folder what a source has beside the weights of the run's model: settings,
    tokenizer and CMVN of an exported model, and the CTC head of an encoder; collective, at a fresh
    start. What an earlier start kept of another encoder goes.

    Raises `UserError` where it cannot be written.
    """

    def copy() -> None:
        kept_head.remove(builder.recipe.folder)
        for source in plans:
            if source.head:
                reader = open_source(Path(source.folder)).readers["pretrain"]
                kept_head.save(reader, source.head, builder.recipe.folder)
            if export_folder.is_export(Path(source.folder)):
                target = builder.recipe.folder / source.key
                export_folder.copy_without_weights(Path(source.folder), target)

    try:
        distributed.on_main_rank(copy)
    except OSError as error:
        raise UserError(f"{builder.recipe.folder} cannot be written: {error}") from None


def load(
    builder: Builder, plans: Iterable[InitialWeights], branches: BranchSwitcher, monitor: Monitor
) -> None:
    """Build the branches of the job and load what ``plans`` say; collective, once, at the start.

    Raises `UserError` on all ranks where a weight cannot be read or is not finite.
    """
    recipe = builder.recipe
    for source in plans:
        engines = [branches.get(branch) for branch in recipe.branches]
        try:
            opened = on_all_ranks(lambda folder=source.folder: _open_again(folder))
            for engine in engines:
                trained = _trained(builder, engine)
                engine.load_initial(opened.readers[engine.name], source.names, trained)
        except FragmentError as error:
            raise UserError(f"model.{source.key}: {error}") from None
        counts = {"taken": source.taken, "left": source.left, "fresh": source.fresh}
        counts |= {"head_kept": bool(source.head)}
        monitor.event("initialized", key=source.key, source=source.folder, **counts, steps=0)
        # New LoRA matrices beside old ones add nothing at first.
        for part in [p for p in PARTS if p in source.taken and p in source.fresh and p != "lora"]:
            monitor.event(
                "partly_initialized",
                part=part,
                source=source.folder,
                fresh=source.fresh[part][0],
                tensors=source.taken[part][0] + source.fresh[part][0],
                steps=0,
            )


def _open_again(folder: str) -> WeightSource:
    """What rank 0 has verified; `FragmentError` where this rank cannot read it."""
    try:
        return open_source(Path(folder))
    except UserError as error:
        raise FragmentError(str(error)) from None


def _trained(builder: Builder, engine: BranchEngine) -> set[str]:
    """The parameters of a branch that some stage trains."""
    parts = {p for s in builder.recipe.stages if s.branch == engine.name for p in s.trains}
    parts |= {"head"} if "ctc" in parts else set()
    parts |= {"encoder"} if "layer_sum" in parts else set()
    names = dict(zero_partition.named_parameters(engine.module))
    return {name for name in names if part_of(name) in parts}
