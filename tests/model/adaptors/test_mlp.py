import pytest
import torch
import torch.nn.functional as F

from dsasr.model.adaptors.mlp import MlpAdaptor
from dsasr.model.adaptors.protocol import AdaptorConfig
from dsasr.utils.errors import UserError


def plain(adaptor, frames_SE):
    """One utterance, by the formula."""
    stack = adaptor.cfg.stack
    padded = F.pad(frames_SE, (0, 0, 0, -len(frames_SE) % stack))
    stacked = padded.reshape(-1, stack * frames_SE.shape[1])
    hidden = F.gelu(stacked @ adaptor.weight1.T + adaptor.bias1)
    return hidden @ adaptor.weight2.T + adaptor.bias2


def test_padded_and_packed_forms_equal_the_formula():
    torch.manual_seed(0)
    adaptor = MlpAdaptor(AdaptorConfig(stack=4, hidden=9), 5, 7).double()
    frames = torch.randn(3, 13, 5, dtype=torch.float64)
    lengths = torch.tensor([13, 1, 8])
    padded, out_lengths = adaptor(frames, lengths)
    packed, same_lengths = adaptor(frames, lengths, packed=True)
    assert out_lengths.tolist() == same_lengths.tolist() == [4, 1, 2]
    assert adaptor.output_lengths(lengths).tolist() == [4, 1, 2]
    assert padded.shape == (3, 4, 7)
    expected = [plain(adaptor, frames[row, :length]) for row, length in enumerate(lengths)]
    torch.testing.assert_close(packed, torch.cat(expected), atol=1e-6, rtol=1e-6)
    for row, embeds in enumerate(expected):
        torch.testing.assert_close(padded[row, : len(embeds)], embeds, atol=1e-6, rtol=1e-6)
        assert padded[row, len(embeds) :].abs().sum() == 0


@pytest.mark.parametrize("activation", ["gelu", "silu", "relu"])
def test_embeddings_start_at_the_scale_asked_for(activation):
    torch.manual_seed(0)
    adaptor = MlpAdaptor(AdaptorConfig(hidden=512, activation=activation), 128, 256, scale=0.03)
    frames = F.layer_norm(torch.randn(8, 64, 128), (128,))
    embeds, _ = adaptor(frames, torch.full((8,), 64), packed=True)
    assert float(embeds.detach().square().mean().sqrt()) == pytest.approx(0.03, rel=0.05)


def test_weights_follow_the_generator():
    adaptor = MlpAdaptor(AdaptorConfig(), 4, 6)
    assert adaptor.weight1.shape == (6, 16)  # hidden 0: the output's width
    adaptor.reset_parameters(torch.Generator().manual_seed(3))
    first = adaptor.weight2.detach().clone()
    adaptor.reset_parameters(torch.Generator().manual_seed(3))
    assert torch.equal(first, adaptor.weight2)


def test_unknown_activation_is_refused():
    with pytest.raises(UserError, match="gelu, silu, relu"):
        AdaptorConfig(activation="tanh")
