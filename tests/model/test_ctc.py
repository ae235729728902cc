import dataclasses
import itertools
import math

import pytest
import torch

from dsasr.data.batch import Batch
from dsasr.model.ctc import (
    CtcHead,
    CtcHeadConfig,
    consistency_loss,
    ctc_loss,
    greedy_phonemes,
    phoneme_errors,
    posterior_entropy,
)
from dsasr.model.ctc_model import CtcModel, CtcModelConfig
from dsasr.model.encoders.conformer import Encoder, EncoderConfig
from dsasr.utils.errors import UserError


def log_probs(B, S, P, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(B, S, P, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), logits.log_softmax(-1)


def collapse(path):
    return tuple(key for key, _ in itertools.groupby(path) if key != 0)


def test_ctc_is_the_sum_over_all_paths():
    lp = log_probs(3, 4, 3)[1].detach()
    labels = torch.tensor([[1, 2, 0], [1, 1, 0], [2, 0, 0]])
    lengths, frames = torch.tensor([2, 2, 1]), torch.tensor([4, 3, 2])
    loss = ctc_loss(lp, frames, labels, lengths)
    assert loss.feasible_B.all()
    for b in range(3):
        expected = tuple(labels[b, : lengths[b]].tolist())
        total = sum(
            math.exp(sum(float(lp[b, t, p]) for t, p in enumerate(path)))
            for path in itertools.product(range(3), repeat=int(frames[b]))
            if collapse(path) == expected
        )
        assert float(loss.nll_B[b]) == pytest.approx(-math.log(total))


def test_what_does_not_fit_is_left_out_and_named():
    logits, lp = log_probs(4, 3, 4)
    labels = torch.tensor([[1, 1, 2], [1, 2, 3], [1, 2, 3], [2, 2, 0]])
    lengths, frames = torch.tensor([3, 3, 3, 2]), torch.tensor([3, 3, 2, 3])
    loss = ctc_loss(lp, frames, labels, lengths)
    # 1 1 needs a blank between: four frames. 1 2 3 fits three frames, not two. 2 2 fits three.
    assert loss.feasible_B.tolist() == [False, True, False, True]
    assert loss.nll_B[[0, 2]].tolist() == [0, 0]
    assert int(loss.phonemes) == 5
    loss.nll_B.sum().backward()
    assert logits.grad.isfinite().all()
    assert logits.grad[0].abs().sum() == 0


def test_labels_beyond_the_length_do_not_count_as_repeats():
    lp = log_probs(1, 1, 3)[1].detach()
    loss = ctc_loss(lp, torch.tensor([1]), torch.tensor([[1, 0, 0]]), torch.tensor([1]))
    assert loss.feasible_B.all()
    empty = ctc_loss(lp, torch.tensor([1]), torch.zeros(1, 0, dtype=torch.int64), torch.tensor([0]))
    assert float(empty.nll_B) == pytest.approx(-float(lp[0, 0, 0]))


def test_consistency_is_the_papers_formula_with_detached_targets():
    a_logits, a = log_probs(2, 5, 4, 1)
    b_logits, b = log_probs(2, 5, 4, 2)
    lengths = torch.tensor([5, 2])
    loss_B = consistency_loss(a, b, lengths)
    for row in range(2):
        total = 0.0
        for t in range(int(lengths[row])):
            p, q = a[row, t].exp(), b[row, t].exp()
            total += 0.5 * ((p * (p / q).log()).sum() + (q * (q / p).log()).sum()).item()
        assert float(loss_B[row].detach()) == pytest.approx(total)
    loss_B.sum().backward()
    # d/dz of ½ KL(sg(q) ‖ softmax(z)) is ½ (p - q); the other term is detached from z.
    expected = 0.5 * (a.exp() - b.exp()).detach()
    expected[1, 2:] = 0
    torch.testing.assert_close(a_logits.grad, expected)
    torch.testing.assert_close(b_logits.grad, -expected)


def test_entropy_counts_valid_frames():
    lp = torch.full((2, 3, 4), 0.25, dtype=torch.float64).log()
    assert float(posterior_entropy(lp, torch.tensor([3, 1]))) == pytest.approx(4 * math.log(4))


def test_greedy_merges_repeats_before_dropping_blanks():
    paths = torch.tensor([[1, 1, 0, 1, 2, 2, 0], [0, 3, 3, 3, 1, 0, 2]])
    lp = torch.nn.functional.one_hot(paths, 4).float()
    hypotheses = greedy_phonemes(lp, torch.tensor([7, 4]))
    assert hypotheses == [[1, 1, 2], [3]]
    labels, lengths = torch.tensor([[1, 2, 2], [3, 0, 0]]), torch.tensor([3, 1])
    assert phoneme_errors(hypotheses, labels, lengths) == (1, 4)


@pytest.mark.parametrize("layers", [1, 3])
def test_a_head_with_convolutions_keeps_the_padding_out(layers):
    torch.manual_seed(0)
    head = CtcHead(6, 5, CtcHeadConfig(layers=layers, kernel=5, dropout=0.0)).double()
    lengths = torch.tensor([9, 1, 4])
    frames = torch.randn(3, 9, 6, dtype=torch.float64)
    together = head(frames, lengths)
    assert together.exp().sum(-1).allclose(torch.ones(3, 9).double())
    weight = torch.randn(5, dtype=torch.float64)
    valid = torch.arange(9) < lengths[:, None]
    both = torch.autograd.grad((together[valid] @ weight).sum(), list(head.parameters()))
    alone = [torch.zeros_like(p) for p in head.parameters()]
    for row, length in enumerate(lengths.tolist()):
        one = head(frames[row : row + 1, :length], lengths[row : row + 1])
        torch.testing.assert_close(together[row, :length], one[0])
        parts = torch.autograd.grad((one @ weight).sum(), list(head.parameters()))
        alone = [a + b for a, b in zip(alone, parts, strict=True)]
    for (name, _), a, b in zip(head.named_parameters(), both, alone, strict=True):
        assert a.any(), name
        torch.testing.assert_close(a, b, msg=name)


def test_a_convolution_of_the_head_sees_its_kernel_and_no_more():
    head = CtcHead(2, 3, CtcHeadConfig(layers=2, kernel=3, dropout=0.0)).double()
    frames = torch.randn(1, 12, 2, dtype=torch.float64, requires_grad=True)
    head(frames, torch.tensor([12]))[0, 6].square().sum().backward()
    assert frames.grad[0].abs().sum(1).nonzero().flatten().tolist() == [4, 5, 6, 7, 8]


@pytest.mark.parametrize("values", [{"layers": -1}, {"kernel": 4}, {"dropout": 1.0}])
def test_a_head_that_cannot_be_is_refused(values):
    with pytest.raises(UserError, match=r"model\.pretrain\.head|CtcHeadConfig"):
        CtcHeadConfig(**values)


def make_batch(B=3, seed=5, mels=12):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([60, 48, 41])[:B]
    return Batch.blank(
        torch.randn(B, 60, mels, generator=generator),
        feature_lengths_B=lengths,
        phonemes_BP=torch.randint(1, 7, (B, 5), generator=generator),
        phoneme_lengths_B=torch.tensor([5, 3, 4])[:B],
        keys=("a", "b", "c")[:B],
        seed=seed,
    )


@pytest.fixture
def ctc_model():
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(width=16, layers=1, heads=2, ffn=32, kernel=5, mels=12))
    return CtcModel(encoder, 7, CtcModelConfig())


def mean(outputs, name):
    total, count = outputs.sums[name]
    return float(total / count)


def test_a_step_depends_on_its_batch_alone(ctc_model):
    torch.manual_seed(1)
    first = ctc_model(make_batch())
    torch.manual_seed(2)
    second = ctc_model(make_batch())
    assert torch.equal(first.loss, second.loss)
    assert not torch.equal(first.loss, ctc_model(make_batch(seed=6)).loss)


def test_the_loss_is_made_of_its_sums(ctc_model):
    outputs = ctc_model(make_batch())
    phonemes = float(outputs.sums["ctc"][1]) / 2
    consistency = float(outputs.sums["consistency"][0])
    expected = mean(outputs, "ctc") + 0.2 * consistency / phonemes
    assert outputs.loss.item() == pytest.approx(expected, rel=1e-5)
    assert consistency > 0
    assert not any(total.requires_grad for total, _ in outputs.sums.values())


def test_the_consistency_rises_over_the_warm_up(ctc_model):
    batch = make_batch()
    full = ctc_model(batch)
    term = 0.2 * float(full.sums["consistency"][0]) / (float(full.sums["ctc"][1]) / 2)
    shares = {}
    for step in (0, 5, 10, 99):
        ctc_model.warm_up(step, 10)
        shares[step] = ctc_model.consistency_share
        loss = full.loss.item() - (1 - shares[step]) * term
        assert ctc_model(batch).loss.item() == pytest.approx(loss, rel=1e-5)
    assert shares == {0: 0.0, 5: 0.5, 10: 1.0, 99: 1.0}
    ctc_model.cfg = CtcModelConfig(consistency_warmup=2000)
    ctc_model.warm_up(500, 10)
    assert ctc_model.consistency_share == 0.25
    for cfg, stage_warmup in ((CtcModelConfig(consistency_warmup=0), 10), (CtcModelConfig(), 0)):
        ctc_model.cfg = cfg
        ctc_model.warm_up(0, stage_warmup)
        assert ctc_model.consistency_share == 1.0


def test_the_two_views_have_more_time_masks(monkeypatch, ctc_model):
    masks = []

    def spec_augment(features, _lengths, cfg, _generator, _stack):
        masks.append((cfg.time_masks, cfg.freq_masks))
        return features

    monkeypatch.setattr("dsasr.model.ctc_model.spec_augment", spec_augment)
    ctc_model(make_batch())
    assert masks == [(5, 2)] * 2  # 2.5 times the two of one view
    masks.clear()
    ctc_model.cfg = CtcModelConfig(consistency=0.0)
    ctc_model(make_batch())
    assert masks == [(2, 2)]


def test_the_masks_are_icefalls():
    # Of an utterance of 10 s its time masks cover up to 15% of the frames, of CR-CTC's views 37.5%.
    cfg = CtcModelConfig()
    most = min(cfg.spec.time_width, int(1000 * cfg.spec.time_share))
    assert cfg.spec.time_masks * most == 150
    assert int(cfg.time_mask_ratio * cfg.spec.time_masks) * most == 375


def test_plain_ctc_takes_one_view(ctc_model):
    ctc_model.cfg = CtcModelConfig(consistency=0.0, chunks=None)
    outputs = ctc_model(make_batch())
    assert "consistency" not in outputs.sums
    assert float(outputs.sums["ctc"][1]) == 12
    assert outputs.loss.item() == pytest.approx(mean(outputs, "ctc"), rel=1e-5)


def test_evaluation_is_plain_and_counts_errors(ctc_model):
    outputs = ctc_model.eval()(make_batch())
    assert float(outputs.sums["phoneme_errors"][1]) == 12
    assert torch.equal(outputs.loss, ctc_model(make_batch(seed=5)).loss)


def test_infeasible_utterances_are_counted(ctc_model):
    batch = make_batch()
    batch = dataclasses.replace(batch, feature_lengths_B=torch.tensor([60, 4, 41]))
    outputs = ctc_model.eval()(batch)
    assert outputs.sums["ctc_infeasible"][0] == 1
    assert float(outputs.sums["ctc"][1]) == 9
    assert outputs.loss.isfinite()


@pytest.mark.parametrize("lengths", [[60, 50, 41], [60, 4, 41], []], ids=str)
def test_targets_are_counted_before_the_forward_pass(ctc_model, lengths):
    batch = make_batch(len(lengths))
    lengths_B = torch.tensor(lengths, dtype=torch.int64)
    batch = dataclasses.replace(batch, feature_lengths_B=lengths_B)
    outputs = ctc_model.train()(batch)
    count = {0: 0, 4: 9, 50: 12}[lengths[1] if lengths else 0]
    assert ctc_model.count_targets(batch) == float(outputs.targets) == count
    assert float(outputs.loss_sum.detach()) == pytest.approx(float(outputs.loss.detach()) * count)


def test_a_batch_without_utterances_runs_every_part_and_weighs_nothing(ctc_model):
    outputs = ctc_model(make_batch(0))
    outputs.loss.backward()
    assert float(outputs.loss) == 0
    assert all(parameter.grad is not None for parameter in ctc_model.parameters())
    assert all(parameter.grad.abs().sum() == 0 for parameter in ctc_model.parameters())
    assert all(float(count) == 0 for _, count in outputs.sums.values())
