"""Where a language model lies: a local folder, or a Hugging Face hub name's place in the cache."""

from __future__ import annotations

import re
from pathlib import Path

from dsasr.errors import UserError

# Weights, settings and tokenizer. No code and no pickle is fetched, let alone run.
_WANTED = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "*.model",
    "*.jinja",
    "merges.txt",
)
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def is_hub_name(path: str) -> bool:
    """Whether ``path`` can only be the name of a model of the hub: no such folder is here."""
    return bool(_NAME.fullmatch(path)) and not Path(path).exists()


def find_llm(path: str) -> Path:
    """The folder of ``model.llm.path``: itself, or the hub's model of that name, which is fetched
    if need be (into the library's cache; ``HF_HUB_OFFLINE=1`` takes what is there).

    Several ranks of a machine may ask at once. Raises `UserError` with what to do.
    """
    folder = Path(path)
    if (folder / "config.json").is_file():
        return folder
    if not is_hub_name(path):
        raise UserError(
            f"model.llm.path: there is no {folder}/config.json; give a Hugging Face folder or a hub"
            " name, such as Qwen/Qwen3-1.7B"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        found = Path(snapshot_download(path, allow_patterns=list(_WANTED)))
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(
            f"model.llm.path: there is no folder {path}, and the hub's model of that name is not to"
            f" be had ({reason}): give a local folder; or fetch it where there is a network, with"
            f" 'hf download {path}' (once huggingface-cli download), and set HF_HUB_OFFLINE=1"
        ) from None
    if not (found / "config.json").is_file():
        raise UserError(f"model.llm.path: the hub's {path} holds no language model (config.json)")
    return found
