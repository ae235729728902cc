"""Shapes of pretrained encoders without their weights: for planning, and without a network.

From a folder's config.json, from the hub's model in the library's cache, or of a model in
`PUBLISHED`.
"""

from __future__ import annotations

from typing import Any

from dsasr.model.encoders.pretrained import (
    PretrainedEncoder,
    PretrainedEncoderConfig,
    family_of,
    inner_settings,
    read_settings,
)
from dsasr.model.llm_hub import config_folder, is_hub_name
from dsasr.utils.errors import UserError


def _whisper(width: int, layers: int, mels: int = 80) -> dict[str, Any]:
    return {"model_type": "whisper", "d_model": width, "encoder_layers": layers,
            "encoder_attention_heads": width // 64, "encoder_ffn_dim": 4 * width,
            "num_mel_bins": mels}  # fmt: skip


def _wave(model_type: str, width: int = 768, layers: int = 12, **more: Any) -> dict[str, Any]:
    return {"model_type": model_type, "hidden_size": width, "num_hidden_layers": layers,
            "num_attention_heads": width // 64 if width < 1280 else 16,
            "intermediate_size": 4 * width, **more}  # fmt: skip


# LayerNorm in every convolution and before every block: the large models trained on 60,000 h.
_STABLE = {"feat_extract_norm": "layer", "do_stable_layer_norm": True}
# As in the models' own config.json; what is not named is transformers' default.
PUBLISHED: dict[str, dict[str, Any]] = {
    "openai/whisper-tiny": _whisper(384, 4),
    "openai/whisper-base": _whisper(512, 6),
    "openai/whisper-small": _whisper(768, 12),
    "openai/whisper-medium": _whisper(1024, 24),
    "openai/whisper-large-v2": _whisper(1280, 32),
    "openai/whisper-large-v3": _whisper(1280, 32, mels=128),
    "openai/whisper-large-v3-turbo": _whisper(1280, 32, mels=128),
    "facebook/wav2vec2-base": _wave("wav2vec2"),
    "facebook/wav2vec2-large": _wave("wav2vec2", 1024, 24),
    "facebook/wav2vec2-large-lv60": _wave("wav2vec2", 1024, 24, conv_bias=True, **_STABLE),
    "facebook/hubert-base-ls960": _wave("hubert"),
    "facebook/hubert-large-ll60k": _wave("hubert", 1024, 24, conv_bias=True, **_STABLE),
    "facebook/hubert-xlarge-ll60k": _wave("hubert", 1280, 48, conv_bias=True, **_STABLE),
    "microsoft/wavlm-base-plus": _wave("wavlm"),
    "microsoft/wavlm-large": _wave("wavlm", 1024, 24, **_STABLE),
    "facebook/w2v-bert-2.0": _wave("wav2vec2-bert", 1024, 24),
}


def is_published(path: str) -> bool:
    """Whether the shape of ``path`` comes from `PUBLISHED`, as no config.json of it is here."""
    return config_folder(path) is None and is_hub_name(path) and path in PUBLISHED


def fresh_encoder(cfg: PretrainedEncoderConfig) -> PretrainedEncoder:
    """The encoder of ``cfg.path`` with fresh weights, without a network; under
    ``torch.device("meta")`` it takes no memory.

    Raises `UserError` where its shape is not known.
    """
    folder = config_folder(cfg.path)
    if folder is not None:
        settings = read_settings(folder)
    elif is_published(cfg.path):
        from transformers import AutoConfig

        settings = inner_settings(AutoConfig.for_model(**PUBLISHED[cfg.path]))
    else:
        raise UserError(
            f"model.encoder.path: there is no {cfg.path}/config.json; only that file is needed to "
            f"plan (known without it: {', '.join(PUBLISHED)})"
        )
    return family_of(settings.model_type, cfg.path)(settings, cfg)
