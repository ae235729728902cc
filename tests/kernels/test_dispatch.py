import logging
import subprocess
import sys

import pytest
import torch

from dsasr.kernels import dispatch
from dsasr.kernels.adaptor import AdaptorWeights
from dsasr.kernels.kernel_launch import KernelError, launch
from dsasr.utils.errors import UserError


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.delenv("DSASR_KERNELS", raising=False)
    dispatch.select("auto")
    yield
    dispatch.select("auto")


def program(code, **env):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path), **env},
    )


def test_auto_takes_triton_on_cuda_alone():
    assert dispatch.implementation("linear_cross_entropy", "cpu") == "torch"
    assert dispatch.implementation("linear_cross_entropy", "cuda", torch.float64) == "torch"
    if dispatch.importlib.util.find_spec("triton"):
        assert dispatch.implementation("linear_cross_entropy", "cuda", torch.bfloat16) == "triton"


def test_the_persistent_product_is_the_heads_alone():
    dispatch.select("triton-persistent")
    if dispatch.importlib.util.find_spec("triton"):
        name = dispatch.implementation("linear_cross_entropy", "cuda", torch.bfloat16)
        assert name == "triton-persistent"
        assert dispatch.implementation("adaptor", "cuda", torch.bfloat16) == "triton"
    assert dispatch.ON_CUDA in dispatch.NAMES


def test_cuda_without_triton_is_an_error(monkeypatch):
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="DSASR_KERNELS=torch"):
        dispatch.implementation("linear_cross_entropy", "cuda")


def test_the_environment_outranks_the_recipe(monkeypatch):
    dispatch.select("reference")
    assert dispatch.implementation("adaptor", "cpu") == "reference"
    monkeypatch.setenv("DSASR_KERNELS", "torch")
    assert dispatch.implementation("adaptor", "cpu") == "torch"


def test_unknown_names_are_refused(monkeypatch):
    with pytest.raises(UserError, match="auto, triton, triton-persistent, torch, reference"):
        dispatch.select("cuda")
    assert dispatch.implementation("adaptor", "cpu") == "torch"
    monkeypatch.setenv("DSASR_KERNELS", "fast")
    with pytest.raises(UserError, match="DSASR_KERNELS='fast'"):
        dispatch.softmax_entropy(torch.zeros(2, 3))


def test_triton_without_a_gpu_is_an_error(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: True)
    dispatch.select("triton")
    with pytest.raises(UserError, match="do not run on cpu"):
        dispatch.softmax_entropy(torch.zeros(2, 3))
    with pytest.raises(UserError, match="no float64"):
        dispatch.implementation("softmax_entropy", "cuda", torch.float64)


def test_the_choice_is_logged_once(caplog):
    with caplog.at_level(logging.INFO, logger="dsasr.kernels"):
        for _ in range(3):
            dispatch.softmax_entropy(torch.zeros(2, 3))
    assert caplog.messages == ["softmax_entropy on cpu (torch.float32): torch"]


def test_reference_is_the_reference(monkeypatch):
    dispatch.select("reference")
    calls = []
    for name in ("linear_cross_entropy", "softmax_entropy", "adaptor"):
        original = getattr(dispatch.reference, name)
        monkeypatch.setattr(
            dispatch.reference,
            name,
            lambda *a, original=original, name=name, **k: calls.append(name) or original(*a, **k),
        )
    x = torch.randn(4, 3)
    nll = dispatch.linear_cross_entropy(x, x, torch.arange(4))
    assert nll.shape == (4,)
    dispatch.softmax_entropy(x)
    dispatch.adaptor(x[None], torch.tensor([4]), AdaptorWeights(x, None, x.T, None, stack=1))
    assert calls == ["linear_cross_entropy", "softmax_entropy", "adaptor"]


def test_a_kernel_that_fails_says_how_to_go_on_without_it():
    class Kernel:
        __name__ = "_update_kernel"

        def __init__(self, error):
            self.error = error

        def __getitem__(self, grid):
            def start(*args, **options):
                raise self.error

            return start

    x = torch.zeros(1)
    with pytest.raises(KernelError, match=r"update_kernel failed on cpu \(ValueError: no such"):
        launch(Kernel(ValueError("no such instruction\nsecond line")), (1,), x)
    with pytest.raises(KernelError, match="DSASR_KERNELS=torch"):
        launch(Kernel(RuntimeError()), (1,), x)
    with pytest.raises(torch.OutOfMemoryError):
        launch(Kernel(torch.OutOfMemoryError("full")), (1,), x)
    launch(Kernel(ValueError("never started")), (0, 3), x)


def test_importing_the_ops_imports_no_triton():
    code = (
        "import sys; before = 'triton' in sys.modules; import torch, dsasr.kernels.dispatch;"
        "sys.exit(any(name.startswith('dsasr.kernels.triton') for name in sys.modules))"
    )
    assert program(code).returncode == 0
    blocked = "import sys; sys.modules['triton'] = None; import dsasr.kernels.dispatch as k, torch;"
    process = program(blocked + "print(k.softmax_entropy(torch.zeros(1, 2)).item())")
    assert process.stdout.startswith("0.693"), process.stderr
