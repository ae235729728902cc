"""Chunk by chunk from caches equals the masked run over the whole utterance."""

from __future__ import annotations

import pytest
import torch

from dsasr.model.dynamic_chunks import Chunk
from dsasr.model.encoders.conformer import Encoder, EncoderConfig

CONFIG = EncoderConfig(width=16, layers=3, heads=2, ffn=32, kernel=7, mels=12, conv_expansion=2)
CHUNKS = [Chunk(1, 0), Chunk(1, 3), Chunk(3), Chunk(4, 1), Chunk(5, 0), Chunk(16, 4), Chunk(2, 9)]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def encoder_of(dtype) -> Encoder:
    torch.manual_seed(0)
    return Encoder(CONFIG).to(dtype).eval()


def features_of(length: int, dtype, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, length, CONFIG.mels, generator=generator, dtype=torch.float64).to(dtype)


def streamed(encoder: Encoder, features: torch.Tensor, chunk: Chunk) -> torch.Tensor:
    state, frames = encoder.start_stream(), []
    for part in features.split(4 * chunk.size, dim=1):
        output, (state,) = encoder.stream(part, torch.tensor([part.shape[1]]), chunk, [state])
        frames.append(output.frames_BSE)
    return torch.cat(frames, 1)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("chunk", CHUNKS, ids=str)
@pytest.mark.parametrize("length", [1, 4, 63, 64, 65, 130, 257])
def test_chunk_by_chunk_equals_the_masked_full_run(length, chunk, dtype):
    encoder, features = encoder_of(dtype), features_of(length, dtype)
    with torch.no_grad():
        full = encoder(features, torch.tensor([length]), chunk).frames_BSE
    parts = streamed(encoder, features, chunk)
    assert parts.shape == full.shape
    torch.testing.assert_close(parts, full, atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize("chunk", [Chunk(3, 2), Chunk(4), Chunk(2, 0)], ids=str)
def test_streams_at_different_positions_share_a_batch(chunk):
    """A stream starts at each step; each ends at its own length, within a chunk or at its end."""
    encoder, lengths = encoder_of(torch.float64), [83, 1, 40, 12 * chunk.size, 61]
    inputs = [features_of(n, torch.float64, seed=n) for n in lengths]
    states, heard, step = {}, {row: [] for row in range(len(lengths))}, 0
    while step == 0 or states:
        if step < len(lengths):
            states[step] = (encoder.start_stream(), 0)
        rows = list(states)
        parts = [inputs[r][0, states[r][1] :][: 4 * chunk.size] for r in rows]
        counts = torch.tensor([len(part) for part in parts])
        batch = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=1e3)
        output, after = encoder.stream(batch, counts, chunk, [states[r][0] for r in rows])
        for place, (row, state) in enumerate(zip(rows, after, strict=True)):
            heard[row].append(output.frames_BSE[place, : output.lengths_B[place]])
            position = states[row][1] + len(parts[place])
            if position == lengths[row]:
                del states[row]
            else:
                states[row] = (state, position)
        step += 1
    for row, length in enumerate(lengths):
        full = encoder(inputs[row], torch.tensor([length]), chunk).frames_BSE[0]
        torch.testing.assert_close(torch.cat(heard[row]), full, atol=1e-10, rtol=0)


def test_a_state_is_a_value_that_a_step_does_not_change():
    encoder, chunk = encoder_of(torch.float64), Chunk(4, 2)
    first, second = features_of(32, torch.float64).split(16, 1)
    length = torch.tensor([16])
    _, (state,) = encoder.stream(first, length, chunk, [encoder.start_stream()])
    before = [x.clone() for x in state]
    once, _ = encoder.stream(second, length, chunk, [state])
    again, _ = encoder.stream(second, length, chunk, [state])
    assert all(torch.equal(x, y) for x, y in zip(before, state, strict=True))
    assert torch.equal(once.frames_BSE, again.frames_BSE)


def test_memory_is_constant_with_a_bounded_left_context():
    encoder, chunk, state = encoder_of(torch.float32), Chunk(4, 2), None
    state, sizes = encoder.start_stream(), []
    for seed in range(6):
        part = features_of(16, torch.float32, seed)
        _, (state,) = encoder.stream(part, torch.tensor([16]), chunk, [state])
        sizes.append(state.bytes)
    assert sizes[0] < sizes[1] and len(set(sizes[1:])) == 1
    assert state.pairs_NL2HX.shape[1] == 8
