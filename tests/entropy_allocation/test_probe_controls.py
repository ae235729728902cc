import pytest
import torch

from dsasr.entropy_allocation import probe_controls as pc
from dsasr.entropy_allocation.probe_splits import split


def _window(frames, symbols, seed=0):
    return torch.randint(1, symbols, (frames, 3), generator=torch.Generator().manual_seed(seed))


def test_rows_stay_in_their_part():
    utterance_N = torch.arange(200) // 5
    parts = split(utterance_N, [f"s{u % 9}" for u in range(40)])
    order_N = pc.shuffled_rows(parts, 200, seed=3)
    for rows in (parts.train_N, parts.valid_N, parts.test_N):
        assert torch.equal(order_N[rows].sort().values, rows)
        assert (order_N[rows] == rows).float().mean() < 0.2
    assert torch.equal(order_N, pc.shuffled_rows(parts, 200, seed=3))
    assert not torch.equal(order_N, pc.shuffled_rows(parts, 200, seed=4))


@pytest.mark.parametrize("kind", ["additive", "phoneme", "window"])
def test_the_mean_is_what_the_window_tells(kind):
    # Functions of the window without noise, the last of them one that no regression on single
    # phonemes has.
    window_NK, utterance_N = _window(4000, 5), torch.arange(4000) // 20
    g = torch.Generator().manual_seed(1)
    tables = torch.randn(3, 5, 4, generator=g)
    x_NE = {
        "additive": tables[torch.arange(3), window_NK].sum(1),
        "phoneme": tables[1][window_NK[:, 1]],
        "window": torch.randn(125, 4, generator=g)[window_NK @ torch.tensor([25, 5, 1])],
    }[kind]
    mean_NE = pc.window_mean(x_NE, window_NK, utterance_N)
    left = (x_NE - mean_NE).var() / x_NE.var()
    assert left < 0.02


def test_no_frame_gets_its_own_noise_back():
    # Nearly all windows are one utterance's alone: the noise of its frames tells nothing of it.
    utterance_N = torch.arange(900) // 3
    window_NK = _window(300, 12).repeat_interleave(3, 0)
    noise_NE = torch.randn(900, 3, generator=torch.Generator().manual_seed(2))
    mean_NE = pc.window_mean(noise_NE, window_NK, utterance_N)
    agreement = (mean_NE * noise_NE).sum() / (mean_NE.norm() * noise_NE.norm())
    assert abs(agreement) < 0.3
