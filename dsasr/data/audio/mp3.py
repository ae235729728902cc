"""How many frames an MP3 holds, written into its header.

Decoders take an MP3's length from the header's frame count (Xing's, in the first frame), or without
one from the size and the first frame's bit rate, which for a variable rate is an estimate; beyond
that length libsndfile reads nothing. Here the frames are counted, and the count is written into
the header, or put before the file as one.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

_BIT_RATES = {  # kbit/s by the header's index, layer III
    True: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),  # MPEG-1
    False: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),  # MPEG-2 and 2.5
}
_RATES = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}
_TAGS = (b"Xing", b"Info")
_HAS_FRAMES, _HAS_BYTES = 1, 2  # of a tag's flags


class _Frame(NamedTuple):
    """A layer III frame; sizes in bytes, ``samples`` of each channel."""

    start: int
    size: int
    rate: int
    samples: int
    tag_at: int  # where a Xing tag would stand in the file


def is_mp3(data: bytes) -> bool:
    """Whether a layer III frame begins the file, after an ID3 tag if there is one."""
    return next(_frames(data), None) is not None


def with_frame_count(data: bytes) -> bytes:
    """``data`` with the number of its frames in the header; unchanged where it is there already,
    and where it is no MP3."""
    frames = _frames(data)
    first = next(frames, None)
    if first is None:
        return data
    count = 1 + sum(1 for _ in frames)
    tag = data[first.tag_at : first.tag_at + 12]
    if tag[:4] in _TAGS:
        flags, claimed = struct.unpack(">II", tag[4:12])
        if not flags & _HAS_FRAMES:
            return data
        if claimed >= count - 1:  # fewer frames than claimed: the decoder's length shows it
            return data
        values = struct.pack(">I", count - 1)
        if flags & _HAS_BYTES:
            values += struct.pack(">I", min(len(data) - first.start, 0xFFFF_FFFF))
        at = first.tag_at + 8
        return data[:at] + values + data[at + len(values) :]
    return data[: first.start] + _header_frame(data, first, count) + data[first.start :]


def _frames(data: bytes) -> Iterator[_Frame]:
    """The frames of ``data`` in order; what lies between them is skipped.

    None of a file that begins otherwise: bytes like a frame's header are in any audio.
    """
    if data[:3] != b"ID3" and (data[:1] != b"\xff" or data[1:2] < b"\xe0"):
        return
    at, end, found = _after_id3(data), len(data), False
    if data[at : at + 4] == b"fLaC":
        return
    while at + 4 <= end:
        frame = _frame(data, at)
        # Before the first frame and after damage, two headers in a row show that it is a frame.
        if frame is not None and (found or _followed(data, frame)):
            yield frame
            at, found = at + frame.size, True
            continue
        found = False
        at = data.find(b"\xff", at + 1)
        if at < 0:
            return


def _followed(data: bytes, frame: _Frame) -> bool:
    after = frame.start + frame.size
    return after >= len(data) or _frame(data, after) is not None


def _after_id3(data: bytes) -> int:
    if data[:3] != b"ID3" or len(data) < 10:
        return 0
    size = 0
    for byte in data[6:10]:
        size = size << 7 | byte & 0x7F
    return 10 + size


def _frame(data: bytes, at: int) -> _Frame | None:
    if at + 4 > len(data) or data[at] != 0xFF or data[at + 1] & 0xE6 != 0xE2:  # layer III
        return None
    version = data[at + 1] >> 3 & 3  # 3: MPEG-1, 2: MPEG-2, 0: MPEG-2.5
    bits, rate = data[at + 2] >> 4, data[at + 2] >> 2 & 3
    if version == 1 or bits in (0, 15) or rate == 3:
        return None
    mpeg1, mono = version == 3, data[at + 3] >> 6 == 3
    hertz = _RATES[version][rate]
    samples = 1152 if mpeg1 else 576
    size = samples // 8 * 1000 * _BIT_RATES[mpeg1][bits] // hertz + (data[at + 2] >> 1 & 1)
    return _Frame(at, size, hertz, samples, at + 4 + _side_bytes(mpeg1, mono))


def _side_bytes(mpeg1: bool, mono: bool) -> int:
    return (17 if mono else 32) if mpeg1 else (9 if mono else 17)


def _header_frame(data: bytes, first: _Frame, count: int) -> bytes:
    """A silent frame like the first, of 64 kbit/s or more, with a Xing tag that has the count."""
    head = bytearray(data[first.start : first.start + 4])
    head[1] |= 1  # no checksum
    head[2] = 9 << 4 | head[2] & 0x0C  # a bit rate whose frames hold the tag, no padding
    size = _frame(bytes(head), 0).size
    tag_at = first.tag_at - first.start
    frame = bytes(head).ljust(tag_at, b"\0") + b"Xing" + struct.pack(">II", _HAS_FRAMES, count)
    return frame.ljust(size, b"\0")
