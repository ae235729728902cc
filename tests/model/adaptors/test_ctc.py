"""The CTC adaptor against answers worked out by hand. Units: blank, a, b."""

from __future__ import annotations

import pytest
import torch

from dsasr.model.adaptors.ctc import CtcAdaptor
from dsasr.model.adaptors.protocol import AdaptorConfig, build_adaptor
from dsasr.utils.errors import UserError

POSTERIORS = torch.tensor([
    # a a blank b (b): two segments, and a frame of padding
    [[0.2, 0.6, 0.2], [0.4, 0.5, 0.1], [0.8, 0.1, 0.1], [0.1, 0.3, 0.6], [0.1, 0.1, 0.8]],
    # blank blank: silence; then padding that says a
    [[0.8, 0.15, 0.05], [0.6, 0.1, 0.3], [0.1, 0.8, 0.1], [0.1, 0.8, 0.1], [0.1, 0.8, 0.1]],
    # a blank a b b: the same unit twice, with a blank between
    [[0.2, 0.8, 0.0], [0.9, 0.1, 0.0], [0.2, 0.8, 0.0], [0.0, 0.5, 0.5001], [0.3, 0.2, 0.5]],
], dtype=torch.float64)  # fmt: skip
LENGTHS = torch.tensor([4, 2, 5])
TABLE = [[9.0, 9.0], [1.0, 0.0], [0.0, 1.0]]  # so that an embedding shows the shares of a and b


def make(width: int = 4, out_width: int = 2, units: int = 3, **settings) -> CtcAdaptor:
    torch.manual_seed(0)
    cfg = AdaptorConfig(kind="ctc", **settings)
    adaptor = build_adaptor(cfg, width, out_width, units=units).double()
    if (units, out_width) == (3, 2):
        adaptor.table.data = torch.tensor(TABLE, dtype=torch.float64)
    return adaptor


def frames(width: int = 4) -> torch.Tensor:
    return torch.randn(3, 5, width, generator=torch.Generator().manual_seed(1)).double()


def embed(adaptor: CtcAdaptor, log_probs: torch.Tensor, frames_BSE: torch.Tensor, lengths_B):
    inputs, counts = adaptor.read(log_probs, frames_BSE, lengths_B)
    return adaptor(inputs, counts)


def test_segments_are_merged_and_blank_is_left_out():
    embeds, counts = embed(make(), POSTERIORS.log(), frames(), LENGTHS)
    assert counts.tolist() == [2, 1, 3] and counts.device.type == "cpu"
    # (0.6 + 0.5) : (0.2 + 0.1), and 0.3 : 0.6.
    expected = torch.tensor([[11 / 14, 3 / 14], [1 / 3, 2 / 3]]).double()
    torch.testing.assert_close(embeds[0, :2], expected)
    # a, blank, a are two segments, b b one: (0.5 + 0.2) : (0.5001 + 0.5).
    third = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.7 / 1.7001, 1.0001 / 1.7001]]).double()
    torch.testing.assert_close(embeds[2], third, atol=1e-4, rtol=0)
    assert not embeds[0, 2:].any()


def test_an_utterance_of_blanks_alone_is_one_token_of_what_is_likeliest_beside_them():
    embeds, _ = embed(make(), POSTERIORS.log(), frames(), LENGTHS)
    # (0.15 + 0.1) : (0.05 + 0.3)
    torch.testing.assert_close(embeds[1, 0], torch.tensor([5 / 12, 7 / 12]).double())
    certain = torch.full((1, 3, 3), -1e4, dtype=torch.float64)
    certain[..., 0] = 0.0
    embeds, counts = embed(make(), certain, frames()[:1, :3], torch.tensor([3]))
    assert counts.tolist() == [1] and embeds.isfinite().all()


def test_temperature_sharpens_the_posterior_not_the_segments():
    embeds, counts = embed(make(temperature=0.5), POSTERIORS.log(), frames(), LENGTHS)
    assert counts.tolist() == [2, 1, 3]
    # Squares: 0.09 : 0.36.
    torch.testing.assert_close(embeds[0, 1], torch.tensor([0.2, 0.8]).double())
    flat, _ = embed(make(temperature=1e6), POSTERIORS.log(), frames(), LENGTHS)
    halves = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.0, 0.0]]).double()
    torch.testing.assert_close(flat[0], halves, atol=1e-5, rtol=0)


def test_without_merging_every_frame_is_a_token_blank_included():
    adaptor = make(merge=False)
    embeds, counts = embed(adaptor, POSTERIORS.log(), frames(), LENGTHS)
    assert torch.equal(counts, LENGTHS) and adaptor.cfg.frames_per_token == 1
    torch.testing.assert_close(embeds[0, :4], POSTERIORS[0, :4] @ adaptor.table)
    assert not embeds[0, 4:].any() and not embeds[1, 2:].any()


@pytest.mark.parametrize("merge", [True, False])
def test_frames_are_projected_beside_the_posterior(merge):
    plain, adaptor = make(merge=merge), make(merge=merge, frames=True)
    args = POSTERIORS.log(), frames(), LENGTHS
    torch.testing.assert_close(embed(adaptor, *args)[0], embed(plain, *args)[0])  # zero at first
    adaptor.project.data = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 2.0]]).double()
    added = embed(adaptor, *args)[0] - embed(plain, *args)[0]
    heard = frames()[0]
    first = heard[:2].mean(0) if merge else heard[0]
    torch.testing.assert_close(added[0, 0], torch.stack((first[0], 2 * first[3])))
    second = heard[3] if merge else heard[1]
    torch.testing.assert_close(added[0, 1], torch.stack((second[0], 2 * second[3])))


@pytest.mark.parametrize(
    "settings", [{}, {"frames": True}, {"merge": False}, {"merge": False, "frames": True}]
)
def test_batch_mates_do_not_matter_in_value_or_gradient(settings):
    adaptor = make(out_width=7, **settings)
    if adaptor.project is not None:
        adaptor.project.data.normal_()
    logits = (POSTERIORS + 1e-3).log().requires_grad_()
    heard = frames().requires_grad_()
    weight = torch.randn(7, generator=torch.Generator().manual_seed(2)).double()
    wanted = [logits, heard, *adaptor.parameters()]

    def gradients(loss):
        return torch.autograd.grad(loss, wanted, allow_unused=True)

    embeds, counts = embed(adaptor, logits.log_softmax(-1), heard, LENGTHS)
    together = gradients((embeds @ weight).square().sum())
    alone = [torch.zeros_like(x) for x in wanted]
    for i, length in enumerate(LENGTHS.tolist()):
        row = logits[i : i + 1, :length].log_softmax(-1), heard[i : i + 1, :length]
        one, count = embed(adaptor, *row, LENGTHS[i : i + 1])
        assert int(count) == int(counts[i])
        torch.testing.assert_close(embeds[i, : int(count)], one[0])
        parts = gradients((one @ weight).square().sum())
        alone = [a if b is None else a + b for a, b in zip(alone, parts, strict=True)]
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(torch.zeros_like(b) if a is None else a, b)
    assert not together[0][0, 4:].any() and not together[0][1, 2:].any(), "padding has none"
    assert together[0][0, :2].any(), "the head gets one"
    if settings.get("merge", True):
        assert not together[0][0, 2].any(), "a frame of blank is in no segment"
        assert not together[2][0].any(), "nor is blank's embedding"


def test_the_gradient_reaches_table_and_head():
    adaptor = make()
    logits = (POSTERIORS + 1e-3).log().requires_grad_()
    embeds, _ = embed(adaptor, logits.log_softmax(-1), frames(), LENGTHS)
    embeds[0, 1, 1].backward()  # b's share of the segment of frame 3: b / (a + b)
    a, b = 0.301, 0.601
    share = b / (a + b)
    # d share / d logit of b: share (1 - share), of a the negative, of blank 0.
    expected = torch.tensor([0.0, -share * (1 - share), share * (1 - share)]).double()
    torch.testing.assert_close(logits.grad[0, 3], expected)
    shares = torch.tensor([0.0, 1 - share, share]).double()
    torch.testing.assert_close(adaptor.table.grad[:, 1], shares)


@pytest.mark.parametrize("with_frames", [True, False])
def test_units_that_are_known_are_those_of_a_perfect_head(with_frames):
    adaptor = make(out_width=7, units=5, frames=with_frames)
    units = torch.tensor([[3, 1, 1, 4], [2, 0, 0, 0]])
    lengths = torch.tensor([4, 1])
    path = torch.tensor([[3, 3, 0, 1, 0, 1, 4, 4], [0, 2, 2, 0, 0, 0, 0, 0]])
    one_hot = torch.nn.functional.one_hot(path, 5).double()
    log_probs = (1e4 * (one_hot - 1)).log_softmax(-1)
    heard, count = adaptor.read(log_probs, torch.randn(2, 8, 4).double(), torch.tensor([8, 4]))
    assert torch.equal(count, lengths)
    known, _ = adaptor.read_units(units, lengths)
    assert torch.equal(known[..., :5], heard[..., :5])
    assert not known[..., 5:].any() and known.shape == heard.shape
    embeds, _ = adaptor(known, lengths, packed=True)
    torch.testing.assert_close(embeds, adaptor.table[[3, 1, 1, 4, 2]])


def test_the_forms_that_can_be_asked_for():
    adaptor = make(out_width=7)
    inputs, counts = adaptor.read(POSTERIORS.log(), frames(), LENGTHS)
    padded, lengths = adaptor(inputs, counts)
    packed, _ = adaptor(inputs, counts, packed=True)
    out, index = torch.zeros(14, 7), torch.arange(6) * 2 + 1
    written, _ = adaptor(inputs, counts, out_LD=out, index_N=index)
    assert written.data_ptr() == out.data_ptr() and not written[::2].any()
    torch.testing.assert_close(written[1:12:2], packed.float())
    torch.testing.assert_close(
        torch.cat([p[:n] for p, n in zip(padded, lengths, strict=True)]), packed
    )


def test_embeddings_start_at_the_scale_asked_for():
    torch.manual_seed(0)
    adaptor = build_adaptor(AdaptorConfig(kind="ctc"), 4, 256, 0.03, units=40)
    inputs, _ = adaptor.read_units(torch.randint(1, 40, (4, 20)), torch.full((4,), 20))
    embeds = adaptor(inputs, torch.full((4,), 20), packed=True)[0].detach()
    assert float(embeds.square().mean().sqrt()) == pytest.approx(0.03, rel=0.1)


def test_tokens_wait_for_nothing_once_they_are_counted():
    adaptor = make(out_width=7).to("meta")
    index = torch.empty(6, dtype=torch.int64, device="meta")
    out = torch.empty(9, 7, device="meta")
    inputs = torch.empty(3, 3, 3, device="meta", dtype=torch.float64)
    embeds, _ = adaptor(inputs, torch.tensor([2, 1, 3]), out_LD=out, index_N=index)
    assert embeds is out


@pytest.mark.parametrize("settings", [{"stack": 8}, {"hidden": 3}, {"layers": 3}])
def test_settings_of_other_kinds_are_refused(settings):
    with pytest.raises(UserError, match=f"{next(iter(settings))} has no effect"):
        AdaptorConfig(kind="ctc", **settings)
    with pytest.raises(UserError, match="temperature must be above 0"):
        AdaptorConfig(kind="ctc", temperature=0.0)
