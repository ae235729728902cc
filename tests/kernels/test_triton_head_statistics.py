"""The head's product without logits, in the interpreter, beside the float64 reference."""

from __future__ import annotations

import os

import pytest
import torch

from dsasr.kernels import dispatch, linear_cross_entropy, logit_products, reference

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="test_interpreted.py starts it"
)

# Of the losses, and of the gradients, which are stored in the dtype.
TOLERANCE = {
    torch.float32: (1e-6, 3e-6),
    torch.bfloat16: (1e-6, 6e-3),
    torch.float16: (1e-6, 1e-3),
}
OPTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "cap": {"soft_cap": 3.0},
    "smooth": {"label_smoothing": 0.1},
    "bias_cap": {"bias": True, "soft_cap": 5.0},
    "all": {"bias": True, "soft_cap": 5.0, "label_smoothing": 0.2},
}
# Operands by pointers or by descriptors, and statistics of parts of a tile.
WAYS = {
    "pointers": {"TMA": False, "PARTS": 1},
    "pointers_halves": {"TMA": False, "PARTS": 2},
    "tma": {"TMA": True, "PARTS": 1},
    "tma_quarters": {"TMA": True, "PARTS": 4},
}


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles for each program; returns what sets the way of the operands."""
    from dsasr.kernels import triton_head_statistics

    way = {
        "M": 32,
        "N": 64,
        "K": 16,
        "SPECIALIZE": False,
        "FLATTEN": False,
        "TMA": False,
        "PARTS": 1,
    }

    def choose(**chosen):
        way.update(chosen)

    monkeypatch.setattr(
        triton_head_statistics, "tile_size", lambda *args, **options: (dict(way), {})
    )
    monkeypatch.setattr(triton_head_statistics, "_GRADIENT_TILE", 128)
    monkeypatch.setenv("DSASR_KERNELS", "triton-persistent")
    monkeypatch.setattr(linear_cross_entropy, "chunk_rows", lambda *args: 20)
    return choose


@pytest.fixture
def products_as_on_a_gpu(monkeypatch):
    """Low precision stays; the library's products of it are summed in float32."""

    def product(a, b, out, add=False):
        result = a.double() @ b.double()
        out.copy_(result + out.double() if add else result)

    monkeypatch.setattr(logit_products, "on_cpu", lambda x: False)
    monkeypatch.setattr(logit_products, "product", product)


def problem(rows, columns, width, dtype=torch.float32, bias=False):
    torch.manual_seed(0)
    targets = torch.randint(0, columns, (rows,))
    targets[::5] = -100
    tensors = [torch.randn(rows, width), torch.randn(columns, width)]
    tensors += [torch.randn(columns)] if bias else []
    return [x.to(dtype).requires_grad_() for x in tensors], targets


def losses(op, tensors, targets, **options):
    """nll, entropy, correct."""
    bias = tensors[2] if len(tensors) > 2 else None
    return op(
        *tensors[:2], targets, bias_V=bias, return_entropy=True, return_accuracy=True, **options
    )


def compare(tensors, targets, error, tolerance=None, **options):
    """Statistics without gradients, and the gradients of a sum, which the forward pass makes."""
    wide = [x.detach().double().requires_grad_() for x in tensors]
    expected = losses(reference.linear_cross_entropy, wide, targets, **options)
    bounds = tolerance or TOLERANCE[tensors[0].dtype]
    with torch.no_grad():
        found = losses(dispatch.linear_cross_entropy, tensors, targets, **options)
    for a, b in zip(found[:2], expected[:2], strict=True):
        assert error(a, b) <= bounds[0]
    assert torch.equal(found[2], expected[2])
    nll, entropy, correct = losses(dispatch.linear_cross_entropy, tensors, targets, **options)
    assert error(nll, expected[0]) <= bounds[0] and error(entropy, expected[1]) <= bounds[0]
    assert torch.equal(correct, expected[2])
    grads = torch.autograd.grad(nll.sum() * 3e-3, tensors)
    for a, b in zip(grads, torch.autograd.grad(expected[0].sum() * 3e-3, wide), strict=True):
        assert error(a, b) <= bounds[1]


CASES = [(name, torch.float32) for name in OPTIONS]
CASES += [(name, torch.bfloat16) for name in ("plain", "bias_cap", "all")]
CASES += [("smooth", torch.float16)]


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_equals_the_float64_reference(name, dtype, small_tiles, products_as_on_a_gpu, error):
    options = dict(OPTIONS[name])
    tensors, targets = problem(35, 139, 19, dtype, bias=options.pop("bias", False))
    compare(tensors, targets, error, **options)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("shape", [(1, 41, 8), (33, 129, 24)], ids=str)
def test_operands_by_pointers_and_by_descriptors(
    shape, way, small_tiles, products_as_on_a_gpu, error
):
    small_tiles(**way)
    tensors, targets = problem(*shape, torch.bfloat16, bias=True)
    compare(tensors, targets, error, soft_cap=5.0)


def test_no_rows_and_a_vocabulary_of_one(small_tiles, error):
    for shape in ((0, 7, 3), (9, 1, 3)):
        tensors, targets = problem(*shape)
        compare(tensors, targets, error)


def test_masked_vocabulary(small_tiles, error):
    """A bias of −inf takes outcomes away; whole tiles of them come first."""
    tensors, targets = problem(10, 200, 4, bias=True)
    with torch.no_grad():
        tensors[2][:100] = -torch.inf
        tensors[2][-1] = -torch.inf
    targets[targets >= 0] = 100 + targets[targets >= 0] % 99
    compare(tensors, targets, error)


def test_rows_of_very_negative_logits(small_tiles, error):
    tensors, targets = problem(10, 100, 4)
    with torch.no_grad():
        tensors[0][:, 0] = 1.0
        tensors[1][:, 0] = -3e4
    # A float32 near 3e4 has steps of 0.002.
    compare(tensors, targets, error, tolerance=(1e-2, 1e-2))


def test_another_ignored_index_strides_and_frozen_weights(small_tiles, error):
    tensors, targets = problem(22, 130, 8)
    compare(tensors, targets.clamp(min=0), error, ignore_index=0)
    hidden = tensors[0].detach().T.contiguous().T.requires_grad_()
    weight = torch.randn(260, 16)[::2, ::2].requires_grad_()
    compare([hidden, weight], targets, error)
    nll = dispatch.linear_cross_entropy(hidden, weight.detach(), targets)
    (grad,) = torch.autograd.grad(nll.sum(), hidden)
    nll = reference.linear_cross_entropy(hidden, weight.detach(), targets)
    assert error(grad, torch.autograd.grad(nll.sum(), hidden)[0]) < 3e-6


def test_a_gradient_per_row_comes_from_the_librarys_tiles(small_tiles, error):
    tensors, targets = problem(18, 130, 6)
    upstream = torch.randn(2, 18)
    found = []
    for op in (dispatch.linear_cross_entropy, reference.linear_cross_entropy):
        nll, entropy, _ = losses(op, tensors, targets)
        loss = (nll * upstream[0] + entropy * upstream[1]).sum()
        found.append(torch.autograd.grad(loss, tensors))
    assert all(error(a, b) < 3e-6 for a, b in zip(*found, strict=True))


def test_equal_to_the_last_bit(small_tiles):
    tensors, targets = problem(25, 70, 8)
    runs = [losses(dispatch.linear_cross_entropy, tensors, targets) for _ in range(2)]
    assert all(map(torch.equal, *runs))
