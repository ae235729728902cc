"""Reads the members of a tar that may be truncated, damaged or hostile."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from typing import BinaryIO

MAX_LABELS = 4 << 20  # bytes of a member with labels
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"(\xb5": "zstd"}
_STEP = 1 << 20  # bytes read at once in search of a second archive
_BROKEN = (tarfile.TarError, EOFError, ValueError, RecursionError)


def members(
    tar: str | os.PathLike | bytes, labels: str = "json"
) -> Iterator[tuple[tarfile.TarInfo, bytes | None]]:
    """A tar's members in order, with the bytes of regular files that end in ``.labels`` up to a
    limit, else None.

    Tars that were put one after another (``cat a.tar b.tar``) are read on to the last. Raises
    `EOFError` where the archive ends early or a header is damaged, after yielding all members
    before that.
    """
    if isinstance(tar, bytes):
        file, size = io.BytesIO(tar), len(tar)
    else:
        file, size = open(tar, "rb"), os.path.getsize(tar)  # noqa: SIM115
    with file:
        start: int | None = 0
        while start is not None:
            file.seek(start)
            end = yield from _archive(file, size, labels)
            start = _next_archive(file, end)


def is_macos_extra(name: str) -> bool:
    """Whether a file is one that macOS puts beside another of nearly that name (``._a.wav``)."""
    return name.rpartition("/")[2].startswith("._") or "__MACOSX/" in name


def is_tar(head: bytes) -> bool:
    """Whether a file that begins with ``head`` (a block of 512 bytes) is a tar."""
    try:
        tarfile.TarInfo.frombuf(head[: tarfile.BLOCKSIZE], "utf-8", "surrogateescape")
    except tarfile.EOFHeaderError:
        return True  # an empty one: zeros
    except _BROKEN:
        return False
    return True


def _archive(
    file: BinaryIO, size: int, labels: str
) -> Iterator[tuple[tarfile.TarInfo, bytes | None]]:
    """The members of the archive that starts here; returns where it ends."""
    start = file.tell()
    try:
        archive = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115
    except _BROKEN as error:
        file.seek(start)
        kind = COMPRESSED.get(file.read(2))
        detail = f"compressed by {kind}; only plain tars are read by offset" if kind else error
        raise EOFError(f"not a tar: {detail}") from None
    last_offset = -1
    while True:
        try:
            member = archive.next()
        except _BROKEN as error:
            raise EOFError(str(error)) from None
        if member is None:
            break
        archive.members.clear()  # or tarfile would keep all headers
        if member.size < 0 or member.offset <= last_offset:
            raise EOFError(f"damaged header at byte {member.offset}")
        last_offset = member.offset
        if member.isreg() and member.offset_data + member.size > size:
            raise EOFError(f"{member.name[:80]} is cut off")
        data = None
        wanted = member.name.lower().endswith(f".{labels}") and member.size <= MAX_LABELS
        if member.isreg() and wanted:
            position = file.tell()
            file.seek(member.offset_data)
            data = file.read(member.size)
            file.seek(position)
        yield member, data
    # tarfile treats an early end of file, and a damaged header in the middle, as the end of the
    # archive; a complete archive ends in a block of zeros.
    file.seek(archive.offset)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise EOFError("the archive's end is missing")
    if any(block):
        raise EOFError(f"damaged header at byte {archive.offset}")
    return archive.offset


def _next_archive(file: BinaryIO, end: int) -> int | None:
    """Where another archive starts after the zeros at byte ``end``; None: nowhere."""
    file.seek(end)
    position = end
    while block := file.read(_STEP):
        if rest := block.lstrip(b"\0"):
            first = position + len(block) - len(rest)
            return first - (first - end) % tarfile.BLOCKSIZE
        position += len(block)
    return None
