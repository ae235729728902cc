from dataclasses import replace

import pytest
import torch

from dsasr.kernels import dispatch, reference
from dsasr.kernels.adaptor import ACTIVATIONS, AdaptorWeights

WITHOUT = ("tiles",)
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
SHAPES = {  # B, S, E, H, D, stack, lengths
    "odd": (3, 13, 5, 9, 7, 4, [13, 1, 8]),
    "wide": (2, 40, 33, 150, 41, 3, [40, 0]),
    "aligned": (2, 24, 16, 32, 16, 4, [24, 9]),
    "unstacked": (1, 8, 16, 16, 16, 1, [5]),
    "empty": (2, 6, 4, 5, 6, 4, [0, 0]),
    "stack above length": (2, 3, 4, 5, 6, 8, [3, 2]),
}


def problem(shape, dtype=torch.float32, device="cpu", bias=True):
    batch, frames, width, hidden, out, stack, lengths = SHAPES[shape]
    torch.manual_seed(0)
    sizes = [(batch, frames, width), (hidden, stack * width), (hidden,), (out, hidden), (out,)]
    tensors = [
        torch.randn(size) / max(1, size[-1] if len(size) == 2 else 1) ** 0.5 for size in sizes
    ]
    tensors = [x.to(device, dtype).requires_grad_() for x in tensors]
    return tensors, torch.tensor(lengths), stack


def run(op, tensors, lengths, out=None, index=None, **options):
    """``op`` on [frames, w1, b1, w2, b2]; into a copy of ``out`` if given."""
    into = {} if out is None else {"out_LD": out * 1, "index_N": index}
    return op(tensors[0], lengths, AdaptorWeights(*tensors[1:], **options), **into)


def gradients(out, tensors):
    torch.manual_seed(7)
    return torch.autograd.grad((out * torch.randn(out.shape).to(out)).sum(), tensors)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("into", [False, True], ids=["packed", "into"])
def test_equals_the_float64_reference(
    into, shape, activation, dtype, implementation, device, error
):
    tensors, lengths, stack = problem(shape, dtype, device)
    wide = [x.detach().cpu().double().requires_grad_() for x in tensors]
    buffer = index = buffer_wide = None
    count = sum(-(-length // stack) for length in lengths.tolist())
    if into:
        buffer = torch.randn(count + 5, SHAPES[shape][4]).to(device, dtype).requires_grad_()
        buffer_wide = buffer.detach().cpu().double().requires_grad_()
        index = torch.randperm(count + 5)[:count]
    options = {"stack": stack, "activation": activation}
    on_device = index if index is None else index.to(device)
    out, out_lengths = run(dispatch.adaptor, tensors, lengths, buffer, on_device, **options)
    expected, expected_lengths = run(
        reference.adaptor, wide, lengths, buffer_wide, index, **options
    )
    assert out.dtype == dtype and error(out, expected) < TOLERANCE[dtype]
    assert (
        out_lengths.tolist()
        == expected_lengths.tolist()
        == [-(-n // stack) for n in lengths.tolist()]
    )
    pairs = zip(
        gradients(out, tensors + [buffer] * into),
        gradients(expected, wide + [buffer_wide] * into),
        strict=True,
    )
    for i, (a, b) in enumerate(pairs):
        assert a.dtype == dtype and error(a, b) < TOLERANCE[dtype], i


def test_padding_is_neither_read_nor_given_gradients(implementation, device):
    tensors, lengths, stack = problem("odd", device=device)
    clean, _ = run(dispatch.adaptor, tensors, lengths, stack=stack)
    with torch.no_grad():
        for row, length in enumerate(lengths.tolist()):
            tensors[0][row, length:] = torch.nan
    out, _ = run(dispatch.adaptor, tensors, lengths, stack=stack)
    assert torch.equal(out, clean)
    grads = gradients(out, tensors)
    assert all(bool(grad.isfinite().all()) for grad in grads)
    for row, length in enumerate(lengths.tolist()):
        assert not grads[0][row, length:].any()


def test_strided_frames_and_lengths_on_the_device(implementation, device, error):
    tensors, lengths, stack = problem("aligned", device=device)
    expected, _ = run(dispatch.adaptor, tensors, lengths, stack=stack)
    (grad_expected,) = gradients(expected, tensors[:1])
    frames = tensors[0].detach()
    roomy = torch.randn(2, 30, 16, device=device)
    roomy[:, :24] = frames
    for strided in (
        frames.transpose(0, 1).contiguous().transpose(0, 1),
        frames.transpose(1, 2).contiguous().transpose(1, 2),
        roomy[:, :24],
    ):
        strided.requires_grad_()
        out, out_lengths = run(
            dispatch.adaptor, [strided, *tensors[1:]], lengths.to(device), stack=stack
        )
        assert error(out, expected) < 1e-6 and out_lengths.device.type == device
        (actual,) = gradients(out, [strided])
        assert error(actual, grad_expected) < 1e-6


def test_no_bias_frozen_weights_and_no_gradients(implementation, device, error):
    tensors, lengths, stack = problem("odd", device=device)
    frames, w1, _, w2, _ = tensors
    plain = [frames, w1, None, w2, None]
    expected, _ = run(reference.adaptor, plain, lengths, stack=stack)
    out, _ = run(dispatch.adaptor, plain, lengths, stack=stack)
    assert error(out, expected) < 1e-6
    for trained in (frames, w1, w2):
        arguments = [x if x is trained or x is None else x.detach() for x in plain]
        out, _ = run(dispatch.adaptor, arguments, lengths, stack=stack)
        expected, _ = run(reference.adaptor, arguments, lengths, stack=stack)
        assert error(gradients(out, [trained])[0], gradients(expected, [trained])[0]) < 2e-6
    with torch.no_grad():
        assert run(dispatch.adaptor, tensors, lengths, stack=stack)[0].grad_fn is None


def test_writes_into_a_buffer(implementation, device, error):
    tensors, lengths, stack = problem("odd", device=device)
    expected, _ = run(dispatch.adaptor, tensors, lengths, stack=stack)
    index = torch.tensor([0, 1, 2, 3, 9, 5, 6], device=device)
    with torch.no_grad():
        buffer = torch.full((10, 7), 4.0, device=device)
        weights = AdaptorWeights(*tensors[1:], stack)
        out, _ = dispatch.adaptor(tensors[0], lengths, weights, out_LD=buffer, index_N=index)
    assert out.data_ptr() == buffer.data_ptr()
    assert error(buffer[index], expected) < 1e-6
    assert float((buffer[[4, 7, 8]] - 4).abs().max()) == 0


def test_gradcheck(monkeypatch):
    monkeypatch.setenv("DSASR_KERNELS", "torch")
    tensors, lengths, stack = problem("odd", torch.float64)

    def op(*tensors):
        return run(dispatch.adaptor, tensors, lengths, stack=stack, activation="silu")[0]

    assert torch.autograd.gradcheck(op, tensors)


def test_a_weight_that_is_released_between_the_passes(implementation, device, error):
    tensors, lengths, stack = problem("odd", device=device)
    expected = gradients(run(dispatch.adaptor, tensors, lengths, stack=stack)[0], tensors)
    weights = [torch.nn.Parameter(x.detach().clone()) for x in tensors[1:]]
    out, _ = run(dispatch.adaptor, [tensors[0], *weights], lengths, stack=stack)
    if implementation == "triton":  # torch's linear layers save views; DeepSpeed replaces them
        for weight in weights:
            weight.data = torch.empty(0, device=device)
        for weight, x in zip(weights, tensors[1:], strict=True):
            weight.data = x.detach().clone()
    actual = gradients(out, [tensors[0], *weights])
    assert all(error(a, b) < 1e-6 for a, b in zip(actual, expected, strict=True))


def test_errors_name_what_does_not_fit():
    tensors, lengths, stack = problem("odd")
    frames, weights = tensors[0], AdaptorWeights(*tensors[1:], stack)
    with pytest.raises(ValueError, match=r"need \[B, S, E\]"):
        dispatch.adaptor(frames, lengths, replace(weights, stack=stack + 1))
    with pytest.raises(ValueError, match="for 13 frames"):
        dispatch.adaptor(frames, lengths + 1, weights)
    with pytest.raises(ValueError, match="gelu, silu, relu"):
        dispatch.adaptor(frames, lengths, replace(weights, activation="tanh"))
    with pytest.raises(ValueError, match="belong together"):
        dispatch.adaptor(frames, lengths, weights, out_LD=torch.zeros(9, 7))
    index = torch.arange(7)
    with pytest.raises(ValueError, match=r"need \[L, 7\]"):
        out = torch.zeros(9, 6)
        dispatch.adaptor(frames, lengths, weights, out_LD=out, index_N=index)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_training_shape_on_a_gpu(dtype, error):
    torch.manual_seed(0)
    sizes = [(16, 1500, 1280), (2048, 5120), (2048,), (2048, 2048), (2048,)]
    tensors = [
        torch.randn(size, device="cuda") / max(1, size[-1] ** 0.5 * (len(size) == 2))
        for size in sizes
    ]
    tensors = [x.to(dtype).requires_grad_() for x in tensors]
    lengths = torch.randint(1, 1501, (16,))
    wide = [x.detach().double().requires_grad_() for x in tensors]
    out, _ = run(dispatch.adaptor, tensors, lengths, stack=4)
    expected, _ = run(reference.adaptor, wide, lengths.cuda(), stack=4)
    tolerance = {torch.bfloat16: 1e-2, torch.float32: 1e-4}[dtype]
    assert error(out, expected) < tolerance
    pairs = zip(gradients(out, tensors), gradients(expected, wide), strict=True)
    assert all(error(a, b) < 2 * tolerance for a, b in pairs)
