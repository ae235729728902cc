"""Load a recognizer from an exported folder or a run folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dsasr.checkpoint.export_folder import is_export
from dsasr.data.speech_statistics import SpeechStatistics
from dsasr.evaluation.decode import DecodeConfig
from dsasr.inference.export import load_export
from dsasr.inference.model_from_run import RunModel
from dsasr.inference.segmentation import SegmentationConfig
from dsasr.utils import distributed
from dsasr.utils.errors import UserError

EXTRA_TOKENS = 8  # beyond the training's rate: a short word in little audio
UNLIMITED = 1 << 20  # tokens: the duration alone is the limit


def load_parts(folder: Path, device: torch.device | None) -> dict[str, Any]:
    """The fields of the `Recognizer` in ``folder``. Raises `UserError` if there is none."""
    place = device or distributed.device()
    if is_export(folder):
        export = load_export(folder)
        cfg = export.config
        return dict(
            model=export.model.to(place),
            tokenizer=export.tokenizer,
            front_end=export.front_end,
            segmentation=SegmentationConfig.trained_with(cfg.speech, cfg.max_seconds),
            decode=limited(cfg.tuned.decode(cfg.decode), cfg.speech),
            speech=cfg.speech,
            tuned=cfg.tuned,
            frame_seconds=export.frame_seconds,
            device=device,
        )
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"{folder} is neither an exported model nor a run folder")
    run = RunModel.from_run(folder)
    recipe = run.builder.recipe
    longest = recipe.data.dataloader.batch.max_seconds
    return dict(
        model=run.model.to(place),
        tokenizer=run.builder.tokenizer,
        front_end=run.builder.front_end,
        segmentation=SegmentationConfig.trained_with(run.speech, longest),
        decode=limited(run.tuned.decode(recipe.evaluation.decode), run.speech),
        speech=run.speech,
        tuned=run.tuned,
        frame_seconds=run.builder.frame_seconds,
        device=device,
    )


def limited(decode: DecodeConfig, speech: SpeechStatistics) -> DecodeConfig:
    """``decode`` with the token limit of a duration: twice what 99.9% of the training's utterances
    have in a second (**ours**). The limits of evaluations stand where that is not known."""
    rate = speech.quantile("tokens", 0.999)
    if rate is None:
        return decode
    return replace(
        decode, tokens_per_second=2 * rate, extra_tokens=EXTRA_TOKENS, max_tokens=UNLIMITED
    )
