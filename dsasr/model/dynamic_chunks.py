"""Dynamic chunks: the attention context of an encoder frame, drawn for each batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dsasr.utils import ranges
from dsasr.utils.errors import UserError
from dsasr.utils.ranges import NonNegativeInt, PositiveInt, Share


@dataclass(frozen=True)
class ChunkConfig:
    """How `draw_chunk` draws. Sizes in encoder frames (40 ms), ``left`` in chunks."""

    full_share: Share = 0.5  # share of the batches with full context
    min_size: PositiveInt = 4  # smallest chunk, in encoder frames (40 ms)
    max_size: PositiveInt = 25  # largest chunk, in encoder frames (40 ms)
    all_left_share: Share = 0.5  # share of the chunked batches that see everything to the left
    max_left: NonNegativeInt = 8  # most chunks that the other chunked batches see to the left

    def __post_init__(self) -> None:
        ranges.check(self)
        if self.min_size > self.max_size:
            raise UserError(
                f"chunks of {self.min_size} to {self.max_size} frames: need min_size <= max_size"
            )


@dataclass(frozen=True)
class Chunk:
    """``size`` encoder frames see each other and ``left`` chunks before them (-1: all)."""

    size: int
    left: int = -1


def chunk_of(seconds: float, left: int, frame_seconds: float) -> Chunk:
    """The chunk of ``seconds`` and ``left`` chunks before it, of an encoder with a frame each
    ``frame_seconds``. Raises `UserError` where that is no whole number of frames."""
    frames = round(seconds / frame_seconds)
    if frames < 1 or abs(frames * frame_seconds - seconds) > 1e-6:
        raise UserError(
            f"a chunk of {1000 * seconds:g}ms is no whole number of the encoder's frames of "
            f"{1000 * frame_seconds:g} ms: give {max(frames, 1) * frame_seconds * 1000:g}ms"
        )
    return Chunk(frames, left)


def draw_chunk(cfg: ChunkConfig, generator: torch.Generator) -> Chunk | None:
    """Draw a batch's chunk, None for full context (dynamic chunks, arXiv 2012.05481).

    Always draws four numbers from ``generator`` (on the CPU).
    """
    full, size, all_left, left = torch.rand(4, generator=generator).tolist()
    if full < cfg.full_share:
        return None
    frames = cfg.min_size + int(size * (cfg.max_size - cfg.min_size + 1))
    return Chunk(frames, -1 if all_left < cfg.all_left_share else int(left * (cfg.max_left + 1)))
