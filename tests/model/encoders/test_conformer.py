import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dsasr.model.dynamic_chunks import Chunk, ChunkConfig, draw_chunk
from dsasr.model.encoders.conformer import Encoder, EncoderConfig
from dsasr.utils.errors import UserError

CONFIG = EncoderConfig(width=16, layers=2, heads=2, ffn=32, kernel=5, mels=12)


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return Encoder(CONFIG).double().eval()


def features(*lengths, mels=12, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(lengths), max(lengths), mels, generator=generator, dtype=torch.float64)
    for row, length in enumerate(lengths):
        x[row, length:] = 0
    return x, torch.tensor(lengths)


@pytest.mark.parametrize("chunk", [None, Chunk(3), Chunk(4, 1), Chunk(5, 0)])
@pytest.mark.parametrize("garbage", [0.0, 1e3])
def test_an_utterance_does_not_see_the_padding_of_its_batch(encoder, chunk, garbage):
    x, lengths = features(83, 1, 40, 62, 81, 5)
    for row, length in enumerate(lengths):
        x[row, length:] = garbage
    together = encoder(x, lengths, chunk)
    assert together.lengths_B.tolist() == [21, 1, 10, 16, 21, 2]
    for row, length in enumerate(lengths.tolist()):
        alone = encoder(x[row : row + 1, :length], lengths[row : row + 1], chunk)
        S = int(alone.lengths_B)
        assert alone.frames_BSE.shape[1] == S
        torch.testing.assert_close(
            together.frames_BSE[row, :S], alone.frames_BSE[0], atol=1e-9, rtol=0
        )
        assert together.frames_BSE[row, S:].abs().sum() == 0


@pytest.mark.parametrize("size", [1, 3, 4, 7])
def test_a_chunk_sees_nothing_beyond_its_end(encoder, size):
    """Exactly 4 · size · (i + 1) feature frames for chunk i, and no look-ahead."""
    x, lengths = features(64)
    x.requires_grad_()
    frames = encoder(x, lengths, Chunk(size)).frames_BSE
    for s in range(frames.shape[1]):
        (gradient,) = torch.autograd.grad(frames[0, s].square().sum(), x, retain_graph=True)
        seen = gradient[0].abs().sum(1).nonzero()
        end = 4 * size * (s // size + 1)
        assert int(seen.max()) == min(end, 64) - 1
        assert int(seen.min()) == 0


def test_left_chunks_limit_attention(encoder):
    """Without convolutions over time, a frame sees its chunk and the one before."""
    for block in encoder.blocks:
        torch.nn.init.zeros_(block.conv.contract.weight)
    x, lengths = features(64)
    x.requires_grad_()
    frames = encoder(x, lengths, Chunk(2, left=1)).frames_BSE
    (gradient,) = torch.autograd.grad(frames[0, 9].square().sum(), x)
    seen = gradient[0].abs().sum(1).nonzero()
    # Two layers of one chunk each: chunk 4 reaches chunk 2, whose first frame is 4, centered on 16.
    assert (int(seen.min()), int(seen.max())) == (13, 39)


def test_the_longest_chunk_is_full_context(encoder):
    x, lengths = features(64, 40)
    torch.testing.assert_close(
        encoder(x, lengths, Chunk(16)).frames_BSE, encoder(x, lengths).frames_BSE
    )
    assert not torch.allclose(
        encoder(x, lengths, Chunk(4)).frames_BSE, encoder(x, lengths).frames_BSE
    )


def test_positions_are_relative(encoder):
    """Rotary attention alone does not know where a sequence begins."""
    attention = encoder.blocks[0].attention
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    near = encoder._context(torch.zeros(1, 9, 16).double(), torch.tensor([9]), None, False)
    far = encoder._context(torch.zeros(1, 59, 16).double(), torch.tensor([59]), None, False)
    shifted = dataclasses.replace(far, cos_S11H=far.cos_S11H[50:], sin_S11H=far.sin_S11H[50:])
    torch.testing.assert_close(attention(x, near), attention(x, shifted))
    assert not torch.allclose(attention(x, near).flip(1), attention(x.flip(1), near))


def test_layers_are_each_blocks_output(encoder):
    x, lengths = features(50, 30)
    output = encoder(x, lengths, layers=True)
    assert len(output.layers) == CONFIG.layers
    torch.testing.assert_close(output.layers[-1][0], output.frames_BSE[0])


@pytest.mark.parametrize("chunk", [None, Chunk(4, 1)])
def test_checkpointing_changes_no_gradient(chunk):
    x, lengths = features(50, 30)
    gradients = []
    work = []
    for flag, recompute in ((False, "all"), (True, "all"), (True, "cheap")):
        torch.manual_seed(0)
        config = dataclasses.replace(CONFIG, activation_checkpointing=flag, recompute=recompute)
        model = Encoder(config).double()
        torch.manual_seed(1)  # dropout too is repeated
        loss = model(x, lengths, chunk).frames_BSE.square().sum()
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        gradients.append([p.grad for p in model.parameters()])
        by = counter.get_flop_counts()["Global"]
        work.append(by[torch.ops.aten.mm] + by.get(torch.ops.aten.addmm, 0))
    for plain, everything, cheap in zip(*gradients, strict=True):
        assert torch.equal(plain, everything) and torch.equal(plain, cheap)
    # Products with weights: two in the backward pass, a third where everything is recomputed.
    assert work[1] / work[0] == pytest.approx(1.5, rel=0.1) and work[2] == work[0]


def test_every_weight_gets_a_gradient(encoder):
    x, lengths = features(50, 30)
    (encoder(x, lengths).frames_BSE * torch.randn(16)).sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        if "qkv.bias" not in name:
            assert parameter.grad.abs().sum() > 0, name


def test_bfloat16_stays_close_and_finite():
    torch.manual_seed(0)
    model = Encoder(CONFIG).eval()
    x, lengths = features(400, 3)
    exact = model(x.float(), lengths, Chunk(4, 0)).frames_BSE
    rough = model.bfloat16()(x.float(), lengths, Chunk(4, 0)).frames_BSE
    assert rough.dtype == torch.bfloat16
    assert rough.isfinite().all()
    assert (rough.float() - exact).abs().mean() < 0.03


def test_weights_follow_the_generator_and_no_global_state():
    model = Encoder(CONFIG)
    state = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        model.reset_parameters(torch.Generator().manual_seed(7))
        state.append({name: value.clone() for name, value in model.state_dict().items()})
    assert all(torch.equal(state[0][name], state[1][name]) for name in state[0])
    model.reset_parameters(torch.Generator().manual_seed(8))
    assert not torch.equal(
        model.state_dict()["blocks.0.ffn1.up.weight"], state[0]["blocks.0.ffn1.up.weight"]
    )


def test_the_papers_encoder_has_600_million_parameters_and_builds_without_memory():
    with torch.device("meta"):
        model = Encoder(EncoderConfig(width=1280, layers=16, heads=20, ffn=5120, kernel=33))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert all(parameter.is_meta for parameter in model.parameters())
    assert abs(count / 600e6 - 1) < 0.05


def test_meta_weights_can_be_filled():
    with torch.device("meta"):
        model = Encoder(CONFIG)
    model = model.to_empty(device="cpu")
    model.reset_parameters(torch.Generator().manual_seed(0))
    x, lengths = features(20)
    assert model.eval()(x.float(), lengths).frames_BSE.isfinite().all()


def test_chunks_are_drawn_within_bounds_and_by_the_generator_alone():
    cfg = ChunkConfig(full_share=0.3, min_size=2, max_size=5, all_left_share=0.5, max_left=3)
    draws = [draw_chunk(cfg, torch.Generator().manual_seed(seed)) for seed in range(2000)]
    again = [draw_chunk(cfg, torch.Generator().manual_seed(seed)) for seed in range(2000)]
    assert draws == again
    chunks = [chunk for chunk in draws if chunk is not None]
    assert 0.25 < 1 - len(chunks) / 2000 < 0.35
    assert {chunk.size for chunk in chunks} == {2, 3, 4, 5}
    assert {chunk.left for chunk in chunks} == {-1, 0, 1, 2, 3}
    assert draw_chunk(ChunkConfig(full_share=1.0), torch.Generator()) is None


@pytest.mark.parametrize("wrong", [{"kernel": 4}, {"heads": 3}, {"mels": 4}, {"layers": 0}])
def test_impossible_sizes_are_refused(wrong):
    with pytest.raises(UserError):
        dataclasses.replace(CONFIG, **wrong)
