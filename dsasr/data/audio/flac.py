"""The length of a FLAC file whose header has none, as one written to a pipe: from its last frame.

Layouts are those of RFC 9639, sections 8.2 (streaminfo) and 9.1 (frame header).
"""

from __future__ import annotations

_STREAMINFO = 8  # where its content begins
_COUNT = 18  # where the 8 bytes begin whose lower 36 bits are the number of samples
_COUNT_BITS = (1 << 36) - 1
_LONGEST_HEADER = 16  # bytes of a frame's header


def lacks_sample_count(head: bytes) -> bool:
    """Whether a file that begins with ``head`` (26 bytes) is FLAC of unknown length."""
    if head[:4] != b"fLaC" or len(head) < 26 or head[4] & 0x7F:
        return False
    return not int.from_bytes(head[_COUNT : _COUNT + 8], "big") & _COUNT_BITS


def is_cut_off(data: bytes, missing: float) -> bool:
    """Whether the last frame of a FLAC file ends more than a share of ``missing`` before the length
    in its header."""
    if data[:4] != b"fLaC" or len(data) < 42 or data[4] & 0x7F:
        return False
    claimed = int.from_bytes(data[_COUNT : _COUNT + 8], "big") & _COUNT_BITS
    return _samples(data) < claimed * (1 - missing)


def with_sample_count(data: bytes) -> bytes:
    """``data`` with its number of samples in the header; unchanged where it is there already, and
    where it is no FLAC."""
    if not lacks_sample_count(data):
        return data
    values = int.from_bytes(data[_COUNT : _COUNT + 8], "big")
    samples = _samples(data)
    if not 0 < samples <= _COUNT_BITS:
        return data
    return data[:_COUNT] + (values | samples).to_bytes(8, "big") + data[_COUNT + 8 :]


def _samples(data: bytes) -> int:
    """The number of the sample after the last frame; 0 where no frame is found."""
    at = len(data)
    while (at := data.rfind(b"\xff", _STREAMINFO, at)) >= 0:
        if (end := _frame_end(data, at)) is not None:
            return end
    return 0


def _frame_end(data: bytes, at: int) -> int | None:
    """The number of the sample after the frame whose header is at ``at``; None: there is none."""
    head = data[at : at + _LONGEST_HEADER]
    if len(head) < 6 or head[1] & 0xFE != 0xF8 or head[3] & 1:
        return None
    number, used = _coded_number(head[4:])
    size, size_bytes = _block_size(head[2] >> 4, head[4 + used :])
    rate_bytes = {12: 1, 13: 2, 14: 2}.get(head[2] & 15, 0)
    length = 4 + used + size_bytes + rate_bytes
    if not used or not size or length >= len(head) or _crc8(head[:length]) != head[length]:
        return None
    variable = head[1] & 1
    usual = int.from_bytes(data[_STREAMINFO : _STREAMINFO + 2], "big")
    return (number if variable else number * usual) + size


def _coded_number(data: bytes) -> tuple[int, int]:
    """A number in the extended UTF-8 of frame headers, and its bytes; 0 bytes: it is none."""
    first = data[0]
    if first < 0x80:
        return first, 1
    count = next((n for n in range(7) if not first << n & 0x80), 7)
    rest = data[1:count]
    if count < 2 or len(rest) < count - 1 or any(byte & 0xC0 != 0x80 for byte in rest):
        return 0, 0
    number = first & (0x7F >> count)
    for byte in rest:
        number = number << 6 | byte & 0x3F
    return number, count


def _block_size(code: int, rest: bytes) -> tuple[int, int]:
    """Samples of a frame, and the bytes that say so after the frame's number; 0: it is reserved."""
    if code in (6, 7):
        return int.from_bytes(rest[: code - 5], "big") + 1, code - 5
    return (0 if code == 0 else 192 if code == 1 else 576 << code - 2 if code < 6 else 1 << code), 0


def _crc8(data: bytes) -> int:
    value = 0
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = (value << 1 ^ 0x07 if value & 0x80 else value << 1) & 0xFF
    return value
