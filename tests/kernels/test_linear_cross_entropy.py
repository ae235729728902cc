import math
import weakref

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from dsasr.kernels import dispatch, linear_cross_entropy, logit_products, reference

# Of the losses, and of the gradients, which are stored in the dtype.
TOLERANCE = {
    torch.float64: (1e-13, 1e-12),
    torch.float32: (1e-6, 3e-6),
    torch.bfloat16: (1e-6, 6e-3),
    torch.float16: (1e-6, 1e-3),
}
OPTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "cap": {"soft_cap": 3.0},
    "smooth": {"label_smoothing": 0.1},
    "all": {"bias": True, "soft_cap": 5.0, "label_smoothing": 0.2},
}


def problem(rows, columns, width, dtype=torch.float32, device="cpu", seed=0, bias=False):
    torch.manual_seed(seed)
    targets = torch.randint(0, columns, (rows,))
    targets[::5] = -100
    tensors = [torch.randn(rows, width), torch.randn(columns, width)]
    tensors += [torch.randn(columns)] if bias else []
    tensors = [x.to(device, dtype).requires_grad_() for x in tensors]
    return tensors, targets.to(device)


def nll_and_entropy(op, *args, **options):
    return op(*args, **options, return_entropy=True)


def results(op, tensors, targets, upstream, **options):
    """[nll, entropy, gradients of Σ upstream · (nll, entropy)], correct."""
    bias = tensors[2] if len(tensors) > 2 else None
    options |= {"return_entropy": True, "return_accuracy": True}
    nll, entropy, correct = op(*tensors[:2], targets, bias_V=bias, **options)
    loss = (nll * upstream[0].to(nll) + entropy * upstream[1].to(nll)).sum()
    return [nll, entropy, *torch.autograd.grad(loss, tensors)], correct


def compare(tensors, targets, error, upstream=None, tolerance=None, **options):
    upstream = torch.randn(2, len(targets)) if upstream is None else upstream
    dtype = tensors[0].dtype
    actual, correct = results(dispatch.linear_cross_entropy, tensors, targets, upstream, **options)
    wide = [x.detach().cpu().double().requires_grad_() for x in tensors]
    expected, correct_expected = results(
        reference.linear_cross_entropy, wide, targets.cpu(), upstream.cpu(), **options
    )
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert error(a, b) <= (tolerance or TOLERANCE[dtype])[i > 1], i
    assert all(x.dtype == torch.promote_types(dtype, torch.float32) for x in actual[:2])
    assert all(x.dtype == dtype for x in actual[2:])
    assert torch.equal(correct.cpu(), correct_expected)
    return actual


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", [(0, 7, 3), (1, 41, 5), (33, 401, 17)], ids=str)
def test_equals_the_float64_reference(shape, options, dtype, implementation, device, error):
    if implementation == "triton" and dtype == torch.float64:
        pytest.skip("the kernels compute in float32")
    options = dict(options)
    tensors, targets = problem(*shape, dtype, device, bias=options.pop("bias", False))
    compare(tensors, targets, error, **options)


def test_odd_numbers_of_rows(implementation, device, error):
    tensors, targets = problem(1271, 41, 3, device=device)
    compare(tensors, targets, error)


def test_a_vocabulary_of_one_is_certain(implementation, device):
    tensors, targets = problem(9, 1, 3, device=device, bias=True)
    actual, correct = results(dispatch.linear_cross_entropy, tensors, targets, torch.ones(2, 9))
    assert all(float(x.detach().abs().max()) < 1e-6 for x in actual)
    assert torch.equal(correct.cpu(), targets.cpu() >= 0)


@pytest.mark.parametrize("limit", [0, 1 << 21])
def test_the_vocabulary_of_qwen3(limit, monkeypatch, error):
    monkeypatch.setattr(linear_cross_entropy, "_SMALL_LOGITS", limit)
    tensors, _ = problem(3, 151_936, 4)
    targets = torch.tensor([151_935, -100, 151_808])
    compare(tensors, targets, error, tolerance=(1e-6, 1e-5))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradcheck(options, monkeypatch):
    options = dict(options)
    monkeypatch.setenv("DSASR_KERNELS", "torch")
    for tile in (None, (3, 4)):
        if tile:
            monkeypatch.setattr(linear_cross_entropy, "_SMALL_LOGITS", 0)
            monkeypatch.setattr(linear_cross_entropy, "_CPU_TILE", tile)
        tensors, targets = problem(5, 11, 3, torch.float64, bias="bias" in options)
        rest = {k: v for k, v in options.items() if k != "bias"}

        def op(hidden, weight, bias=None, targets=targets, rest=rest):
            return nll_and_entropy(
                dispatch.linear_cross_entropy, hidden, weight, targets, bias_V=bias, **rest
            )

        assert torch.autograd.gradcheck(op, tensors)


def test_rows_with_outliers(implementation, device, error):
    tensors, targets = problem(20, 200, 4, device=device)
    with torch.no_grad():
        tensors[0][:, 0] = 1.0
        tensors[1][:, 0] = 0.0
        tensors[1][7, 0], tensors[1][150, 0] = 1e4, -1e4
    targets[1], targets[2] = 7, 150
    compare(tensors, targets, error, tolerance=(1e-5, 1e-4))


def test_rows_of_very_negative_logits(implementation, device, error):
    """A running maximum that began at 0 would leave nothing of them but underflow."""
    tensors, targets = problem(20, 200, 4, device=device)
    with torch.no_grad():
        tensors[0][:, 0] = 1.0
        tensors[1][:, 0] = -3e4
    # A float32 near 3e4 has steps of 0.002.
    actual = compare(tensors, targets, error, tolerance=(1e-2, 1e-2))
    assert float(actual[1].detach().max()) > 1


def test_masked_vocabulary(implementation, device, error):
    """A bias of −inf takes outcomes away; whole tiles of them come first."""
    tensors, targets = problem(20, 300, 4, device=device, bias=True)
    with torch.no_grad():
        tensors[2][:200] = -torch.inf
        tensors[2][-1] = -torch.inf
    targets[targets >= 0] = 200 + targets[targets >= 0] % 99
    compare(tensors, targets, error)


def test_no_target_at_all(implementation, device):
    tensors, targets = problem(20, 200, 4, device=device)
    actual, correct = results(
        dispatch.linear_cross_entropy, tensors, torch.full_like(targets, -100), torch.ones(2, 20)
    )
    assert all(float(x.detach().abs().max()) == 0 for x in actual)
    assert not correct.any()


def test_another_ignored_index(implementation, device, error):
    tensors, targets = problem(20, 200, 4, device=device)
    compare(tensors, targets.clamp(min=0), error, ignore_index=0)


def test_a_target_outside_the_vocabulary(implementation, device):
    if device != "cpu":
        pytest.skip("a GPU is not waited for")
    tensors, targets = problem(20, 200, 4)
    for wrong in (200, -1):
        targets[3] = wrong
        with pytest.raises(IndexError, match="vocabulary of 200"):
            dispatch.linear_cross_entropy(*tensors, targets)


def test_strides_of_inputs_and_of_gradients(implementation, device, error):
    tensors, targets = problem(22, 130, 8, device=device)
    hidden = tensors[0].detach().T.contiguous().T.requires_grad_()
    weight = torch.randn(260, 16, device=device)[::2, ::2].requires_grad_()
    spread = torch.stack([targets, targets], 1)[:, 0]
    upstream = torch.randn(44, 2)[::2].T
    compare([hidden, weight], spread, error, upstream=upstream)
    uniform = torch.full((), 0.3).expand(2, 22)
    compare([hidden, weight], spread, error, upstream=uniform)
    nll = dispatch.linear_cross_entropy(hidden, weight, spread)
    nll.mean().backward()  # a gradient of stride 0
    nll_expected = reference.linear_cross_entropy(hidden.detach(), weight.detach(), spread)
    assert error(nll, nll_expected) < 1e-6


def test_inputs_are_not_changed(implementation, device):
    tensors, targets = problem(40, 200, 4, device=device, bias=True)
    before = [x.detach().clone() for x in (*tensors, targets)]
    upstream = torch.randn(2, 40, device=device)
    upstream_before = upstream.clone()
    bias = tensors[2]
    options = {"bias_V": bias, "soft_cap": 4.0}
    outputs = nll_and_entropy(dispatch.linear_cross_entropy, *tensors[:2], targets, **options)
    first = torch.autograd.grad(outputs, tensors, list(upstream), retain_graph=True)
    second = torch.autograd.grad(outputs, tensors, list(upstream))
    assert all(map(torch.equal, first, second))
    assert all(map(torch.equal, before, (*tensors, targets)))
    assert torch.equal(upstream_before, upstream)


def test_only_the_gradients_asked_for(implementation, device, error):
    tensors, targets = problem(30, 130, 6, device=device)
    wide = [x.detach().cpu().double().requires_grad_() for x in tensors]
    for output in (0, 1):  # the gradient of one of the two results alone
        out = nll_and_entropy(dispatch.linear_cross_entropy, *tensors, targets)[output]
        expected = nll_and_entropy(reference.linear_cross_entropy, *wide, targets.cpu())[output]
        actual_grads = torch.autograd.grad(out.sum(), tensors)
        expected_grads = torch.autograd.grad(expected.sum(), wide)
        pairs = zip(actual_grads, expected_grads, strict=True)
        assert all(error(a, b) < 3e-6 for a, b in pairs)
    frozen = tensors[1].detach()
    dispatch.linear_cross_entropy(tensors[0], frozen, targets).sum().backward()
    assert frozen.grad is None and tensors[0].grad is not None
    with torch.no_grad():
        assert dispatch.linear_cross_entropy(*tensors, targets).grad_fn is None


def test_results_are_returned_as_asked_for(implementation, device):
    tensors, targets = problem(30, 130, 6, device=device)
    for op in (dispatch.linear_cross_entropy, reference.linear_cross_entropy):
        nll, entropy, correct = op(*tensors, targets, return_entropy=True, return_accuracy=True)
        assert torch.equal(op(*tensors, targets), nll)
        pairs = op(*tensors, targets, return_entropy=True), (nll, entropy)
        assert all(map(torch.equal, *pairs))
        pairs = op(*tensors, targets, return_accuracy=True), (nll, correct)
        assert all(map(torch.equal, *pairs))


def test_tied_embeddings_get_both_gradients(implementation, device, error):
    (_, weight), targets = problem(30, 60, 6, device=device)
    ids = torch.randint(0, 60, (30,))

    def loss(op, weight, targets):
        return op(weight[ids.to(weight.device)], weight, targets).mean()

    (actual,) = torch.autograd.grad(loss(dispatch.linear_cross_entropy, weight, targets), weight)
    wide = weight.detach().cpu().double().requires_grad_()
    (expected,) = torch.autograd.grad(
        loss(reference.linear_cross_entropy, wide, targets.cpu()), wide
    )
    assert error(actual, expected) < 3e-6


def test_a_weight_that_is_released_between_the_passes(implementation, device, error):
    """As ZeRO-3 does it: gathered for the forward pass, gone, gathered again for the backward."""
    tensors, targets = problem(30, 200, 6, device=device)
    weight = torch.nn.Parameter(tensors[1].detach().clone())
    gathered = weight.data
    died = weakref.ref(gathered.untyped_storage())
    nll, entropy = nll_and_entropy(dispatch.linear_cross_entropy, tensors[0], weight, targets)
    weight.data = torch.empty(0, device=device)
    del gathered
    assert died() is None, "something keeps the gathered weight alive"
    weight.data = tensors[1].detach().clone()
    (nll + 0.5 * entropy).mean().backward()
    wide = [x.detach().cpu().double().requires_grad_() for x in tensors]
    nll, entropy = nll_and_entropy(reference.linear_cross_entropy, *wide, targets.cpu())
    (nll + 0.5 * entropy).mean().backward()
    assert error(weight.grad, wide[1].grad) < 3e-6
    assert error(tensors[0].grad, wide[0].grad) < 3e-6


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", [(1, 41, 5), (333, 401, 17)], ids=str)
def test_gradients_of_a_sum_equal_the_float64_references(
    shape, options, dtype, implementation, device, error
):
    """They come from the forward pass, a chunk of rows after the other."""
    if implementation == "triton" and dtype == torch.float64:
        pytest.skip("the kernels compute in float32")
    options = dict(options)
    tensors, targets = problem(*shape, dtype, device, bias=options.pop("bias", False))
    wide = [x.detach().cpu().double().requires_grad_() for x in tensors]
    found = []
    for op, inputs, labels in (
        (dispatch.linear_cross_entropy, tensors, targets),
        (reference.linear_cross_entropy, wide, targets.cpu()),
    ):
        bias = inputs[2] if len(inputs) > 2 else None
        nll, entropy = op(*inputs[:2], labels, bias_V=bias, return_entropy=True, **options)
        found.append([nll, entropy, *torch.autograd.grad(nll.sum() * 3e-3, inputs)])
    for i, (a, b) in enumerate(zip(*found, strict=True)):
        assert error(a, b) <= TOLERANCE[dtype][i > 1], i
    assert all(x.dtype == dtype for x in found[0][2:])


class Products(TorchDispatchMode):
    """How many matrix products run."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += str(func).startswith(("aten.mm", "aten.addmm"))
        return func(*args, **(kwargs or {}))


def test_a_sum_takes_three_products_and_any_other_loss_its_own(monkeypatch):
    monkeypatch.setattr(linear_cross_entropy, "_SMALL_LOGITS", 0)
    monkeypatch.setattr(linear_cross_entropy, "chunk_rows", lambda *_: 100)
    tensors, targets = problem(300, 401, 5)
    with Products() as products:
        nll = dispatch.linear_cross_entropy(*tensors, targets)
    assert products.count == 9  # of three chunks
    with Products() as products:
        first = torch.autograd.grad(nll.sum(), tensors, retain_graph=True)
    assert products.count == 0
    with Products() as products:  # the gradients were used up
        second = torch.autograd.grad(nll.sum(), tensors, retain_graph=True)
    assert products.count == 4
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    with torch.no_grad(), Products() as products:
        dispatch.linear_cross_entropy(*tensors, targets)
    assert products.count == 1


@pytest.mark.parametrize("rows", [1, 1271, 8192, 70_000])
@pytest.mark.parametrize("columns", [1, 70, 151_936])
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_chunks_of_rows_are_bounded_and_even(rows, columns, kind):
    chunk = linear_cross_entropy.chunk_rows(rows, columns, torch.device(kind))
    most = {"cpu": 1 << 24, "cuda": 1 << 28}[kind]
    assert chunk >= 1 and (chunk * columns <= most or chunk <= 128)
    assert kind == "cpu" or chunk % 128 == 0
    chunks = -(-rows // chunk)
    assert chunks * chunk - rows < chunks * (1 if kind == "cpu" else 128), "chunks are not even"


def test_a_second_differentiation_is_refused(implementation, device):
    tensors, targets = problem(30, 130, 6, device=device)
    nll, entropy = nll_and_entropy(dispatch.linear_cross_entropy, *tensors, targets)
    for loss in (nll.sum(), nll.mean(), entropy.sum()):
        with pytest.raises(RuntimeError, match="linear_cross_entropy is differentiable once"):
            torch.autograd.grad(loss, tensors, create_graph=True)


def test_autocast_does_not_apply(implementation, device, error):
    tensors, targets = problem(30, 130, 6, device=device)
    plain = dispatch.linear_cross_entropy(*tensors, targets)
    with torch.autocast(device, dtype=torch.bfloat16):
        nll = dispatch.linear_cross_entropy(*tensors, targets)
        gradients = torch.autograd.grad(nll.sum(), tensors)
    assert nll.dtype == torch.float32 and torch.equal(nll, plain)
    expected = torch.autograd.grad(plain.sum(), tensors)
    assert all(map(torch.equal, gradients, expected))


class Largest(TorchDispatchMode):
    """The largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out


def test_the_logits_never_exist(monkeypatch):
    monkeypatch.setattr(linear_cross_entropy, "_CPU_CHUNK_LOGITS", 1 << 20)
    tensors, targets = problem(2000, 9000, 4)
    with Largest() as largest:
        nll, entropy = nll_and_entropy(dispatch.linear_cross_entropy, *tensors, targets)
        (nll + entropy).sum().backward()
    assert largest.numel <= 2000 * 9000 / 16


def test_equal_to_the_last_bit(implementation, device):
    tensors, targets = problem(300, 500, 8, device=device)
    runs = [
        results(dispatch.linear_cross_entropy, tensors, targets, torch.ones(2, 300))[0]
        for _ in range(2)
    ]
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_products_as_on_a_gpu(dtype, implementation, device, error, monkeypatch):
    """Gradient tiles in the inputs' dtype, summed in float32; float16 loses nothing below 6e-8."""
    if implementation == "torch":
        monkeypatch.setattr(linear_cross_entropy, "_SMALL_LOGITS", 0)

    def product(a, b, out, add=False):
        assert dtype in (a.dtype, out.dtype)
        result = a.double() @ b.double()
        out.copy_(result + out.double() if add else result)

    monkeypatch.setattr(logit_products, "on_cpu", lambda x: False)
    monkeypatch.setattr(logit_products, "product", product)
    tensors, targets = problem(330, 401, 5, dtype, device)
    compare(tensors, targets, error)
    hidden, weight = tensors
    nll = dispatch.linear_cross_entropy(hidden, weight, targets)
    (grad,) = torch.autograd.grad((nll * 1e-3).sum(), hidden)
    wide = [x.detach().cpu().double().requires_grad_() for x in tensors]
    nll = reference.linear_cross_entropy(*wide, targets.cpu())
    (expected,) = torch.autograd.grad((nll * 1e-3).sum(), wide[0])
    assert error(grad, expected) < TOLERANCE[dtype][1]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    rows=st.integers(0, 40),
    columns=st.integers(1, 90),
    width=st.integers(1, 12),
    cap=st.none() | st.floats(0.5, 50),
    smoothing=st.sampled_from([0.0, 0.3]),
    bias=st.booleans(),
    seed=st.integers(0, 999),
    tile=st.tuples(st.integers(1, 50), st.integers(1, 100)),
)
def test_any_shape_in_any_tiles(rows, columns, width, cap, smoothing, bias, seed, tile):
    tensors, targets = problem(rows, columns, width, torch.float64, seed=seed, bias=bias)
    saved = linear_cross_entropy._SMALL_LOGITS, linear_cross_entropy._CPU_TILE
    linear_cross_entropy._SMALL_LOGITS, linear_cross_entropy._CPU_TILE = 0, tile
    try:
        upstream = torch.randn(2, rows)
        options = {"soft_cap": cap, "label_smoothing": smoothing}
        actual, correct = results(
            dispatch.linear_cross_entropy, tensors, targets, upstream, **options
        )
    finally:
        linear_cross_entropy._SMALL_LOGITS, linear_cross_entropy._CPU_TILE = saved
    expected, correct_expected = results(
        reference.linear_cross_entropy, tensors, targets, upstream, **options
    )
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert torch.equal(correct, correct_expected)
    assert (
        rows == 0
        or 0
        <= float(actual[1].detach().min())
        <= float(actual[1].detach().max())
        <= math.log(columns) + 1e-9
    )


@pytest.mark.parametrize("rows", [1, 1271, 8192, 32768, 70_000])
@pytest.mark.parametrize("columns", [1, 70, 151_936])
def test_tiles_on_a_gpu_are_bounded_and_cover_the_logits(rows, columns):
    high, wide = linear_cross_entropy._tile_size(rows, columns, torch.device("cuda"))
    assert 1 <= high <= 1 << 16 and wide % 256 == 0
    assert high * wide <= 1 << 28  # 1 GiB of float32
    # Few enough blocks that adding to hidden's gradient stays small beside the products.
    assert -(-columns // wide) <= 40


def test_errors_name_what_does_not_fit():
    tensors, targets = problem(4, 5, 3)
    hidden, weight = tensors
    for wrong in (
        (hidden[:, :2], weight, targets),
        (hidden, weight, targets[:3]),
        (hidden, weight[:0], targets),
        (hidden[None], weight, targets),
    ):
        with pytest.raises(ValueError, match=r"need \[N, D\]"):
            dispatch.linear_cross_entropy(*wrong)
    with pytest.raises(ValueError, match="targets torch"):
        dispatch.linear_cross_entropy(hidden, weight, targets.float())
    for options in ({"soft_cap": -1.0}, {"label_smoothing": 1.0}):
        with pytest.raises(ValueError, match="out of range"):
            dispatch.linear_cross_entropy(hidden, weight, targets, **options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(2048, 151_936, 1024), (1271, 401, 41)], ids=str)
def test_training_shapes_on_a_gpu(shape, dtype, error, monkeypatch):
    monkeypatch.setenv("DSASR_KERNELS", "auto")
    rows, columns, width = shape
    torch.manual_seed(1)
    hidden = torch.randn(rows, width, device="cuda").to(dtype).requires_grad_()
    weight = (torch.randn(columns, width, device="cuda") / width**0.5).to(dtype).requires_grad_()
    targets = torch.randint(0, columns, (rows,), device="cuda")
    upstream = torch.randn(2, rows, device="cuda")
    actual, _ = results(dispatch.linear_cross_entropy, [hidden, weight], targets, upstream)
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected, _ = results(reference.linear_cross_entropy, wide, targets, upstream)
    tolerance = 1e-5, {torch.bfloat16: 8e-3, torch.float16: 2e-3, torch.float32: 1e-4}[dtype]
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert error(a, b) <= tolerance[i > 1]
