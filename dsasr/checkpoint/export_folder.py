"""The folder of an exported model (`dsasr.inference.export` writes it): its files and settings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsasr.checkpoint.tensor_fragments import file_digest
from dsasr.model.encoders.pretrained import PREPROCESSOR, PROCESSOR
from dsasr.utils.errors import UserError
from dsasr.utils.io import atomic_folder, atomic_write

MODEL_TYPE, FORMAT = "dsasr", 1
LLM = "llm"  # folder of the language model and its tokenizer
ENCODER = "encoder"  # folder with the config.json of a pretrained encoder
CMVN = "cmvn.json"
PHONEMES = "phonemes.json"  # units of the CTC head
CHECKSUMS = "SHA256SUMS"
# The files of a language model besides its weights and config.json; no others are copied.
LLM_FILES = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja", "dsasr_tokenizer.json",
)  # fmt: skip


def is_export(folder: Path) -> bool:
    """Whether `dsasr export` wrote ``folder``."""
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and values.get("model_type") == MODEL_TYPE


def read_values(folder: Path) -> dict[str, Any]:
    """The plain values of an export's ``config.json``.

    Raises `UserError` if it is none, or of another format.
    """
    if not is_export(folder):
        raise UserError(f"{folder} is no exported recognizer: make one with `dsasr export`")
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if values.get("format") != FORMAT:
        raise UserError(f"{folder} is of format {values.get('format')!r}, this code reads {FORMAT}")
    return values


def write_checksums(folder: Path) -> None:
    """Write ``SHA256SUMS``, a line for each file in ``folder``, as ``sha256sum`` writes them."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [f"{file_digest(path)}  {path.relative_to(folder).as_posix()}\n" for path in paths]
    atomic_write(folder / CHECKSUMS, "".join(lines))


def verify(folder: Path) -> None:
    """Compare each file of an export with its checksum; one written without them passes.

    Raises `UserError` for a file that is missing, unreadable or altered.
    """
    try:
        if not (folder / CHECKSUMS).is_file():
            return
        for line in (folder / CHECKSUMS).read_text(encoding="utf-8").splitlines():
            expected, _, name = line.partition("  ")
            path = folder / name
            if not name or Path(name).is_absolute() or ".." in Path(name).parts:
                raise UserError(f"{folder / CHECKSUMS} has a line that is no checksum: {line[:80]}")
            if not path.is_file():
                raise UserError(f"{folder} lacks {name}: copy or export it again")
            if file_digest(path) != expected:
                raise UserError(
                    f"{path} was altered: copy or export it again; if the change is your own, "
                    f"remove its line from {CHECKSUMS}"
                )
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{folder} cannot be read: {error}") from None


def original_or_copy(path: str, copies: Mapping[str, Path]) -> str:
    """``path``, or the same file in a copy of its folder where the original is gone.

    ``copies``: folder → its copy.
    """
    for folder, copy in copies.items():
        if path and not Path(path).exists() and Path(path).is_relative_to(folder):
            found = copy / Path(path).relative_to(folder)
            return str(found) if found.exists() else path
    return path


def copy_without_weights(folder: Path, target: Path) -> None:
    """Copy what a model is built from (settings, tokenizer, CMVN, phonemes) to the new folder
    ``target``."""
    names = [CMVN, PHONEMES, f"{LLM}/config.json"]
    names += [f"{ENCODER}/{name}" for name in ("config.json", PREPROCESSOR, PROCESSOR)]
    names += [f"{LLM}/{name}" for name in LLM_FILES]
    with atomic_folder(target) as staging:
        for name in names:
            if (folder / name).is_file():
                (staging / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(folder / name, staging / name)
