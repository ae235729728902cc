"""What speech needs of a language model, tried on a small random model of its config.

A config does not say whether a family keeps packed utterances apart or decodes from its cache as
without it, and transformers takes arguments that a family ignores. So nothing is read off here: a
copy of the config with few layers (one of each kind), narrow where that is easy, gets random
weights and is run. Five properties are tried:

- packed rows give what their utterances give one by one. Where not, packing is switched off;
- decoding from the cache, whose rows are repeated, left out and reordered as beam search does,
  gives what the model gives over whole sequences. Where not, it is decoded without a cache;
- logits are W·h + b, soft-capped as the config says: what the fused loss computes. Where not, the
  model is refused;
- tokens enter at a scale that can be given to speech (`token_embeddings.input_scale`), and no
  position sees a later one. Where not, the model is refused;
- the tokenizer's special tokens have embeddings, and its beginning of a text is the model's own
  (`check_special_tokens`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from dsasr.data.text.tokenizers import Tokenizer
from dsasr.model.llm import LlmConfig, explain, read_soft_cap
from dsasr.model.llm_forward import Continuation, packed_hidden
from dsasr.model.token_embeddings import input_scale
from dsasr.utils.errors import UserError

TOLERANCE = 1e-4  # of the largest value; families that hold stay below 1e-5, others exceed 1e-3
_LENGTHS = (7, 5, 6)  # of the sequences that are tried
_MOST_LAYERS = 4
# Sizes that do not change what is tried, and windows that must be shorter than the sequences.
_SIZES = {
    "vocab_size": 64, "intermediate_size": 64, "ffn_dim": 64, "n_inner": 64,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "num_experts": 4,
    "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4,
}  # fmt: skip
_FAULTS = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, ImportError)


@dataclass(frozen=True)
class LlmProperties:
    """What holds of a model that is not refused; the others of its properties hold always."""

    packs: bool = True  # packed rows give what their utterances give one by one
    caches: bool = True  # the cache gives what whole sequences give

    def applied(self, cfg: LlmConfig) -> LlmConfig:
        """``cfg`` without what the model cannot do."""
        return cfg if self.packs else replace(cfg, pack=0)

    def notes(self, kind: str, cfg: LlmConfig) -> list[str]:
        """A line for each thing that ``cfg`` loses with a model of ``kind``."""
        lines = []
        if cfg.pack and not self.packs:
            lines.append(
                f"{kind} with {cfg.attn} attention does not keep packed utterances apart: "
                "model.llm.pack is off"
            )
        if not self.caches:
            lines.append(
                f"{kind} does not decode from its cache as without it: decoding runs over whole "
                "sequences, which is slow"
            )
        return lines


def try_llm(config: PretrainedConfig, attn: str = "sdpa") -> LlmProperties:
    """The properties of a model of ``config``, tried as above; the same each time.

    Takes a second or two, the memory of a few layers, and leaves torch's random state as it was.
    Raises `UserError` for a model that is refused. Attention that needs a GPU (flash, flex) is not
    tried: packing counts as kept where it is with sdpa or eager attention.
    """
    if attn in ("sdpa", "eager"):
        return _try(config, attn)
    try:
        found = _try(config, "sdpa")
    except UserError:  # perhaps for its attention alone
        return _try(config, "eager")
    return found if found.packs else _try(config, "eager")


def _try(config: PretrainedConfig, attn: str) -> LlmProperties:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        llm = _small_llm(config, attn)
        sequences = [_random(length, _width(llm)) for length in _LENGTHS]
        try:
            # CTRL scales its input in place.
            alone = [packed_hidden(llm, x_LD[None].clone(), None)[0] for x_LD in sequences]
            _check_causal(llm, sequences[0], alone[0])
            _check_logits(llm, sequences[0], alone[0])
            input_scale(llm)
            whole = _continued(llm, sequences, cached=False)
        except _FAULTS as error:
            raise _does_not_run(config, error) from error
        return LlmProperties(
            packs=_same(lambda: _packed(llm, sequences), torch.cat(alone)),
            caches=_same(lambda: _continued(llm, sequences, cached=True), whole),
        )


def check_special_tokens(tokenizer: Tokenizer, config: PretrainedConfig) -> list[str]:
    """A line where the tokenizer begins a text otherwise than the model's config says.

    Raises `UserError` for a special token without an embedding.
    """
    text = config.get_text_config()
    ends = {"end": tokenizer.end_id, "padding": tokenizer.pad_id}
    starts = [("beginning", number) for number in tokenizer.bos_ids]
    for what, number in [*ends.items(), *starts]:
        if not 0 <= number < text.vocab_size:
            raise UserError(
                f"the tokenizer's {what} token is {number}, the language model has "
                f"{text.vocab_size} embeddings: use the tokenizer folder that came with it"
            )
    own = getattr(text, "bos_token_id", None)
    if tokenizer.bos_ids and isinstance(own, int) and own not in tokenizer.bos_ids:
        return [
            f"the tokenizer begins a text with token {tokenizer.bos_ids[0]}, the language model's "
            f"config.json says {own}: the tokenizer's is used"
        ]
    return []


# -- the small model ---------------------------------------------------------------------------


def _small_llm(config: PretrainedConfig, attn: str) -> PreTrainedModel:
    """A model of the config's kind that runs on embeddings, with weights of unit gain."""
    problem: Exception | None = None
    for sizes in (_SIZES, {}):
        try:
            llm = AutoModelForCausalLM.from_config(
                small_config(config, sizes), dtype=torch.float32, attn_implementation=attn,
                trust_remote_code=False,
            ).eval()  # fmt: skip
            _randomize(llm)
            packed_hidden(llm, _random(3, _width(llm))[None], None)
            return llm
        except _FAULTS as error:  # a family whose sizes hang together
            problem = error
    raise _does_not_run(config, problem) from problem


def _does_not_run(config: PretrainedConfig, error: Exception) -> UserError:
    return UserError(
        f"{config.model_type} does not run on embeddings, which is all that speech has: "
        f"{explain(error)}"
    )


def small_config(config: PretrainedConfig, sizes: dict[str, int] | None = None) -> PretrainedConfig:
    """A copy of ``config`` with a layer of each kind, at least two, and at most ``sizes``."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    count = text.num_hidden_layers
    # What is listed for each layer, such as its kind of attention.
    lists = {k: v for k, v in vars(text).items() if isinstance(v, (list, tuple))}
    listed = {name: values for name, values in lists.items() if len(values) == count}
    layers = _layers_of_each_kind(count, list(listed.values()))
    for name, values in listed.items():
        setattr(text, name, type(values)(values[i] for i in layers))
    text.num_hidden_layers = len(layers)
    for name, most in (_SIZES if sizes is None else sizes).items():
        value = getattr(text, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > most:
            setattr(text, name, most)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value >= text.vocab_size:
            setattr(text, name, text.vocab_size - 1)
    return config


def _layers_of_each_kind(count: int, listed: Sequence[Sequence[Any]]) -> list[int]:
    first: dict[str, int] = {}
    for layer in range(count):
        first.setdefault(repr([values[layer] for values in listed]), layer)
    layers = sorted(first.values())[:_MOST_LAYERS]
    others = (layer for layer in range(count) if layer not in layers)
    while len(layers) < min(2, count):
        layers.append(next(others))
    return sorted(layers)


def _randomize(llm: PreTrainedModel) -> None:
    """Matrices of unit gain: with the usual small weights a layer hardly changes its input, and a
    fault would hardly show."""
    for parameter in llm.parameters():
        if parameter.ndim >= 2:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)


def _random(length: int, width: int) -> Tensor:
    return torch.randn(length, width)


def _width(llm: PreTrainedModel) -> int:
    return llm.get_input_embeddings().weight.shape[1]


# -- properties --------------------------------------------------------------------------------


def _differs(found: Tensor, expected: Tensor) -> bool:
    """Also where it is not finite."""
    most = float((found - expected).abs().max())
    return not most <= TOLERANCE * max(float(expected.abs().max()), 1e-6)


def _same(run: Any, expected: Tensor) -> bool:
    try:
        return not _differs(run(), expected)
    except (*_FAULTS, NotImplementedError):
        return False


def _check_causal(llm: PreTrainedModel, x_LD: Tensor, hidden_LD: Tensor) -> None:
    half = len(x_LD) // 2
    changed_LD = torch.cat((x_LD[:half], _random(len(x_LD) - half, x_LD.shape[1])))
    if _differs(packed_hidden(llm, changed_LD[None], None)[0, :half], hidden_LD[:half]):
        raise UserError(
            f"{llm.config.model_type} sees later positions: choose a causal language model"
        )


def _check_logits(llm: PreTrainedModel, x_LD: Tensor, hidden_LD: Tensor) -> None:
    """With a head whose logits are large enough to show a soft cap."""
    kind, head = llm.config.model_type, llm.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise UserError(f"{kind} has no linear LM head: choose another language model")
    head.weight = nn.Parameter(20 * torch.randn_like(head.weight) * head.in_features**-0.5)
    if head.bias is not None:
        head.bias = nn.Parameter(torch.randn_like(head.bias))
    logits_LV = llm(inputs_embeds=x_LD[None].clone(), use_cache=False).logits[0]
    cap = read_soft_cap(llm.config)
    plain_LV = head(hidden_LD)
    expected_LV = cap * (plain_LV / cap).tanh() if cap else plain_LV
    if not _differs(logits_LV, expected_LV):
        return
    slope = float((logits_LV * plain_LV).sum() / plain_LV.square().sum())
    what = "has logits that are not W·h + b of its last hidden states"
    if not _differs(logits_LV, slope * plain_LV):
        what = f"scales its logits by {slope:.4g}"
    raise UserError(f"{kind} {what}, which the fused loss needs: choose another language model")


def _packed(llm: PreTrainedModel, sequences: Sequence[Tensor]) -> Tensor:
    """All sequences in one row, with padding as `sequence_layout.lay_out` leaves it behind them."""
    padding = 2
    positions = [torch.arange(len(x_LD)) for x_LD in sequences]
    positions_RL = torch.cat((*positions, torch.zeros(padding, dtype=torch.int64)))[None]
    row_LD = torch.cat((*sequences, sequences[0].new_zeros(padding, sequences[0].shape[1])))
    return packed_hidden(llm, row_LD[None], positions_RL)[0, :-padding]


def _continued(llm: PreTrainedModel, sequences: Sequence[Tensor], cached: bool) -> Tensor:
    """Hidden states of all steps of a search with beams; the same for either ``cached``."""
    continuation = Continuation(llm, cached)
    width, longest = sequences[0].shape[1], max(map(len, sequences))
    embeds_RLD = torch.zeros(len(sequences), longest, width)
    for row, x_LD in enumerate(sequences):
        embeds_RLD[row, longest - len(x_LD) :] = x_LD
    lengths_R = torch.tensor([len(x_LD) for x_LD in sequences])
    steps = [continuation.start(embeds_RLD, lengths_R)]
    for rows, embeds_RD in _beams(width):
        steps.append(continuation.step(embeds_RD, rows))
    return torch.cat(steps)


def _beams(width: int) -> Iterator[tuple[list[int], Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for rows in ([0, 1, 2], [2, 0, 0, 1], [3, 1, 0], [0, 1, 2], [2, 0], [1], [0], [0]):
        yield rows, torch.randn(len(rows), width, generator=generator)
