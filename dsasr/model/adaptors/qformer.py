"""The Q-Former over windows: learned queries attend to ``stack`` frames, window by window.

As in BLIP-2 (arXiv 2301.12597), window by window as in SALMONN (arXiv 2310.13289). A window gives
``queries`` speech tokens, however few frames the last one has. Chosen here (**ours**):

- Keys have learned positions within the window. Attention has no order of its own, and not every
  encoder's frames carry theirs.
- Queries attend to each other between two layers that read frames: before the first they are the
  same in every window, and a single query has no other to attend to.
- LayerNorm stands before each sublayer, and before the linear layer into the language model's
  space, so that the embeddings start at ``scale`` whatever the layers do.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsasr.kernels.adaptor import FrameStacks
from dsasr.model.adaptors.protocol import AdaptorConfig, deliver
from dsasr.model.attention import attend
from dsasr.utils.errors import UserError

FFN = 4  # inner width of the feed-forward layers, in widths (BERT's and BLIP-2's)
# Small beside what a layer adds, so that windows differ from the start (BERT's).
STD = 0.02


class QformerLayer(nn.Module):
    """[queries to each other,] queries to frames, feed-forward; ``width`` of the frames."""

    def __init__(self, width: int, hidden: int, heads: int, among_queries: bool):
        super().__init__()
        self.heads = heads
        self.qkv = None
        if among_queries:
            self.self_norm = nn.LayerNorm(hidden)
            self.qkv = nn.Linear(hidden, 3 * hidden)
            self.self_out = nn.Linear(hidden, hidden)
        self.cross_norm = nn.LayerNorm(hidden)
        self.query = nn.Linear(hidden, hidden)
        self.key_value = nn.Linear(width, 2 * hidden)
        self.cross_out = nn.Linear(hidden, hidden)
        self.ffn_norm = nn.LayerNorm(hidden)
        self.up = nn.Linear(hidden, FFN * hidden)
        self.down = nn.Linear(FFN * hidden, hidden)

    def forward(
        self, x_NQH: Tensor, windows_NKE: Tensor, positions_KH: Tensor, bias_N11K: Tensor
    ) -> Tensor:
        if self.qkv is not None:
            query, key, value = self.qkv(self.self_norm(x_NQH)).chunk(3, dim=-1)
            x_NQH = x_NQH + self.self_out(self._attend(query, key, value))
        key, value = self.key_value(windows_NKE).chunk(2, dim=-1)
        query = self.query(self.cross_norm(x_NQH))
        x_NQH = x_NQH + self.cross_out(self._attend(query, key + positions_KH, value, bias_N11K))
        return x_NQH + self.down(F.gelu(self.up(self.ffn_norm(x_NQH))))

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        heads = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (query, key, value))
        return attend(*heads, bias, 0.0).transpose(1, 2).flatten(2)


class QformerAdaptor(nn.Module):
    """Encoder frames [B, S, E] to embeddings [B, A, D]; ``hidden``: the inner width H.

    ``scale`` is the root mean square that the embeddings start with. Raises `UserError` where the
    heads do not divide the inner width.
    """

    def __init__(self, cfg: AdaptorConfig, width: int, out_width: int, scale: float = 1.0):
        super().__init__()
        self.cfg, self.scale = cfg, scale
        hidden = cfg.hidden or out_width
        if hidden % cfg.heads:
            raise UserError(
                f"model.adaptor.heads={cfg.heads} does not divide the adaptor's inner width "
                f"{hidden}: give other heads, or model.adaptor.hidden"
            )
        self.queries = nn.Parameter(torch.empty(cfg.queries, hidden))
        self.positions = nn.Parameter(torch.empty(cfg.layers, cfg.stack, hidden))
        self.layers = nn.ModuleList(
            QformerLayer(width, hidden, cfg.heads, among_queries=index > 0 and cfg.queries > 1)
            for index in range(cfg.layers)
        )
        self.norm = nn.LayerNorm(hidden)
        self.weight = nn.Parameter(torch.empty(out_width, hidden))
        self.bias = nn.Parameter(torch.empty(out_width))
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        nn.init.normal_(self.queries, std=STD, generator=generator)
        nn.init.normal_(self.positions, std=STD, generator=generator)
        std = self.scale / self.weight.shape[1] ** 0.5
        nn.init.normal_(self.weight, std=std, generator=generator)
        nn.init.zeros_(self.bias)

    def output_lengths(self, lengths_B: Tensor) -> Tensor:
        """Embeddings that ``lengths_B`` encoder frames give: those of ceil(S / stack) windows."""
        return (lengths_B + self.cfg.stack - 1) // self.cfg.stack * self.cfg.queries

    def forward(
        self,
        frames_BSE: Tensor,
        lengths_B: Tensor,
        packed: bool = False,
        out_LD: Tensor | None = None,
        index_N: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See `dsasr.model.adaptors.protocol.Adaptor`. Frames beyond ``lengths_B`` are hidden from
        the queries; windows of padding alone are not computed."""
        stack, device, dtype = self.cfg.stack, frames_BSE.device, self.weight.dtype
        stacks = FrameStacks.of(lengths_B, stack, frames_BSE.shape[1], device)
        windows_NKE = stacks.gather(frames_BSE.to(dtype), stack).unflatten(1, (stack, -1))
        hidden_NK = torch.arange(stack, device=device) >= stacks.frames_N[:, None]
        bias_NK = torch.zeros_like(hidden_NK, dtype=dtype).masked_fill(hidden_NK, -torch.inf)
        x_NQH = self.queries.expand(len(windows_NKE), -1, -1)
        for layer, positions_KH in zip(self.layers, self.positions, strict=True):
            x_NQH = layer(x_NQH, windows_NKE, positions_KH, bias_NK[:, None, None, :])
        embeds_ND = F.linear(self.norm(x_NQH), self.weight, self.bias).flatten(0, 1)
        lengths_B = stacks.lengths_B * self.cfg.queries
        slots = -(-frames_BSE.shape[1] // stack) * self.cfg.queries
        return deliver(embeds_ND, lengths_B, slots, packed, out_LD, index_N), lengths_B
