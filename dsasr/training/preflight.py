"""Checks before anything is trained: the files of a recipe, and whether they fit each other."""

from __future__ import annotations

import contextlib
import math
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch

from dsasr.build import Builder
from dsasr.data.dataloader.bucketing import BatchConfig
from dsasr.data.dataloader.dataloader import build_dataset_parts
from dsasr.data.dataloader.text_dataloader import load_text
from dsasr.data.shards.storage import ShardReadError, ShardStorage
from dsasr.data.text.ctc_noise import Confusions
from dsasr.data.text.prompt import describe
from dsasr.data.text.tokenizers import (
    Tokenizer,
    check_end_token,
    check_tokenizer,
    has_tokenizer,
    load_tokenizer,
)
from dsasr.model import lora
from dsasr.model.adaptors.protocol import build_adaptor
from dsasr.model.encoders.load import check_weights
from dsasr.model.encoders.pretrained import check_preprocessor
from dsasr.model.llm import read_llm_config
from dsasr.model.llm_properties import check_special_tokens
from dsasr.model.llm_sharded_load import check_weights as check_llm_weights
from dsasr.recipe import SOURCES
from dsasr.stages import StageConfig
from dsasr.training import resume
from dsasr.utils.columns import WIDTH
from dsasr.utils.errors import UserError
from dsasr.utils.troubleshooting import see

TEXT_TOKENS_PER_SECOND = 3.0  # of fast speech
LONGEST_TOKEN = 0.4  # seconds of speech in one embedding; recipes of the field have 0.08 to 0.24


def headline(builder: Builder) -> str:
    """What the run is, and whether it starts or goes on."""
    recipe = builder.recipe
    stages = [stage for stage in recipe.stages if stage.branch in recipe.branches]
    start = (
        "starts afresh" if resume.starts_afresh(recipe) else "resumes from its newest checkpoint"
    )
    names = ", ".join(f"{stage.name} {stage.steps:,}" for stage in stages)
    return f"{recipe.folder}: {start}; steps: {names}"


def warnings(builder: Builder) -> list[str]:
    """Settings that are allowed, and train nothing."""
    return [
        f"stage '{stage.name}' trains '{part}' at rate 0, which changes nothing: give a rate, or "
        f"leave it out{see('rate-zero')}"
        for stage in builder.recipe.stages
        for part, rate in stage.trains.items()
        if rate == 0
    ]


def prompt_lines(builder: Builder) -> list[str]:
    """The prompt as tokens; nothing where no language model is trained."""
    if not _has_llm(builder):
        return []
    tokenizer, lines = builder.tokenizer, describe(builder.tokenizer, *builder.prompt())
    hinted = builder.hinted_prompts
    for lang, prompt in list(hinted.items())[:1]:
        shown, _ = describe(tokenizer, prompt.prefix, prompt.suffix)
        share = builder.recipe.model.language_share
        lines.append(
            f"of {100 * share:g}% of the utterances in {', '.join(hinted)}, as {lang}: {shown}"
        )
    return _under("PROMPT", lines)


def llm_lines(builder: Builder) -> list[str]:
    """The properties of the language model that speech needs (`dsasr.model.llm_properties`)."""
    if not _has_llm(builder):
        return []
    config, found = read_llm_config(builder.llm_folder), builder.llm.properties
    notes = [*check_special_tokens(builder.tokenizer, config), *builder.llm.notes]
    packs = "packed rows" if found.packs else "NO packed rows"
    caches = "its cache" if found.caches else "NO cache"
    tried = (packs, caches, "logits W·h + b", "no look ahead", "special tokens embedded")
    return _under(
        "LLM",
        [
            f"{builder.llm.kind} of {builder.recipe.model.llm.path}, tried: {', '.join(tried)}",
            *notes,
        ],
    )


def _under(title: str, lines: Sequence[str]) -> list[str]:
    """``lines`` beside ``title``, wrapped to the screen."""
    wrapped = [
        part
        for line in lines
        for part in textwrap.wrap(line, WIDTH - 8, break_long_words=False, subsequent_indent="  ")
    ]
    return [f"{title if not i else '':<8}{part}" for i, part in enumerate(wrapped)]


def _has_llm(builder: Builder) -> bool:
    return bool(builder.recipe.schedule().sft) and builder.recipe.branch != "pretrain"


def check(builder: Builder) -> None:
    """Raise `UserError` for a file of the recipe that is missing or does not fit the recipe."""
    for key in SOURCES:
        source = getattr(builder.recipe.model, key)
        if source and not Path(source).is_dir() and resume.starts_afresh(builder.recipe):
            raise UserError(
                f"model.{key}: there is no folder {source}; give an exported model, a run, a "
                "checkpoint or a snapshot"
            )
    _check_writable(builder)
    resume.check(builder.recipe)
    _check_encoder(builder)
    if builder.recipe.model.encoder_lora is not None:
        lora.check(builder.encoder_shape, builder.recipe.model.encoder_lora)
    if "pretrain" in builder.recipe.branches:
        _ = builder.phonemes, builder.phonemizer
    if "sft" in builder.recipe.branches:
        _check_text_only(builder, builder.recipe.schedule().sft)
        _check_llm(builder)
        _check_tokenizer(builder)
        _check_adaptor(builder)
        _check_prompt(builder)
        _check_ctc_scores(builder)
    _check_shards(builder)


def _check_shards(builder: Builder) -> None:
    """The shards must be there, with the languages and hours that the mixture needs."""
    data = builder.recipe.data
    sources = ShardStorage(data.dataloader.source)
    for key, datasets in (("data.train", data.train), ("data.valid", data.valid)):
        for dataset in datasets:
            try:
                build_dataset_parts((dataset,), sources, data.dataloader.temperature)
            except (UserError, ShardReadError) as error:
                raise UserError(f"{key}.{dataset.name}.shards: {error}") from None
    for name in data.dataloader.noise_weights if data.augment is not None else ():
        try:
            sources.resolve(name)
        except (UserError, ShardReadError) as error:
            raise UserError(f"data.dataloader.noise: {error}") from None


def _check_writable(builder: Builder) -> None:
    """The folders that the run writes into."""
    recipe = builder.recipe
    folders = {"run": recipe.folder, "store.path": recipe.store_folder}
    if recipe.engine.offload.path:
        folders["engine.offload.path"] = Path(recipe.engine.offload.path)
    if recipe.data.dataloader.source.cache_gb:
        folders["data.dataloader.source.cache"] = recipe.data.dataloader.source.folder()
    for key, folder in folders.items():
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        try:
            # In the folder itself, or where it would be made; nothing is left behind.
            with tempfile.TemporaryFile(dir=there):
                pass
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"{key}: {folder} cannot be written: {reason} ({there})") from None


def _check_llm(builder: Builder) -> None:
    """The language model must be one that speech can go into, and that the recipe's settings can be
    applied to; its weights must be there, whole, and those of its config.json."""
    llm = builder.llm.check()
    from_source = resume.starts_afresh(builder.recipe) and "llm" in builder.recipe.init_parts
    if builder.llm.has_weights and not from_source:  # else compared in `initial_weights`
        check_llm_weights(builder.llm_folder, llm)


def _check_encoder(builder: Builder) -> None:
    """The encoder must fit its features, and the recipe what the encoder can do."""
    model = builder.recipe.model
    if builder.recipe.pretrained_encoder is None:
        if builder.cmvn.mean_F.shape[0] != model.encoder.mels:  # as data.fbank.mels is
            raise UserError(
                f"{builder.recipe.data.cmvn} has {builder.cmvn.mean_F.shape[0]} mel bins, "
                f"model.encoder.mels is {model.encoder.mels}"
            )
        return
    check_preprocessor(builder.encoder_folder, builder.front_end)
    if model.encoder.weights and not builder.encoder_comes_from_a_source:
        check_weights(builder.encoder_folder, builder.encoder_shape)
    for branch in ("pretrain", "sft"):
        chunks = getattr(model, branch).chunks
        if chunks is not None and not builder.encoder_shape.takes_chunks:
            raise UserError(
                f"model.{branch}.chunks: {model.encoder.path} sees whole utterances only; give "
                f"model.{branch}.chunks=null"
            )
    if builder.recipe.evaluation.decode.chunk_ms and not builder.encoder_shape.takes_chunks:
        raise UserError(
            f"evaluation.decode.chunk_ms: {model.encoder.path} sees whole utterances only; give "
            "evaluation.decode.chunk_ms=0"
        )
    longest = builder.front_end.max_seconds
    if model.encoder.pad_to > longest:
        raise UserError(
            f"model.encoder.pad_to={model.encoder.pad_to:g}: {model.encoder.path} reads "
            f"{longest:g} s at most; give model.encoder.pad_to={longest:g}"
        )
    if builder.front_end.bins == 1 and model.pretrain.spec is not None:
        raise UserError(
            f"model.pretrain.spec: {model.encoder.path} reads waves, which SpecAugment does "
            "not mask; give model.pretrain.spec=null"
        )
    _check_seconds(builder, "data.dataloader.batch", builder.recipe.data.dataloader.batch)
    for stage in builder.recipe.stages:
        batch = builder.recipe.dataloader(stage)[0].batch
        _check_seconds(builder, f"stages.{stage.name}.batch", batch)
        if stage.branch == "sft" and batch.tokens and model.adaptor.frames_per_token:
            frames = round(100 * builder.frame_seconds * model.adaptor.frames_per_token)
            builder.recipe.check_frames_per_token(stage, frames)


def _check_adaptor(builder: Builder) -> None:
    """The adaptor must fit the language model, and one that reads CTC has units."""
    cfg = builder.recipe.model.adaptor
    seconds = builder.frame_seconds * (cfg.frames_per_token or 0)
    if seconds > LONGEST_TOKEN:
        stack = max(1, round(0.16 / builder.frame_seconds)) * (cfg.stack // cfg.frames_per_token)
        raise UserError(
            f"model.adaptor.stack={cfg.stack}: at this encoder's "
            f"{1 / builder.frame_seconds:g} frames a second the language model gets one embedding "
            f"for {seconds:.2f} s of speech, which is too coarse; give model.adaptor.stack={stack}"
        )
    units = len(builder.phonemes) if cfg.reads_ctc else 0
    llm = read_llm_config(builder.llm_folder).get_text_config()
    if seconds:
        _check_positions(builder, seconds, getattr(llm, "max_position_embeddings", None))
    width = llm.hidden_size
    with torch.device("meta"):
        build_adaptor(cfg, builder.encoder_shape.width, width, units=units)


def _check_positions(builder: Builder, token_seconds: float, positions: int | None) -> None:
    """The longest utterance and its transcript must not be longer than the language model reads."""
    prompt = sum(map(len, builder.prompt()))
    per_second = 1 / token_seconds + TEXT_TOKENS_PER_SECOND
    for stage in builder.recipe.stages:
        batch = builder.recipe.dataloader(stage)[0].batch
        needed = prompt + math.ceil(batch.max_seconds * per_second)
        if positions is not None and stage.branch == "sft" and needed > positions:
            key = f"{builder.recipe.batch_key(stage)}.max_seconds"
            raise UserError(
                f"{key}={batch.max_seconds:g} makes sequences of about {needed:,} tokens (prompt, "
                f"speech, transcript), the language model has {positions:,} positions: give "
                f"{key}={(positions - prompt) / per_second:.0f}, or a larger model.adaptor.stack"
            )


def _check_seconds(builder: Builder, key: str, batch: BatchConfig) -> None:
    """Utterances must not be longer than the encoder reads."""
    longest = builder.front_end.max_seconds
    if batch.max_seconds > longest:
        raise UserError(
            f"{key}.max_seconds={batch.max_seconds:g}: {builder.recipe.model.encoder.path} reads "
            f"{longest:g} s at most; give {key}.max_seconds={longest:g} (longer utterances are "
            f"dropped and counted as too_long){see('limits')}"
        )


def _check_text_only(builder: Builder, stages: Sequence[StageConfig]) -> None:
    """Text-only training needs text, and an adaptor that reads what CTC writes."""
    adaptor = builder.recipe.model.adaptor
    mixed = [s.name for s in stages if s.text_share]
    if not mixed:
        return
    if builder.recipe.data.text_only is None:
        raise UserError(f"stage '{mixed[0]}' has a text_share: give data.text_only.path")
    if not (adaptor.reads_ctc and adaptor.merge):
        raise UserError(
            f"stage '{mixed[0]}' has a text_share: give model.adaptor.kind=ctc with merge=true"
        )
    if builder.recipe.data.phonemizer.kind == "stored":
        raise UserError(
            f"stage '{mixed[0]}' has a text_share, but data.phonemizer reads phonemes from the "
            "shards: give a kind that makes them from text"
        )
    load_text(builder.recipe.data.text_only)
    if confusions := builder.recipe.data.text_only.confusions:
        Confusions.load(confusions, builder.phonemes.symbols)


def _check_tokenizer(builder: Builder) -> None:
    """The tokenizer must be the language model's, whichever folder it comes from."""
    folder = builder.llm_folder
    config = read_llm_config(folder).get_text_config()
    own: Tokenizer | None = None
    elsewhere = builder.tokenizer_folder.resolve() != folder.resolve()
    if elsewhere and builder.recipe.model.llm.weights:
        if has_tokenizer(folder):
            with contextlib.suppress(UserError):  # one that does not load says nothing
                own = load_tokenizer(folder)
        elif config.eos_token_id is not None:
            ends = config.eos_token_id
            check_end_token(builder.tokenizer, [ends] if isinstance(ends, int) else ends)
    check_tokenizer(builder.tokenizer, config.vocab_size, own)
    check_special_tokens(builder.tokenizer, config)


def _check_ctc_scores(builder: Builder) -> None:
    """Units that the CTC head scores as a transcript grows must be parts of its text."""
    kind = builder.recipe.data.phonemizer.kind
    joint = builder.recipe.evaluation.decode.ctc_scores == "joint"
    if joint and kind not in ("characters", "tokens"):
        raise UserError(
            f"evaluation.decode.ctc_scores=joint needs units that are characters or tokens; "
            f"data.phonemizer.kind is {kind}: leave it out, or give rescoring"
        )


def _check_prompt(builder: Builder) -> None:
    """The prompt must not be longer than the token budgets count it."""
    hinted = builder.hinted_prompts.values()
    prompts = [builder.prompt(), *((prompt.prefix, prompt.suffix) for prompt in hinted)]
    length = max(sum(map(len, sides)) for sides in prompts)
    for stage in builder.recipe.schedule().sft:
        batch = builder.recipe.dataloader(stage)[0].batch
        if batch.tokens and length > batch.prompt_tokens:
            raise UserError(
                f"the prompt has {length} tokens: give stage '{stage.name}' "
                f"batch.prompt_tokens={length}"
            )
