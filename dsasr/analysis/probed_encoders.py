"""Whom entropy allocation is measured of: checkpoints, snapshots and foreign encoders, opened."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsasr.build import Builder
from dsasr.checkpoint import zero_partition
from dsasr.checkpoint.locate import open_run_checkpoint, open_verified
from dsasr.checkpoint.tensor_fragments import FragmentError, FragmentReader, PrefixReader
from dsasr.entropy_allocation.v_information import reinitialized
from dsasr.evaluation.eval_sets import Recording, batches
from dsasr.inference.model_from_run import run_folder, run_recipe
from dsasr.model.ctc import CtcHead
from dsasr.model.encoders.conformer import Encoder
from dsasr.model.encoders.pretrained import RATE, ForeignEncoder
from dsasr.model.speech_llm import SpeechLLM
from dsasr.utils.distributed import device
from dsasr.utils.errors import UserError

MOST_SECONDS = 60.0  # of a recording that is measured


@dataclass
class ProbedEncoder:
    """A checkpoint that is to be measured. ``about`` joins its row; ``rate`` is what it reads."""

    name: str
    about: dict[str, Any]
    frame_seconds: float
    encode: Callable[[Sequence[Recording]], dict[str, Tensor]]  # key → [S, E], CPU
    build: Builder | None = None
    encoder: Encoder | None = None
    ctc: CtcHead | None = None
    llm: SpeechLLM | None = None
    foreign: ForeignEncoder | None = None
    rate: int = RATE


def is_foreign(path: str | Path) -> bool:
    """Whether it is a Hugging Face encoder's folder, which has a config.json."""
    return (Path(path) / "config.json").is_file()


def longest(paths: Iterable[str | Path]) -> float:
    """The seconds of audio that all of the checkpoints can read: `MOST_SECONDS` at most."""
    from dsasr.model.encoders import pretrained

    return min([MOST_SECONDS, *(pretrained.longest(path) for path in paths if is_foreign(path))])


def open_any(path: str | Path) -> ProbedEncoder:
    """What `open_checkpoint` opens, or a Hugging Face encoder's folder."""
    return open_foreign(str(path)) if is_foreign(path) else open_checkpoint(path)


def open_checkpoint(path: str | Path) -> ProbedEncoder:
    """A run folder (its newest checkpoint), a checkpoint or a snapshot, verified.

    A checkpoint's encoder is that of the sft branch if there is one; its CTC head is the pretrain
    branch's, else that of the snapshot in use.
    """
    path = Path(path)
    try:
        run = (path / "recipe.yaml").is_file()
        reader = open_run_checkpoint(path) if run else open_verified(path)
        return _subject(path, reader, Builder(run_recipe(run_folder(path))))
    except FragmentError as error:
        raise UserError(f"{path} cannot be measured: {error}") from None


def _subject(path: Path, reader: FragmentReader, build: Builder) -> ProbedEncoder:
    held = reader.manifest
    about: dict[str, Any] = {"run": str(run_folder(path)), "kind": held["kind"]}
    encoder, head, llm = Encoder(build.recipe.model.encoder), None, None
    if held["kind"] == "snapshot":
        about |= {"pretrain": held["pretrain"], "cause": held["cause"]}
        zero_partition.load_weights(encoder, PrefixReader(reader, "encoder."))
        head = _head(build, PrefixReader(reader, "ctc."))
    else:
        branch = "sft" if "sft/encoder.subsampling.project.bias" in reader else "pretrain"
        stage = held["branches"][branch]["stage"]
        about |= {"steps": held["steps"], "pretrain": held["progress"]["pretrain"], "stage": stage}
        about |= {"encoder": held["progress"]["in_use"]} if branch == "sft" else {}
        zero_partition.load_weights(encoder, PrefixReader(reader, f"{branch}/encoder."))
        head = _head(build, PrefixReader(reader, "pretrain/ctc.")) or _stored_head(build, held)
        if branch == "sft":
            llm = build.speech_llm()
            zero_partition.load_weights(llm, PrefixReader(reader, "sft/"))
            llm.to(device()).eval().requires_grad_(False)
    encoder.to(device()).eval().requires_grad_(False)
    name = f"{run_folder(path).name}/{reader.folder.name}"
    return _native(name, about, build, encoder, head, llm)


def _native(name, about, build: Builder, encoder: Encoder, head=None, llm=None) -> ProbedEncoder:
    fbank = build.recipe.data.fbank

    def encode(recordings: Sequence[Recording]) -> dict[str, Tensor]:
        found = {}
        with torch.no_grad():
            for batch in batches(recordings, fbank_config=fbank, cmvn=build.cmvn):
                moved = batch.to(device())
                out = encoder(moved.features_BTF, moved.feature_lengths_B)
                for i, key in enumerate(batch.keys):
                    found[key] = out.frames_BSE[i, : int(out.lengths_B[i])].float().cpu()
        return found

    return ProbedEncoder(
        name, about, build.frame_seconds, encode, build, encoder, head, llm, rate=fbank.rate
    )


def _head(build: Builder, reader: PrefixReader) -> CtcHead | None:
    """The CTC head below ``reader``, where there is one."""
    if not reader.shapes:
        return None
    head = CtcHead(build.recipe.model.encoder.width, len(build.phonemes))
    zero_partition.load_weights(head, reader)
    return head.to(device()).eval().requires_grad_(False)


def _stored_head(build: Builder, held: dict[str, Any]) -> CtcHead | None:
    folder = build.recipe.store_folder / (held["progress"]["in_use"] or "")
    try:
        return _head(build, PrefixReader(FragmentReader(folder), "ctc."))
    except FragmentError:
        return None  # pruned, or an encoder from elsewhere


def open_foreign(path: str, *, random: bool = False) -> ProbedEncoder:
    """A Hugging Face folder's encoder."""
    from dsasr.model.encoders import pretrained

    held = pretrained.load(path, random=random)
    held.module.to(device())

    def encode(recordings: Sequence[Recording]) -> dict[str, Tensor]:
        return {r.key: held.frames(r.wave) for r in recordings}

    about = {"kind": "random" if random else "foreign", "path": str(path)}
    return ProbedEncoder(held.name, about, held.frame_seconds, encode, foreign=held)


def random_baseline(subject: ProbedEncoder, *, seed: int = 0) -> ProbedEncoder:
    """The same architecture with random weights."""
    if subject.foreign is not None:
        return open_foreign(subject.about["path"], random=True)
    encoder = reinitialized(subject.encoder, seed=seed)
    about = {"run": subject.about.get("run", ""), "kind": "random"}
    return _native("random encoder", about, subject.build, encoder)
