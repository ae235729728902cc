"""The calls of a language model on embeddings: packed rows in training, a cache in decoding.

transformers' families differ in what they take; `dsasr.model.llm_properties` tries whether a
family does here what it should.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

# What base models call the argument of their cache; transformers renames the others to the first,
# and drops them in 5.40. A forward ignores a name that it does not know.
_CACHE_NAMES = ("cache", "past_key_values", "cache_params")


def packed_hidden(llm: PreTrainedModel, embeds_RLD: Tensor, positions_RL: Tensor | None) -> Tensor:
    """Hidden states [R, L, D] of rows in training.

    positions_RL: of rows of several utterances, from 0 on in each; None for one utterance a row.
    """
    mask = None
    if positions_RL is not None:
        mask = _packed_mask(llm.config.get_text_config(), positions_RL)
    return llm.base_model(
        inputs_embeds=embeds_RLD,
        attention_mask=mask,
        position_ids=positions_RL,
        use_cache=False,
    ).last_hidden_state


def _packed_mask(config: PretrainedConfig, positions_RL: Tensor) -> Tensor | None:
    """[R, 1, L, L], True where a position attends to another of its utterance, or to itself.

    transformers builds the same from the positions, but syncs with the GPU to see whether there
    is more than one utterance. None where it has to build its own: an attention other than sdpa, or
    layers with a sliding window.
    """
    windows = getattr(config, "sliding_window", None) is not None
    windows |= bool(set(getattr(config, "layer_types", None) or ()) - {"full_attention"})
    if config._attn_implementation != "sdpa" or windows:
        return None
    utterance_RL = (positions_RL == 0).cumsum(1)
    same = utterance_RL[:, None, :, None] == utterance_RL[:, None, None, :]
    return same.tril()


@cache
def _cache_argument(forward: Any) -> str | None:
    parameters = inspect.signature(forward).parameters
    return next((name for name in _CACHE_NAMES if name in parameters), None)


class Continuation:
    """Sequences of embeddings that grow by one position a step; each step gives hidden states.

    With ``cached`` the model keeps keys, values and states of the positions before. Without, it
    runs over the whole sequences at each step: slow, but right for every causal model.
    """

    def __init__(self, llm: PreTrainedModel, cached: bool = True):
        self._llm = llm
        self._name = _cache_argument(type(llm.base_model).forward) if cached else None
        self._cache = DynamicCache(config=llm.config) if self._name else None

    def start(self, embeds_RLD: Tensor, lengths_R: Tensor) -> Tensor:
        """Sequences of ``lengths_R``, padded on the left; the hidden states [R, D] of the last."""
        length = embeds_RLD.shape[1]
        steps = torch.arange(length, device=embeds_RLD.device)
        self._lengths_R = lengths_R
        self._mask_RL = (steps >= length - lengths_R.unsqueeze(1)).long()
        self._embeds_RLD = embeds_RLD
        positions_RL = (self._mask_RL.cumsum(1) - 1).clamp_min(0)
        return self._next(embeds_RLD, positions_RL)

    def step(self, embeds_RD: Tensor, rows: Sequence[int]) -> Tensor:
        """A further embedding for each of the ``rows`` of the step before, which may repeat and be
        left out; the hidden states [R, D] there."""
        if list(rows) != list(range(len(self._mask_RL))):
            index = torch.tensor(rows, device=self._mask_RL.device)
            if self._cache is not None:
                self._cache.reorder_cache(index)
            else:
                self._embeds_RLD = self._embeds_RLD[index]
            self._mask_RL, self._lengths_R = self._mask_RL[index], self._lengths_R[index]
        one_R1 = self._mask_RL.new_ones(len(rows), 1)
        self._mask_RL = torch.cat((self._mask_RL, one_R1), dim=1)
        positions_R1 = self._lengths_R.unsqueeze(1)
        self._lengths_R = self._lengths_R + 1
        if self._cache is None:
            self._embeds_RLD = torch.cat((self._embeds_RLD, embeds_RD[:, None]), dim=1)
        return self._next(embeds_RD[:, None], positions_R1)

    def _next(self, embeds: Tensor, positions: Tensor) -> Tensor:
        if self._cache is None:
            return self._over_all()
        return self._llm.base_model(
            inputs_embeds=embeds,
            attention_mask=self._mask_RL,
            position_ids=positions,
            use_cache=True,
            **{self._name: self._cache},
        ).last_hidden_state[:, -1]

    def _over_all(self) -> Tensor:
        """Padded on the right, where no causal model looks."""
        length = self._embeds_RLD.shape[1]
        steps = torch.arange(length, device=self._embeds_RLD.device)
        order_RL = (steps + length - self._lengths_R.unsqueeze(1)).clamp_max(length - 1)
        rows_R = torch.arange(len(order_RL), device=order_RL.device)
        hidden_RLD = packed_hidden(self._llm, self._embeds_RLD[rows_R[:, None], order_RL], None)
        return hidden_RLD[rows_R, self._lengths_R - 1]
