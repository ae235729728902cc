"""Finding a model: in a local folder, or by its Hugging Face hub name (cached)."""

from __future__ import annotations

import re
from pathlib import Path

from dsasr.utils.errors import UserError, message_of

# Weights, settings and tokenizer. No code and no pickle is fetched, let alone run.
_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "*.model",
    "*.jinja",
    "merges.txt",
)
# The same weights once more, in another precision.
_VARIANTS = ("*.fp16*", "*.fp32*", "*.bf16*")
# Published shapes, for planning with a language model that is not on this machine (of encoders:
# `dsasr.model.encoders.published`).
QWEN3 = {
    "Qwen3-0.6B": {"hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16,
                   "intermediate_size": 3072},
    "Qwen3-1.7B": {"hidden_size": 2048, "num_hidden_layers": 28, "num_attention_heads": 16,
                   "intermediate_size": 6144},
    "Qwen3-4B": {"hidden_size": 2560, "num_hidden_layers": 36, "num_attention_heads": 32,
                 "intermediate_size": 9728},
}  # fmt: skip
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def is_hub_name(path: str) -> bool:
    """Whether ``path`` can only be the name of a model of the hub: no such folder is here."""
    return bool(_NAME.fullmatch(path)) and not Path(path).exists()


def find_model(path: str, key: str = "model.llm.path") -> Path:
    """The folder of a model that the recipe's ``key`` names: itself, or the hub's model.

    The hub's model is downloaded into the library's cache unless it is there;
    ``HF_HUB_OFFLINE=1`` forbids downloads. Several ranks of a machine may call this at once.
    Raises `UserError` that names the fix.
    """
    folder = Path(path)
    if (folder / "config.json").is_file():
        return folder
    if not is_hub_name(path):
        example = "openai/whisper-large-v3" if "encoder" in key else "Qwen/Qwen3-1.7B"
        raise UserError(
            f"{key}: there is no {folder}/config.json; give a Hugging Face folder or a hub"
            f" name, such as {example}"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        files = {"allow_patterns": list(_FILES), "ignore_patterns": list(_VARIANTS)}
        folder = Path(snapshot_download(path, **files))
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = message_of(error).rstrip(".")
        raise UserError(
            f"{key}: there is no folder {path}, and the hub's model of that name is not to"
            f" be had ({reason}): give a local folder; or fetch it where there is a network, with"
            f" 'hf download {path}' (once huggingface-cli download), and set HF_HUB_OFFLINE=1"
        ) from None
    if not (folder / "config.json").is_file():
        raise UserError(f"{key}: the hub's {path} has no config.json")
    return folder


def config_folder(path: str) -> Path | None:
    """The folder with the config.json of that model: ``path`` itself, or the hub's model in the
    cache; None where there is neither. Uses no network."""
    from huggingface_hub import try_to_load_from_cache

    folder = Path(path)
    if not (folder / "config.json").is_file() and is_hub_name(path):
        cached = try_to_load_from_cache(path, "config.json")
        folder = Path(cached).parent if isinstance(cached, str) else folder
    return folder if (folder / "config.json").is_file() else None


def llm_config(path: str):
    """The config of the model of ``model.llm.path``, without its weights and without a network.

    From the folder, from the hub's model in the cache, or of a model in `QWEN3`. Raises
    `UserError` where it is none of them.
    """
    from transformers import AutoConfig

    from dsasr.model.hf_config import read_hf_config

    folder, name = config_folder(path), Path(path).name
    if folder is not None:
        return read_hf_config(folder)
    if name not in QWEN3:
        raise UserError(
            f"model.llm.path: there is no {path}/config.json; only that file is needed to plan "
            f"(known without it: {', '.join(QWEN3)})"
        )
    shape = {"vocab_size": 151_936, "num_key_value_heads": 8, "head_dim": 128}
    return AutoConfig.for_model("qwen3", tie_word_embeddings=True, **shape, **QWEN3[name])
