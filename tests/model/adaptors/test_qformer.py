"""The Q-Former over windows against torch's own attention, and what it must not see."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dsasr.model.adaptors.protocol import AdaptorConfig
from dsasr.utils.errors import UserError


def attention(query, key, value, heads, out) -> torch.Tensor:
    """One window through torch's multi-head attention, of projected queries, keys and values."""
    eye = torch.eye(query.shape[-1], dtype=query.dtype)
    mixed, _ = F.multi_head_attention_forward(
        query, key, value, query.shape[-1], heads, None, None, None, None, False, 0.0,
        out.weight, out.bias, use_separate_proj_weight=True, q_proj_weight=eye, k_proj_weight=eye,
        v_proj_weight=eye,
    )  # fmt: skip
    return mixed


def plain(adaptor, frames_SE: torch.Tensor) -> torch.Tensor:
    """One utterance, window by window, without masks."""
    stack, heads, rows = adaptor.cfg.stack, adaptor.cfg.heads, []
    for start in range(0, len(frames_SE), stack):
        window, x = frames_SE[start : start + stack], adaptor.queries
        for layer, positions in zip(adaptor.layers, adaptor.positions, strict=True):
            if layer.qkv is not None:
                query, key, value = layer.qkv(layer.self_norm(x)).chunk(3, -1)
                x = x + attention(query, key, value, heads, layer.self_out)
            key, value = layer.key_value(window).chunk(2, -1)
            query = layer.query(layer.cross_norm(x))
            key = key + positions[: len(window)]
            x = x + attention(query, key, value, heads, layer.cross_out)
            x = x + layer.down(F.gelu(layer.up(layer.ffn_norm(x))))
        rows.append(adaptor.norm(x) @ adaptor.weight.T + adaptor.bias)
    return torch.cat(rows)


@pytest.mark.parametrize("settings", [
    {"stack": 4, "heads": 2},
    {"stack": 6, "heads": 3, "queries": 3, "layers": 3},
    {"stack": 17, "heads": 1, "layers": 1},
])  # fmt: skip
@pytest.mark.parametrize("length", [1, 7, 24])
def test_it_is_torchs_attention_window_by_window(new, settings, length):
    adaptor = new(kind="qformer", **settings).double()
    with torch.no_grad():
        adaptor.positions.normal_()
        adaptor.queries.normal_()
    frames = torch.randn(length, 5, dtype=torch.float64)
    embeds, lengths = adaptor(frames[None], torch.tensor([length]), packed=True)
    windows = -(-length // settings["stack"])
    assert lengths.tolist() == [windows * settings.get("queries", 1)] == [len(embeds)]
    torch.testing.assert_close(embeds, plain(adaptor, frames))


def test_long_windows_take_the_fused_attention(new):
    """Beyond 512 queries on a CPU, as always on a GPU."""
    adaptor = new(kind="qformer", stack=1024, queries=1024, heads=2).double()
    frames = torch.randn(2, 1300, 5, dtype=torch.float64)
    embeds, _ = adaptor(frames, torch.tensor([1300, 50]), packed=True)
    expected = torch.cat((plain(adaptor, frames[0]), plain(adaptor, frames[1, :50])))
    torch.testing.assert_close(embeds, expected)


@pytest.mark.parametrize("settings", [
    {"stack": 2}, {"stack": 3}, {"stack": 4, "queries": 2, "layers": 3}, {"stack": 17},
])  # fmt: skip
def test_the_protocol(protocol, settings):
    protocol(kind="qformer", heads=2, **settings)


def test_the_order_of_a_windows_frames_matters(new):
    adaptor = new(kind="qformer", stack=4, heads=2).double()
    frames = torch.randn(1, 4, 5, dtype=torch.float64)
    with torch.no_grad():
        adaptor.positions.mul_(50)
        there, back = (adaptor(x, torch.tensor([4]))[0] for x in (frames, frames.flip(1)))
        adaptor.positions.zero_()
        plain_there, plain_back = (
            adaptor(x, torch.tensor([4]))[0] for x in (frames, frames.flip(1))
        )
    assert not torch.allclose(there, back, atol=1e-3)
    torch.testing.assert_close(plain_there, plain_back)


def test_windows_differ_from_the_start(new):
    """The queries are the same in all; what they read must show in what they write."""
    adaptor = new(64, 64, kind="qformer")
    frames = F.layer_norm(torch.randn(1, 400, 64), (64,))
    embeds = adaptor(frames, torch.tensor([400]), packed=True)[0].detach()
    spread = (embeds - embeds.mean(0)).square().mean() / embeds.square().mean()
    assert float(spread) > 0.3


def test_one_query_has_no_attention_to_others(new):
    assert all(layer.qkv is None for layer in new(kind="qformer", heads=2).layers)
    among = [layer.qkv is not None for layer in new(kind="qformer", heads=2, queries=2).layers]
    assert among == [False, True]


def test_weights_follow_the_generator(new):
    adaptor = new(kind="qformer", heads=2)
    drawn = (adaptor.queries, adaptor.positions, adaptor.weight)
    adaptor.reset_parameters(torch.Generator().manual_seed(3))
    first = [p.detach().clone() for p in drawn]
    inside = adaptor.layers[0].up.weight.detach().clone()
    adaptor.reset_parameters(torch.Generator().manual_seed(4))
    assert not any(torch.equal(a, b) for a, b in zip(first, drawn, strict=True))
    assert torch.equal(inside, adaptor.layers[0].up.weight), "not those of layers inside it"
    adaptor.reset_parameters(torch.Generator().manual_seed(3))
    assert all(torch.equal(a, b) for a, b in zip(first, drawn, strict=True))


def test_what_does_not_fit_is_refused(new):
    with pytest.raises(UserError, match="heads=4 does not divide the adaptor's inner width 6"):
        new(kind="qformer", heads=4)
    with pytest.raises(UserError, match="queries=3"):
        AdaptorConfig(kind="qformer", stack=4, queries=3)
    with pytest.raises(UserError, match="stack of at least 2"):
        AdaptorConfig(kind="qformer", stack=1)
    with pytest.raises(UserError, match="layers must be from 1 to"):
        AdaptorConfig(kind="qformer", layers=0)
    with pytest.raises(UserError, match="activation has no effect on an adaptor of kind qformer"):
        AdaptorConfig(kind="qformer", activation="relu")
    with pytest.raises(UserError, match=r"give model\.adaptor\.kind=qformer"):
        AdaptorConfig(layers=3)
    assert AdaptorConfig(kind="qformer", stack=12, queries=3).frames_per_token == 4
