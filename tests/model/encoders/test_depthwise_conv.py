import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dsasr.model.dynamic_chunks import Chunk
from dsasr.model.encoders.depthwise_conv import DepthwiseConv


@given(st.integers(1, 3), st.integers(1, 40), st.sampled_from([1, 3, 5, 15]), st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_chunked_convolution_is_a_convolution_with_the_future_zeroed(B, S, kernel, size):
    torch.manual_seed(0)
    conv = DepthwiseConv(6, kernel).double()
    x = torch.randn(B, S, 6, dtype=torch.float64)
    actual = conv(x, Chunk(size))
    for start in range(0, S, size):
        past = x.clone()
        past[:, start + size :] = 0
        y = F.conv1d(
            past.transpose(1, 2), conv.weight, conv.bias, padding=kernel // 2, groups=6
        ).transpose(1, 2)
        torch.testing.assert_close(actual[:, start : start + size], y[:, start : start + size])
