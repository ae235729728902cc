"""Every op is held to the float64 reference in each way that it can be computed here.

Triton takes part where there is a GPU, or when the process began with TRITON_INTERPRET=1;
test_interpreted.py starts one that did.
"""

from __future__ import annotations

import os

import pytest
import torch

from dsasr.kernels import linear_cross_entropy, torch_logit_tiles

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU = torch.cuda.is_available() and not INTERPRETED
NAMES = ["torch", "tiles"] + ["triton"] * (GPU or INTERPRETED)


def pytest_generate_tests(metafunc):
    if "implementation" in metafunc.fixturenames:
        without = getattr(metafunc.module, "WITHOUT", ())
        names = [name for name in NAMES if name not in without]
        metafunc.parametrize("implementation", names, indirect=True)


@pytest.fixture
def implementation(request, monkeypatch):
    """ "torch" as it is, "tiles" cut small, "triton" cut small too; the name and the device."""
    name = request.param
    monkeypatch.setenv("DSASR_KERNELS", "triton" if name == "triton" else "torch")
    if name != "torch":
        monkeypatch.setattr(linear_cross_entropy, "_SMALL_LOGITS", 0)
        monkeypatch.setattr(linear_cross_entropy, "_cut", lambda rows, columns, device: (150, 96))
        monkeypatch.setattr(torch_logit_tiles, "_TILE_LOGITS", 1000)
    return name


@pytest.fixture
def device(implementation):
    return "cuda" if implementation == "triton" and GPU else "cpu"


def _error(got, want):
    """‖got − want‖ / ‖want‖, absolute where ``want`` is next to nothing. NaN is the worst."""
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    assert got.shape == want.shape
    error = float((got - want).norm() / max(float(want.norm()), 1e-3)) if want.numel() else 0.0
    return float("inf") if error != error else error


@pytest.fixture
def error():
    return _error
