"""Lines, JSON rows and tables of manifests, with errors that name file and line."""

from __future__ import annotations

import contextlib
import csv
import gzip
import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from dsasr.utils.errors import UserError

T = TypeVar("T")
# What columns of other people's tables are called.
TEXT_NAMES = ("text", "sentence", "transcription", "transcript", "normalized_text", "txt")
LANG_NAMES = ("lang", "language", "locale")
SPEAKER_NAMES = ("speaker", "speaker_id", "client_id", "spk")


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file that are not empty, from 1; ``.gz`` is unpacked."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        # Lines end at line feeds alone: a transcript may hold U+2028, which splitlines cuts at.
        with opener(path, "rt", encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line.removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error}") from None
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read: {reason}") from None


def json_rows(path: Path, read: Callable[[dict], T]) -> Iterator[T]:
    """``read(row)`` of each line. Raises `UserError` for what is no object, and names the line of
    what ``read`` raises."""
    for number, line in lines(path):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("not a JSON object")
            yield read(row)
        except KeyError as error:
            raise UserError(f"{path}, line {number}: {error} is missing") from None
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: {error}") from None


def first_row(path: Path) -> dict[str, Any]:
    """The first JSON object of a file of JSON lines; empty where it is none."""
    if not path.is_file() or not path.name.endswith((".jsonl", ".json", ".list", ".jsonl.gz")):
        return {}
    try:
        opened = gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")  # noqa: SIM115
        with opened as file:
            line = b"\n"
            while line and not line.strip():
                line = file.readline(1 << 20)
        row = json.loads(line.decode("utf-8-sig"))
    except (OSError, EOFError, ValueError, RecursionError):
        return {}
    return row if isinstance(row, dict) else {}


def delimited(path: Path, tabs: bool) -> Iterator[dict[str, str]]:
    """The rows of a table with a header line: CSV, or TSV without quoting."""
    csv.field_size_limit(1 << 24)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if tabs:
                yield from csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            else:
                yield from csv.DictReader(file)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def header(path: Path, tabs: bool) -> list[str]:
    """The names of a table's columns; none where it cannot be read."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        with open(path, encoding="utf-8-sig") as file:
            first = file.readline(1 << 16).rstrip("\r\n")
        return next(csv.reader([first], delimiter="\t" if tabs else ","), [])
    return []


def first_of(row: Mapping[str, Any], names: tuple[str, ...]) -> str:
    """The first of ``names`` that ``row`` has a value for, as text."""
    return next((str(row[name]) for name in names if row.get(name)), "")


def seconds(value: Any) -> float:
    """Raises ValueError for a time that is none."""
    number = float(value or 0.0)
    if not 0 <= number < math.inf:
        raise ValueError(f"{value!r} is no time in seconds")
    return number


def text_of(value: Any) -> str:
    """A transcript. Raises ValueError for what is no text."""
    if not isinstance(value, str):
        raise ValueError(f"the transcript is {value!r}, not a text")
    return value


def audio_of(value: Any, folder: Path) -> Path:
    """The file that a manifest in ``folder`` names. Raises ValueError for what is no file."""
    if not isinstance(value, str) or not value:
        raise ValueError(f"the audio is {value!r}, not a path")
    if "://" in value or value.rstrip().endswith("|"):
        raise ValueError(f"'{value[:80]}' is no file: download or convert the audio first")
    if ".ark:" in value:
        raise ValueError(f"'{value[:80]}' is in a Kaldi archive: write files with wav-copy first")
    path = folder / value
    # Some tools write paths from the working directory.
    return Path(value) if not path.is_file() and Path(value).is_file() else path
