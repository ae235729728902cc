"""Softmax attention that encoder and adaptors share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(
    query_BHSX: Tensor, key_BHSX: Tensor, value_BHSX: Tensor, bias: Tensor | None, dropout: float
) -> Tensor:
    """Softmax attention, [B, heads, S, head width]; ``bias`` is added to the scores.

    Short sequences on a CPU take the plain products: as fast as torch's fused kernel there, and
    three times as fast where the matrix products go through oneDNN, which that kernel calls in
    small pieces.
    """
    S, X = query_BHSX.shape[2:]
    if query_BHSX.is_cuda or S > 512:
        return F.scaled_dot_product_attention(
            query_BHSX, key_BHSX, value_BHSX, attn_mask=bias, dropout_p=dropout
        )
    scores = torch.matmul(query_BHSX * X**-0.5, key_BHSX.transpose(-1, -2))
    if bias is not None:
        scores = scores.add_(bias)
    shares = F.dropout(scores.softmax(-1), dropout, dropout > 0)
    return torch.matmul(shares, value_BHSX)
