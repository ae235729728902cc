import math

import pytest
import torch

from dsasr.entropy_allocation.nse import nse, spectral_entropy


def _normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_white_noise_is_one():
    spectrum = nse(_normal(50_000, 32) + 5)
    assert spectrum.nse == pytest.approx(1, abs=1e-3)
    assert spectrum.effective_rank == pytest.approx(32, rel=1e-3)


def test_small_sample_bias_is_what_the_docstring_says():
    n, d = 2000, 100
    deficit = math.log(d) - nse(_normal(n, d)).entropy
    assert deficit == pytest.approx(d / (2 * n), rel=0.1)


def test_rank_one_is_zero():
    spectrum = nse(_normal(500, 1) @ _normal(1, 16, seed=1) + 3)
    assert spectrum.nse == pytest.approx(0, abs=1e-9)
    assert spectrum.effective_rank == pytest.approx(1, abs=1e-8)


def test_k_equal_directions():
    # 4 orthogonal directions of equal variance out of 16: H = ln 4, exactly.
    x = torch.zeros(8, 16, dtype=torch.float64)
    for i in range(4):
        x[2 * i, i], x[2 * i + 1, i] = 1, -1
    spectrum = nse(x @ torch.linalg.qr(_normal(16, 16)).Q)
    assert spectrum.entropy == pytest.approx(math.log(4), abs=1e-12)
    assert spectrum.nse == pytest.approx(0.5, abs=1e-12)
    assert spectrum.effective_rank == pytest.approx(4, abs=1e-10)


def test_known_eigenvalues():
    assert spectral_entropy(torch.tensor([3.0, 1.0, 0.0, -1e-9])) == pytest.approx(
        -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)), abs=1e-7
    )


def test_is_of_the_covariance_whatever_its_scale():
    x = _normal(700, 12) * torch.linspace(0.1, 2, 12) + 1
    eigenvalues = torch.linalg.eigvalsh(torch.cov(x.T, correction=0))
    spectrum = nse(x)
    assert spectrum.entropy == pytest.approx(spectral_entropy(eigenvalues), abs=1e-10)
    assert spectrum.frames == 700
    assert nse(x * 9 - 4).nse == pytest.approx(spectrum.nse, abs=1e-10)


def test_degenerate():
    assert math.isnan(nse(torch.full((10, 4), 0.3)).nse)
    assert math.isnan(nse(_normal(10, 4) * math.nan).nse)
    assert math.isnan(nse(torch.zeros(0, 4)).nse)
    assert math.isnan(nse(_normal(10, 1)).nse)
    with pytest.raises(ValueError, match=r"\[N, d\]"):
        nse(torch.zeros(3))
