"""Encoders from elsewhere: Hugging Face folders of Whisper, wav2vec 2.0, HuBERT and their kin."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dsasr.utils.errors import UserError

RATE = 16000  # all of them read 16 kHz
WHISPER_STEP = 0.02  # seconds of one of its frames
WAVES = ("wav2vec2", "hubert", "wavlm", "data2vec-audio", "unispeech", "unispeech-sat", "sew")


@dataclass(frozen=True)
class ForeignEncoder:
    """``frames(wave)`` gives the encoder's last hidden states, one each ``frame_seconds``."""

    name: str
    module: nn.Module
    extractor: object
    kind: str
    frame_seconds: float

    @torch.no_grad()
    def frames(self, wave: np.ndarray) -> Tensor:
        """Mono audio at 16 kHz, float [n] in [−1, 1] → [S, E] float32 on the CPU.

        Utterance by utterance, so that no padding is seen. Whisper's 30 s window is cut to the
        audio's own frames; longer audio is a `UserError`.
        """
        inputs = self.extractor(wave, sampling_rate=RATE, return_tensors="pt")
        device = next(self.module.parameters()).device
        if self.kind == "whisper":
            limit = self.module.config.max_source_positions * self.frame_seconds
            if len(wave) > limit * RATE:
                raise UserError(f"{self.name} reads {limit:g} s at most: leave out longer audio")
            states = self.module(inputs["input_features"].to(device)).last_hidden_state[0]
            count = max(1, round(len(wave) / RATE / self.frame_seconds))
            return states[:count].float().cpu()
        return self.module(inputs["input_values"].to(device)).last_hidden_state[0].float().cpu()


def longest(path: str | Path) -> float:
    """The seconds of audio that a Hugging Face folder's encoder reads at most: Whisper's 30, else
    infinity. Raises `UserError` as `load` does; reads no weights."""
    config = _config(path)
    return (
        config.max_source_positions * WHISPER_STEP if config.model_type == "whisper" else math.inf
    )


def _config(path: str | Path):
    from transformers import AutoConfig

    if not (Path(path) / "config.json").is_file():
        raise UserError(f"{path} is no Hugging Face folder: it has no config.json")
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    if config.model_type not in ("whisper", *WAVES):
        known = ", ".join(WAVES)
        raise UserError(f"{path} is of type '{config.model_type}': use whisper or one of {known}")
    return config


def load(path: str | Path, *, random: bool = False, seed: int = 0) -> ForeignEncoder:
    """The encoder of a Hugging Face folder (config.json, safetensors); nothing is downloaded.

    ``random`` draws the weights anew instead of reading them: the baseline of that architecture.
    Raises `UserError` for a folder that is none, or of an architecture not named here.
    """
    from transformers import AutoModel, Wav2Vec2FeatureExtractor, WhisperFeatureExtractor
    from transformers.utils import logging

    logging.disable_progress_bar()  # a tool has its own
    folder, config = Path(path), _config(path)
    kind = config.model_type
    if random:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModel.from_config(config)
    else:
        try:
            model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be loaded: {' '.join(str(error).split())}") from None
    known = (folder / "preprocessor_config.json").is_file()
    if kind == "whisper":
        step = WHISPER_STEP
        extractor = (
            WhisperFeatureExtractor.from_pretrained(folder, local_files_only=True)
            if known
            else WhisperFeatureExtractor(
                feature_size=config.num_mel_bins,
                chunk_length=round(config.max_source_positions * step),
            )
        )
        module = model.get_encoder()
    else:
        step = float(np.prod(config.conv_stride)) / RATE
        extractor = (
            Wav2Vec2FeatureExtractor.from_pretrained(folder, local_files_only=True)
            if known
            else Wav2Vec2FeatureExtractor(do_normalize=True)
        )
        module = model
    name = folder.name + (" (random)" if random else "")
    return ForeignEncoder(name, module.eval().requires_grad_(False), extractor, kind, step)
