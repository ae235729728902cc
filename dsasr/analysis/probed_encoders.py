"""Encoders opened for probing: of checkpoints, averages, snapshots, exports and Hugging Face
folders."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsasr import config
from dsasr.build import Builder
from dsasr.checkpoint import architecture, zero_partition
from dsasr.checkpoint.export_folder import ENCODER, is_export
from dsasr.checkpoint.locate import is_run, open_run_checkpoint, open_verified, run_folder
from dsasr.checkpoint.manifest import MANIFEST, read_manifest, require
from dsasr.checkpoint.tensor_fragments import FragmentError, FragmentReader, PrefixReader
from dsasr.data.audio.frontends import FrontEnd
from dsasr.data.text.tokenizers import Tokenizer
from dsasr.entropy_allocation.allocation_row import EncoderSource
from dsasr.entropy_allocation.pai_csai import reinitialized
from dsasr.evaluation.eval_sets import MAX_SECONDS, Recording, batch_recordings
from dsasr.inference.export import Export, load_export, read_config
from dsasr.inference.model_from_run import run_recipe
from dsasr.model import lora
from dsasr.model.ctc import CtcHead
from dsasr.model.encoders.conformer import EncoderConfig
from dsasr.model.encoders.load import load_encoder
from dsasr.model.encoders.pretrained import (
    RATE,
    PretrainedEncoder,
    PretrainedEncoderConfig,
    build_encoder,
)
from dsasr.model.encoders.protocol import Encoder
from dsasr.model.speech_llm import SpeechLLM
from dsasr.recipe import Recipe
from dsasr.utils.distributed import device
from dsasr.utils.errors import UserError

_CHECKPOINT = ("progress", "branches", "steps")  # of its manifest


@dataclass
class ProbedEncoder:
    """An encoder to probe. ``rate`` is the sampling rate of the audio it reads.

    ``encode`` gives the valid frames of each recording. ``ctc`` and ``llm`` are the heads that go
    with the encoder, if there are any; the latter reads and writes by ``front_end`` and
    ``tokenizer``.
    """

    source: EncoderSource
    frame_seconds: float
    encode: Callable[[Sequence[Recording]], dict[str, Tensor]]  # key → [S, E], CPU
    builder: Builder | None = None
    encoder: Encoder | None = None
    ctc: CtcHead | None = None
    llm: SpeechLLM | None = None
    rate: int = RATE
    front_end: FrontEnd | None = None
    tokenizer: Tokenizer | None = None
    export: Export | None = None  # that it is of


def is_pretrained(path: str | Path) -> bool:
    """Whether ``path`` is the folder of a Hugging Face encoder, which has a config.json."""
    return (Path(path) / "config.json").is_file() and not is_export(Path(path))


def has_no_head(path: str | Path) -> bool:
    """Whether ``path`` has no CTC head of its run: a Hugging Face encoder, or an export."""
    return is_pretrained(path) or is_export(Path(path))


def max_seconds(paths: Iterable[str | Path]) -> float:
    """The longest audio, in seconds, that all encoders can read: at most `MAX_SECONDS`."""
    return min([MAX_SECONDS, *map(_seconds, map(Path, paths))])


def _seconds(path: Path) -> float:
    if is_pretrained(path):
        return _build_empty(path).front_end.max_seconds
    if is_export(path):
        cfg = read_config(path).encoder
        own = isinstance(cfg, EncoderConfig)
        return MAX_SECONDS if own else _build_empty(path / ENCODER).front_end.max_seconds
    builder = _builder(path)
    return (
        MAX_SECONDS if builder.recipe.pretrained_encoder is None else builder.front_end.max_seconds
    )


def open_encoder(path: str | Path) -> ProbedEncoder:
    """The encoder of a checkpoint (`open_checkpoint`), an export or a Hugging Face folder."""
    if is_export(Path(path)):
        return open_export(Path(path))
    return open_pretrained(str(path)) if is_pretrained(path) else open_checkpoint(path)


def open_checkpoint(path: str | Path) -> ProbedEncoder:
    """The encoder of a run folder (its newest checkpoint), a checkpoint, an average or a snapshot,
    verified.

    A checkpoint's encoder is that of the sft branch if there is one; its CTC head is the pretrain
    branch's, else that of the snapshot in use. Raises `UserError` for a broken checkpoint.
    """
    path = Path(path)
    try:
        reader = open_run_checkpoint(path) if is_run(path) else open_verified(path)
        return _from_checkpoint(path, reader, _builder(path, reader.manifest))
    except FragmentError as error:
        raise UserError(f"{path} cannot be measured: {error}") from None


def _builder(path: Path, manifest: dict[str, Any] | None = None) -> Builder:
    """Of the run that ``path`` belongs to; of an average that lies elsewhere, of its manifest."""
    if _run(path) is None:
        if manifest is None and (path / MANIFEST).is_file():
            manifest = read_manifest(path)
        if manifest and manifest.get("recipe"):
            return Builder(config.build(Recipe, manifest["recipe"]))
    return Builder(run_recipe(run_folder(path)))


def _run(path: Path) -> Path | None:
    try:
        return run_folder(path)
    except UserError:
        return None


def _from_checkpoint(path: Path, reader: FragmentReader, builder: Builder) -> ProbedEncoder:
    manifest, run = reader.manifest, _run(path)
    architecture.check(reader, config.to_plain(builder.recipe.model))
    snapshot = manifest.get("kind") == "snapshot"
    kind = manifest.get("kind", "checkpoint")
    needed = {"snapshot": ("pretrain", "cause"), "average": ("steps",)}
    require(path, manifest, *needed.get(kind, _CHECKPOINT))
    name = f"{run.name}/{reader.folder.name}" if run else reader.folder.name
    source = EncoderSource(name, kind, run=str(run) if run else None)
    encoder, head, llm = builder.encoder.empty(), None, None
    if snapshot:
        source = replace(source, pretrain=manifest["pretrain"], cause=manifest["cause"])
        zero_partition.load_weights(encoder, PrefixReader(reader, "encoder."))
        head = _head(builder, PrefixReader(reader, "ctc."))
    else:
        branch = "sft" if PrefixReader(reader, "sft/encoder.").shapes else "pretrain"
        source = replace(source, steps=manifest["steps"])
        if kind != "average":  # of several stages, perhaps
            progress = manifest["progress"]
            source = replace(
                source,
                pretrain=progress["pretrain"],
                stage=manifest["branches"][branch]["stage"],
                snapshot=progress["in_use"] if branch == "sft" else None,
            )
        zero_partition.load_weights(encoder, PrefixReader(reader, f"{branch}/encoder."))
        head = _head(builder, PrefixReader(reader, "pretrain/ctc.")) or _stored_head(
            builder, manifest
        )
        if branch == "sft":
            llm = builder.speech_llm()
            zero_partition.load_weights(llm, PrefixReader(reader, "sft/"))
            llm.to(device()).eval().requires_grad_(False)
    encoder.to(device()).eval().requires_grad_(False)
    return _of_builder(source, builder, encoder, head, llm)


def _encode_with(encoder: Encoder, front_end: FrontEnd):
    """The function from recordings to their valid frames, key → [S, E] on the CPU."""

    def encode(recordings: Sequence[Recording]) -> dict[str, Tensor]:
        features = {}
        with torch.no_grad():
            for batch in batch_recordings(recordings, front_end=front_end):
                on_device = batch.to(device())
                out = encoder(on_device.features_BTF, on_device.feature_lengths_B)
                for i, key in enumerate(batch.keys):
                    features[key] = out.frames_BSE[i, : int(out.lengths_B[i])].float().cpu()
        return features

    return encode


def _of_builder(
    source: EncoderSource,
    builder: Builder,
    encoder: Encoder,
    ctc: CtcHead | None = None,
    llm: SpeechLLM | None = None,
) -> ProbedEncoder:
    encode = _encode_with(encoder, builder.front_end)
    tokenizer = builder.tokenizer if llm is not None else None
    return ProbedEncoder(
        source, builder.frame_seconds, encode, builder, encoder, ctc, llm, builder.front_end.rate,
        builder.front_end, tokenizer,
    )  # fmt: skip


def _head(builder: Builder, reader: PrefixReader) -> CtcHead | None:
    """The CTC head stored below ``reader``, if there is one."""
    if not reader.shapes:
        return None
    width, cfg = builder.encoder_shape.width, builder.recipe.model.pretrain.head
    head = CtcHead(width, len(builder.phonemes), cfg)
    zero_partition.load_weights(head, reader)
    return head.to(device()).eval().requires_grad_(False)


def _stored_head(builder: Builder, manifest: dict[str, Any]) -> CtcHead | None:
    """The CTC head of the snapshot in use, if it is still in the store."""
    folder = builder.recipe.store_folder / ((manifest.get("progress") or {}).get("in_use") or "")
    try:
        return _head(builder, PrefixReader(open_verified(folder), "ctc."))
    except FragmentError:
        return None  # pruned, altered, or published by another store


def _build_empty(path: str | Path) -> PretrainedEncoder:
    """A Hugging Face folder's encoder without memory for its weights."""
    with torch.device("meta"):
        return build_encoder(Path(path), PretrainedEncoderConfig(str(path)))


def open_pretrained(path: str, *, random: bool = False, seed: int = 0) -> ProbedEncoder:
    """The encoder of a Hugging Face folder, or one of its architecture with random weights."""
    cfg = PretrainedEncoderConfig(path, weights=not random)
    encoder = load_encoder(Path(path), cfg, seed).to(device()).eval().requires_grad_(False)
    name = Path(path).name + (" (random)" if random else "")
    source = EncoderSource(name, "random" if random else "pretrained", path=path)
    encode = _encode_with(encoder, encoder.front_end)
    return ProbedEncoder(source, encoder.frame_seconds, encode, encoder=encoder)


def open_export(path: Path) -> ProbedEncoder:
    """The encoder of an exported recognizer, with its language model."""
    export = load_export(path)
    llm = export.model.to(device()).requires_grad_(False)
    source = EncoderSource(path.name, "export", path=str(path), steps=export.config.steps)
    return _of_export(source, export, llm.encoder, llm)


def _of_export(
    source: EncoderSource, export: Export, encoder: Encoder, llm: SpeechLLM | None = None
) -> ProbedEncoder:
    encode = _encode_with(encoder, export.front_end)
    return ProbedEncoder(
        source, export.frame_seconds, encode, encoder=encoder, llm=llm, export=export,
        rate=export.front_end.rate, front_end=export.front_end, tokenizer=export.tokenizer,
    )  # fmt: skip


def random_baseline(encoder: ProbedEncoder, *, seed: int = 0) -> ProbedEncoder:
    """An encoder of the same architecture with random weights."""
    if encoder.builder is None and encoder.export is None:
        return open_pretrained(encoder.source.path, random=True, seed=seed)
    module = reinitialized(encoder.encoder, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    lora.draw(module.named_parameters(), partial(lora.initial, generator=generator))
    source = EncoderSource("random encoder", "random", run=encoder.source.run)
    if encoder.export is not None:
        return _of_export(source, encoder.export, module)
    return _of_builder(source, encoder.builder, module)
