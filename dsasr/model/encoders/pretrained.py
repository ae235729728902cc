"""Pretrained encoders, from Hugging Face folders: what all families share.

A family is a short file beside this one: a subclass of `PretrainedEncoder` that says which front
end it reads, how many frames come out, and how padding is kept out of an utterance's frames.
Weights are safetensors, read by name; no code from the folder is run.

Whatever a family of transformers does at random in training (layer drop, time masks) is off: it
would make ranks differ, and the recipe has SpecAugment and dropout of its own. BatchNorm keeps the
statistics that it was trained with.
"""

from __future__ import annotations

import importlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING

from dsasr.data.audio.frontends import PretrainedFrontEnd
from dsasr.model import activation_checkpointing
from dsasr.model.dynamic_chunks import Chunk
from dsasr.model.encoders.protocol import EncoderOutput, valid_frames
from dsasr.model.hf_config import model_type, read_hf_config
from dsasr.utils import ranges
from dsasr.utils.errors import UserError
from dsasr.utils.ranges import Dropout, NonNegativeInt, Range

# model_type in config.json → (module beside this one, class)
FAMILIES = {
    "whisper": ("whisper", "WhisperEncoder"),
    "qwen2_audio": ("whisper", "PooledWhisperEncoder"),
    "qwen2_audio_encoder": ("whisper", "PooledWhisperEncoder"),
    "voxtral": ("whisper", "WhisperEncoder"),
    "voxtral_encoder": ("whisper", "WhisperEncoder"),
    "qwen3_asr": ("qwen3_asr", "Qwen3AsrEncoder"),
    "qwen3_asr_encoder": ("qwen3_asr", "Qwen3AsrEncoder"),
    "wav2vec2": ("wav2vec2", "Wav2Vec2Encoder"),
    "hubert": ("wav2vec2", "Wav2Vec2Encoder"),
    "wavlm": ("wav2vec2", "Wav2Vec2Encoder"),
    "unispeech": ("wav2vec2", "Wav2Vec2Encoder"),
    "unispeech-sat": ("wav2vec2", "Wav2Vec2Encoder"),
    "data2vec-audio": ("wav2vec2", "Data2VecEncoder"),
    "wav2vec2-bert": ("wav2vec2_bert", "Wav2Vec2BertEncoder"),
    "parakeet_ctc": ("parakeet", "ParakeetEncoder"),
    "parakeet_rnnt": ("parakeet", "ParakeetEncoder"),
    "parakeet_tdt": ("parakeet", "ParakeetEncoder"),
    "parakeet_encoder": ("parakeet", "ParakeetEncoder"),
}
RATE = 16000  # every family reads 16 kHz
# Of the features that the encoder was trained on: the extractor's own file, or a whole processor's,
# which is what `ProcessorMixin.save_pretrained` of transformers 5 writes.
PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"


@dataclass(frozen=True)
class PretrainedEncoderConfig:
    """A pretrained encoder: Whisper, wav2vec 2.0, HuBERT, WavLM, Parakeet …"""

    path: str  # Hugging Face folder, or a hub name such as openai/whisper-large-v3
    weights: bool = True  # false: weights drawn at random, for benchmarks and baselines
    layers: NonNegativeInt = 0  # blocks kept, from the input; 0: all
    layer_sum: bool = False  # output: a learned weighted sum over all blocks instead of the last
    # of hidden states, attention and activations; null: the folder's
    dropout: Dropout | None = None
    # seconds that every utterance is padded to; Whisper was trained on 30
    pad_to: Annotated[float, Range(0, 3600)] = 0.0
    activation_checkpointing: bool = False  # recompute each block in the backward pass
    recompute: Literal["all", "cheap"] = "all"  # cheap: products are kept

    def __post_init__(self) -> None:
        ranges.check(self)
        if not self.path:
            raise UserError("model.encoder.path: give a Hugging Face folder or a hub name")


class PretrainedEncoder(nn.Module, ABC):
    """A family's encoder around transformers' layers; see `dsasr.model.encoders.protocol.Encoder`.

    Subclasses set ``front_end``, ``width`` and ``frame_seconds`` and implement `build`,
    `output_lengths`, ``blocks`` and `_encode`.
    """

    takes_chunks = False
    read_past_forward: tuple[str, ...] = ()
    anchor: str  # a parameter's name that finds the encoder inside a larger checkpoint
    front_end: PretrainedFrontEnd
    width: int
    frame_seconds: float

    def __init__(self, settings: Any, cfg: PretrainedEncoderConfig):
        """``settings``: transformers' configuration of the encoder (not of a model around it).

        Raises `UserError` for more layers than there are, and for an encoder with an adapter.
        """
        super().__init__()
        if getattr(settings, "add_adapter", False):
            raise UserError(
                f"{cfg.path} has an adapter of its own (add_adapter), which is not read"
            )
        self.cfg, self.settings = cfg, _quiet(settings, cfg.dropout)
        self.model = self.build(self.settings)
        if hasattr(self.model, "masked_spec_embed"):  # of the time masks that are off
            del self.model.masked_spec_embed
        count = len(self.blocks)
        if cfg.layers > count:
            raise UserError(
                f"model.encoder.layers={cfg.layers}: {cfg.path} has {count} blocks; give fewer"
            )
        if cfg.layers:
            del self.blocks[cfg.layers :]
        self.layer_weights = None
        if cfg.layer_sum:
            self.layer_weights = nn.Parameter(torch.zeros(len(self.blocks)))
        if cfg.activation_checkpointing:
            activation_checkpointing.enable(self.model, keep=cfg.recompute == "cheap")

    # -- what each family defines ------------------------------------------------------------------

    @abstractmethod
    def build(self, settings: Any) -> nn.Module:
        """transformers' encoder of these settings, with fresh weights."""

    @property
    @abstractmethod
    def blocks(self) -> nn.ModuleList:
        """The layers, from the input on."""

    @abstractmethod
    def output_lengths(self, lengths_B: Tensor) -> Tensor:
        """Encoder frames of utterances of ``lengths_B`` feature frames."""

    @abstractmethod
    def _encode(self, features_BTF: Tensor, lengths_B: Tensor, out_lengths_B: Tensor) -> Tensor:
        """[B, S, E]; frames beyond ``out_lengths_B`` may hold anything finite."""

    # -- what all share ----------------------------------------------------------------------

    @property
    def bins(self) -> int:
        return self.front_end.bins

    @property
    def dtype(self) -> torch.dtype:
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    def train(self, mode: bool = True) -> PretrainedEncoder:
        """Training mode for all but BatchNorm, whose statistics must not drift."""
        super().train(mode)
        for layer in self.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                layer.eval()
        return self

    def forward(
        self,
        features_BTF: Tensor,
        lengths_B: Tensor,
        chunk: Chunk | None = None,
        layers: bool = False,
    ) -> EncoderOutput:
        """Encode ``features_BTF``, of which ``lengths_B`` frames are valid and >= 1.

        Runs in the dtype of the weights. Raises ValueError for a chunk: these encoders see all.
        """
        if chunk is not None:
            raise ValueError(f"{type(self).__name__} knows no chunks")
        features = features_BTF.to(self.dtype)
        if self.cfg.pad_to:
            steps = round(self.cfg.pad_to * self.front_end.steps_per_second)
            missing = max(0, steps - features.shape[1])
            features = nn.functional.pad(features, (0, 0, 0, missing), value=self._silence())
        valid_BT = valid_frames(lengths_B, features.shape[1]).unsqueeze(2)
        features = torch.where(valid_BT, features, self._silence(features, lengths_B))
        seen_B = lengths_B
        if self.cfg.pad_to:
            # Beyond it, where a longer utterance of the batch has frames, there is no silence.
            seen_B = lengths_B.clamp_min(steps)
            seen_BT1 = valid_frames(seen_B, features.shape[1]).unsqueeze(2)
            features = features.masked_fill(~seen_BT1, 0.0)
        out_lengths_B = self.output_lengths(lengths_B)
        with self._recorded(layers or self.layer_weights is not None) as recorded:
            frames = self._encode(features, seen_B, self.output_lengths(seen_B))
        longest = int(self.output_lengths(torch.tensor(features_BTF.shape[1])))
        outputs = [self._pool(x)[:, :longest] for x in recorded]
        if self.layer_weights is not None:
            shares = self.layer_weights.softmax(0).to(frames.dtype)
            frames = sum(share * x for share, x in zip(shares, outputs, strict=True))
        frames = frames[:, :longest]
        valid_BS1 = valid_frames(out_lengths_B, frames.shape[1]).unsqueeze(2)
        frames = frames.masked_fill(~valid_BS1, 0.0)
        return EncoderOutput(frames, out_lengths_B, tuple(outputs) if layers else ())

    def _pool(self, x_BSE: Tensor) -> Tensor:
        """A block's output at the rate of the encoder's frames."""
        return x_BSE

    def _silence(self, features: Tensor | None = None, lengths_B: Tensor | None = None):
        """What stands where no audio is: a number, or a tensor that broadcasts to [B, T, F]."""
        return 0.0

    @contextmanager
    def _recorded(self, wanted: bool) -> Iterator[list[Tensor]]:
        """The blocks' outputs [B, S, E] of the forward passes inside, in order."""
        outputs: list[Tensor] = []

        def record(_block: nn.Module, _inputs: Any, output: Any) -> None:
            outputs.append(output[0] if isinstance(output, tuple) else output)

        handles = [b.register_forward_hook(record) for b in self.blocks] if wanted else []
        try:
            yield outputs
        finally:
            for handle in handles:
                handle.remove()


def family_of(kind: str, path: str) -> type[PretrainedEncoder]:
    """The family's class. Raises `UserError` with the families known."""
    if kind not in FAMILIES:
        known = ", ".join(sorted({name for name in FAMILIES if not name.endswith("_encoder")}))
        raise UserError(f"{path} is of type '{kind}', no known encoder: use one of {known}")
    module, name = FAMILIES[kind]
    return getattr(importlib.import_module(f"dsasr.model.encoders.{module}"), name)


def read_settings(folder: Path) -> Any:
    """transformers' configuration of the encoder in a Hugging Face folder, with ``do_normalize``
    of its preprocessor_config.json or processor_config.json if there is one.

    Raises `UserError` as `read_hf_config` does, and for an unknown family.
    """
    kind = model_type(folder)
    if kind and kind not in CONFIG_MAPPING:  # transformers would not say which families there are
        family_of(kind, str(folder / "config.json"))
    config = read_hf_config(folder)
    family_of(config.model_type, str(folder))
    settings = inner_settings(config)
    settings.do_normalize = bool(_preprocessor(folder)[0].get("do_normalize", True))
    return settings


def _preprocessor(folder: Path) -> tuple[dict[str, Any], Path]:
    """The settings of the folder's own feature extractor, and their file; empty if it has none.

    Raises `UserError` for a file that is damaged.
    """
    for path in (folder / PREPROCESSOR, folder / PROCESSOR):
        if not path.is_file():
            continue
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read: {error}") from None
        if path.name == PROCESSOR and isinstance(values, dict):
            values = values.get("feature_extractor", {})
        if not isinstance(values, dict):
            raise UserError(f"{path} holds no settings")
        return values, path
    return {}, folder / PREPROCESSOR


def check_preprocessor(folder: Path, front_end: PretrainedFrontEnd) -> None:
    """Raise `UserError` if the settings of the folder's feature extractor are of other audio or
    other features than the encoder of its config.json reads here."""
    values, path = _preprocessor(folder)
    rate = values.get("sampling_rate", front_end.rate)
    if rate != front_end.rate:
        raise UserError(
            f"{path} has a sampling_rate of {rate} Hz: only encoders of {front_end.rate} Hz are "
            "read; give another encoder"
        )
    bins = values.get("feature_size", front_end.bins)
    if front_end.kind == "w2v-bert":
        bins = bins * values.get("stride", 2) if "feature_size" in values else front_end.bins
    if bins != front_end.bins:
        raise UserError(
            f"{path} has {bins} features, the encoder of config.json reads {front_end.bins}: the "
            "two files are of different models; download the folder again"
        )


def inner_settings(config: Any) -> Any:
    """The encoder's part of a model's configuration, which may be of a larger model."""
    for name in ("audio_config", "encoder_config"):
        if hasattr(config, name):
            return getattr(config, name)
    return config


def build_encoder(folder: Path, cfg: PretrainedEncoderConfig) -> PretrainedEncoder:
    """The encoder of a Hugging Face folder with fresh weights; under ``torch.device("meta")`` it
    takes no memory. Raises `UserError` for a folder that is none or of an unknown family."""
    settings = read_settings(folder)
    return family_of(settings.model_type, str(folder))(settings, cfg)


def _quiet(settings: Any, dropout: float | None) -> Any:
    """The settings without random skips and masks, and with the recipe's dropout."""
    values = settings.to_dict()
    for name in ("layerdrop", "encoder_layerdrop", "mask_time_prob", "mask_feature_prob"):
        if name in values:
            setattr(settings, name, 0.0)
    if "apply_spec_augment" in values:
        settings.apply_spec_augment = False
    if dropout is not None:
        for name in values:
            if (
                "dropout" in name
                and isinstance(values[name], float | int)
                and name != "classifier_dropout"
            ):
                setattr(settings, name, dropout)
    return settings


def construct(model: type[nn.Module], settings: Any) -> nn.Module:
    """transformers' ``model`` of these settings, with torch's fused attention where it has that."""
    settings._attn_implementation = "sdpa" if model._supports_sdpa else "eager"
    return model(settings)
