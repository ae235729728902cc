import math

import pytest
import torch

from dsasr.kernels import dispatch, reference

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}


def both(logits):
    """Entropy and gradient: ours, and the reference's in float64."""
    logits = logits.detach().requires_grad_()
    wide = logits.detach().cpu().double().requires_grad_()
    outputs = []
    for op, x in ((dispatch.softmax_entropy, logits), (reference.softmax_entropy, wide)):
        entropy = op(x)
        torch.manual_seed(5)
        upstream = torch.randn(entropy.shape).to(entropy)
        outputs.append((entropy, *torch.autograd.grad((entropy * upstream).sum(), x)))
    return zip(*outputs, strict=True)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "shape", [(5, 1), (3, 41), (2, 3, 401), (70, 130), (0, 9), (1271, 3), (8,)]
)
def test_equals_the_float64_reference(shape, dtype, implementation, device, error):
    torch.manual_seed(0)
    logits = (3 * torch.randn(shape)).to(device, dtype)
    (entropy, entropy_expected), (grad, grad_expected) = both(logits)
    assert entropy.dtype == torch.float32 and grad.dtype == dtype
    assert error(entropy, entropy_expected) < 1e-6
    assert error(grad, grad_expected) < TOLERANCE[dtype]


def test_a_row_longer_than_a_tile(implementation, device, error):
    torch.manual_seed(0)
    (entropy, entropy_expected), (grad, grad_expected) = both(torch.randn(2, 20_001, device=device))
    assert error(entropy, entropy_expected) < 1e-6 and error(grad, grad_expected) < 2e-6


def test_known_answers(implementation, device):
    inf = torch.inf
    logits = torch.tensor(
        [
            [0.0, 0.0, 0.0, 0.0],
            [-1e5, -1e5, -inf, -inf],
            [1e4, -1e4, 0.0, 3.0],
            [-inf, -inf, 2.0, -inf],
            [-inf, -inf, -inf, -inf],
            [0.0, math.nan, 0.0, 0.0],
        ],
        device=device,
        requires_grad=True,
    )
    entropy = dispatch.softmax_entropy(logits)
    torch.testing.assert_close(
        entropy.detach().cpu(),
        torch.tensor([math.log(4), math.log(2), 0.0, 0.0, math.nan, math.nan]),
        equal_nan=True,
    )
    (grad,) = torch.autograd.grad(entropy[:4].sum(), logits)
    assert float(grad[:4].abs().max()) < 1e-6  # all four are extremes of the entropy


def test_log_probabilities_with_impossible_outcomes(implementation, device, error):
    torch.manual_seed(0)
    logits = torch.randn(6, 300)
    logits[:, :200] = -torch.inf
    (entropy, entropy_expected), (grad, grad_expected) = both(logits.log_softmax(-1).to(device))
    assert error(entropy, entropy_expected) < 1e-6
    assert float(grad[:, :200].abs().max()) == 0
    assert error(grad[:, 200:], grad_expected[:, 200:]) < 2e-6


def test_strides_and_unchanged_inputs(implementation, device, error):
    torch.manual_seed(0)
    plain = torch.randn(60, 40, device=device)
    for logits in (plain.T, plain[::2, :33], plain[:, ::2], plain.view(5, 12, 40).transpose(0, 1)):
        before = logits.clone()
        (entropy, entropy_expected), (grad, grad_expected) = both(logits)
        assert error(entropy, entropy_expected) < 1e-6 and error(grad, grad_expected) < 2e-6
        assert torch.equal(before, logits)
    entropy = dispatch.softmax_entropy(plain.requires_grad_())
    entropy.mean().backward()  # a gradient of stride 0
    wide = plain.detach().cpu().double().requires_grad_()
    reference.softmax_entropy(wide).mean().backward()
    assert error(plain.grad, wide.grad) < 2e-6


def test_gradcheck(implementation):
    if implementation == "triton":
        pytest.skip("the kernels compute in float32")
    torch.manual_seed(0)
    logits = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(dispatch.softmax_entropy, logits)


def test_a_second_differentiation_is_refused(implementation, device):
    logits = torch.randn(5, 9, device=device, requires_grad=True)
    with pytest.raises(RuntimeError, match="softmax_entropy is differentiable once"):
        torch.autograd.grad(dispatch.softmax_entropy(logits).mean(), logits, create_graph=True)


def test_errors_name_what_does_not_fit():
    for wrong in (torch.zeros(3, 0), torch.zeros(()), torch.zeros(3, 4, dtype=torch.int64)):
        with pytest.raises(ValueError, match="need floats"):
            dispatch.softmax_entropy(wrong)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_training_shape_on_a_gpu(dtype, error):
    # 40,000 rows: addresses beyond 2^31.
    rows = 40_000 if dtype == torch.bfloat16 else 2_000
    logits = torch.randn(rows, 151_936, device="cuda", dtype=dtype).requires_grad_()
    entropy = dispatch.softmax_entropy(logits)
    entropy.sum().backward()
    wide = logits[-50:].detach().double().requires_grad_()
    expected = reference.softmax_entropy(wide)
    expected.sum().backward()
    assert error(entropy[-50:], expected) < 2e-6
    assert error(logits.grad[-50:], wide.grad) < TOLERANCE[dtype] + 1e-5
