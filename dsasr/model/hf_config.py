"""The config.json of a Hugging Face folder, for the shapes of its model: never for code.

A config.json can name code in two ways: a module beside it (``auto_map``), and a kernel of the
hub (``attn_implementation: owner/kernel``), which transformers downloads and runs. Both are refused
("Data is not code").
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from dsasr.utils.errors import UserError, message_of

# What reading a config.json, or building a model of one, raises for values that make no sense.
FAULTS = (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError, RecursionError)
NO_CODE = "code that comes with a model is never run"
_KERNEL_KEYS = ("_implementation", "_implementation_internal")  # of attention and experts


def read_hf_config(folder: Path) -> PretrainedConfig:
    """transformers' configuration of the model in ``folder``.

    Raises `UserError` for a folder without a config.json, for one that is damaged, and for one
    whose model needs code of its own.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} is no Hugging Face folder: it has no config.json")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it holds no settings")
        _refuse_code(path, values)
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except FAULTS as error:
        raise UserError(f"{path}: {reason_of(error)}") from None


def model_type(folder: Path) -> str:
    """The type that the config.json in ``folder`` names, or "none"; "" where it needs code of its
    own or cannot be read, as `read_hf_config` then says."""
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return "" if values.get("auto_map") else str(values.get("model_type") or "none")
    except (OSError, ValueError, AttributeError):
        return ""


def reason_of(error: Exception) -> str:
    """What a library's error says, in one line; that a model needs code of its own in our words."""
    text = str(error)
    if "trust_remote_code" in text or "custom code" in text:
        return f"the model needs code of its own: {NO_CODE}; give a model that transformers has"
    return message_of(error)


def _refuse_code(path: Path, values: dict[str, Any]) -> None:
    kind, own = values.get("model_type"), values.get("auto_map")
    if own and kind not in CONFIG_MAPPING:
        names = own.values() if isinstance(own, dict) else [own]
        modules = sorted({str(name).rpartition(".")[0] + ".py" for name in names})
        raise UserError(
            f"{path}: a model of type {kind!r} needs {', '.join(modules)!r} of its own folder, and "
            f"{NO_CODE}; give a model of a type that transformers has"
        )
    for key, value in _entries(values):
        if key.endswith(_KERNEL_KEYS) and isinstance(value, str) and not _is_plain(value):
            raise UserError(
                f"{path}: {key} names the kernel {value!r} of the hub, and {NO_CODE}; remove the "
                "entry, and choose attention with model.llm.attn"
            )


def _is_plain(name: str) -> bool:
    """Whether ``name`` is an implementation of transformers' own: no owner, version or pipe."""
    return name.replace("_", "").isalnum()


def _entries(values: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(key, value) of each leaf, at any depth; entries of lists and of mappings of an
    implementation keep their parent's key."""
    if isinstance(values, dict):
        for name, value in values.items():
            yield from _entries(value, key if key.endswith(_KERNEL_KEYS) else name)
    elif isinstance(values, list):
        for value in values:
            yield from _entries(value, key)
    else:
        yield key, values
