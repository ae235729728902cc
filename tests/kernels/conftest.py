"""Every op is compared with the float64 reference in each implementation that runs here.

Triton is among them where there is a GPU, or when the process began with TRITON_INTERPRET=1, as
that of test_interpreted.py does.
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
    """ "torch", "tiles" (torch in small tiles) or "triton" (in small tiles too)."""
    name = request.param
    monkeypatch.setenv("DSASR_KERNELS", "triton" if name == "triton" else "torch")
    if name != "torch":
        monkeypatch.setattr(linear_cross_entropy, "_SMALL_LOGITS", 0)
        monkeypatch.setattr(
            linear_cross_entropy, "_tile_size", lambda rows, columns, device: (150, 96)
        )
        monkeypatch.setattr(linear_cross_entropy, "chunk_rows", lambda rows, columns, device: 130)
        monkeypatch.setattr(torch_logit_tiles, "_TILE_LOGITS", 1000)
    return name


@pytest.fixture
def device(implementation):
    return "cuda" if implementation == "triton" and GPU else "cpu"


def _error(actual, expected):
    """‖actual − expected‖ / ‖expected‖, absolute where ``expected`` is near 0; NaN is inf."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    assert actual.shape == expected.shape
    error = (
        float((actual - expected).norm() / max(float(expected.norm()), 1e-3))
        if expected.numel()
        else 0.0
    )
    return float("inf") if error != error else error


@pytest.fixture
def error():
    return _error
