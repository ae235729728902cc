import torch
import torch.nn.functional as F

from dsasr.model.attention import attend


def test_attention_equals_the_fused_one():
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 3, 17, 8, dtype=torch.float64)
    bias = torch.zeros(2, 1, 17, 17, dtype=torch.float64).masked_fill(
        ~torch.ones(17, 17, dtype=torch.bool).tril(), -torch.inf
    )
    for mask in (None, bias):
        torch.testing.assert_close(
            attend(query, key, value, mask, 0.0),
            F.scaled_dot_product_attention(query, key, value, attn_mask=mask),
        )
