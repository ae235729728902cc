"""The calls of a language model on embeddings: packed rows in training, a cache in decoding.

Sequences that come in parts (a live stream's) are kept between their parts as `LlmPast`.

transformers' families differ in what they take; `dsasr.model.llm_properties` tries whether a
family does here what it should.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

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


class LlmPast(NamedTuple):
    """What a model keeps of one sequence's positions so far. A value: nothing changes it.

    ``layers``: keys and values [heads, L, X] of each layer; of a model without a cache, or one that
    cannot be cut into sequences (states, sliding windows), instead the embeddings [L, D].
    """

    length: int = 0
    layers: tuple[tuple[Tensor, Tensor], ...] = ()
    embeds_LD: Tensor | None = None


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

    def resume(self, pasts: Sequence[LlmPast], embeds: Sequence[Tensor]) -> Tensor:
        """Go on with sequences that were read before, in place of `start`.

        ``embeds``: what each is extended by, [n, D] with n >= 1. Returns the hidden states [R, D]
        at their last positions; `pasts` then gives the extended sequences.
        """
        self._parts = list(pasts), list(embeds)
        lefts_R, counts_R = (
            torch.tensor(values, device=embeds[0].device)
            for values in ([past.length for past in pasts], [len(part) for part in embeds])
        )
        if not self._cuttable:
            whole = [part.embeds_LD for part in self._whole()]
            return self.start(pad_sequence(whole, True, padding_side="left"), lefts_R + counts_R)
        left, new = max(past.length for past in pasts), max(len(part) for part in embeds)
        if left:
            for index, pair in enumerate(_stacked(pasts, left)):
                self._cache.update(*pair, index)
        steps = torch.arange(max(left, new), device=lefts_R.device)
        own_RL = steps[:left] >= left - lefts_R.unsqueeze(1)
        own_RN = steps[:new] >= new - counts_R.unsqueeze(1)
        self._mask_RL = torch.cat((own_RL, own_RN), 1).long()
        self._lengths_R = lefts_R + counts_R
        positions_RN = (lefts_R.unsqueeze(1) + own_RN.cumsum(1) - 1).clamp_min(0)
        return self._next(pad_sequence(list(embeds), True, padding_side="left"), positions_RN)

    def pasts(self) -> list[LlmPast]:
        """The sequences as `resume` has extended them; to be called before any `step`."""
        if not self._cuttable:
            return self._whole()
        found = []
        for row, (past, part) in enumerate(zip(*self._parts, strict=True)):
            pairs = []
            for index, layer in enumerate(self._cache.layers):
                own = [x[row, :, x.shape[2] - len(part) :] for x in (layer.keys, layer.values)]
                before = past.layers[index] if past.layers else [x[:, :0] for x in own]
                # Copies, at the latest here: a view would keep the whole batch alive.
                pairs.append(tuple(torch.cat(pair, 1) for pair in zip(before, own, strict=True)))
            found.append(LlmPast(past.length + len(part), tuple(pairs)))
        return found

    def _whole(self) -> list[LlmPast]:
        return [
            LlmPast(
                past.length + len(part),
                embeds_LD=part if past.embeds_LD is None else torch.cat((past.embeds_LD, part)),
            )
            for past, part in zip(*self._parts, strict=True)
        ]

    @property
    def _cuttable(self) -> bool:
        """Whether the cache is keys and values of all positions, layer by layer."""
        return self._cache is not None and all(
            type(layer) is DynamicLayer for layer in self._cache.layers
        )

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
        """Hidden states [R, D] of the last positions, by a pass over the whole sequences.

        They are padded on the right, which no position before it sees in a causal model.
        """
        length = self._embeds_RLD.shape[1]
        steps = torch.arange(length, device=self._embeds_RLD.device)
        order_RL = (steps + length - self._lengths_R.unsqueeze(1)).clamp_max(length - 1)
        rows_R = torch.arange(len(order_RL), device=order_RL.device)
        hidden_RLD = packed_hidden(self._llm, self._embeds_RLD[rows_R[:, None], order_RL], None)
        return hidden_RLD[rows_R, self._lengths_R - 1]


def _stacked(pasts: Sequence[LlmPast], left: int) -> list[tuple[Tensor, Tensor]]:
    """Each layer's keys and values [R, heads, left, X], padded on the left with zeros."""
    example = next(past for past in pasts if past.layers)

    def padded(x_HLX: Tensor) -> Tensor:
        return F.pad(x_HLX, (0, 0, left - x_HLX.shape[1], 0))

    stacked = []
    for index, pair in enumerate(example.layers):
        rows = [past.layers[index] if past.layers else [x[:, :0] for x in pair] for past in pasts]
        keys, values = zip(*rows, strict=True)
        stacked.append((torch.stack([*map(padded, keys)]), torch.stack([*map(padded, values)])))
    return stacked
