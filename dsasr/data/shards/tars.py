"""Reads the members of a tar that may be truncated, damaged or hostile."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator

MAX_JSON = 4 << 20  # bytes of a json member
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"(\xb5": "zstd"}


def members(tar: str | os.PathLike | bytes) -> Iterator[tuple[tarfile.TarInfo, bytes | None]]:
    """A tar's members in order, with the bytes of regular json files up to a limit, else None.

    Raises `EOFError` where the archive ends early or a header is damaged, after yielding all
    members before that.
    """
    if isinstance(tar, bytes):
        file, size = io.BytesIO(tar), len(tar)
    else:
        file, size = open(tar, "rb"), os.path.getsize(tar)  # noqa: SIM115
    with file:
        try:
            archive = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115
        except (tarfile.TarError, EOFError, ValueError, RecursionError) as error:
            file.seek(0)
            kind = COMPRESSED.get(file.read(2))
            detail = f"compressed by {kind}; only plain tars are read by offset" if kind else error
            raise EOFError(f"not a tar: {detail}") from None
        last_offset = -1
        while True:
            try:
                member = archive.next()
            except (tarfile.TarError, EOFError, ValueError, RecursionError) as error:
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
            if member.isreg() and member.name.endswith(".json") and member.size <= MAX_JSON:
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
