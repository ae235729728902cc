"""The scale at which a language model's tokens enter it, measured on the model itself.

Families differ in where they scale token embeddings, and neither a config nor the embedding's
weight says which way a model goes:

- in the embedding layer (Gemma, MiniCPM3, XGLM): its output is scaled already;
- in the model, for embeddings from anywhere (Granite, RecurrentGemma): tokens and speech alike;
- in the model, but only where it looks up the embeddings itself (Falcon-H1): embeddings that are
  given as ``inputs_embeds`` must have been multiplied before.

So nothing is read from a config here: `embedding_rms` runs the embedding layer, and `input_scale`
compares what reaches the first layer from token ids with what reaches it from embeddings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from dsasr.data.text.characters import BOUNDARY
from dsasr.data.text.tokenizers import Tokenizer
from dsasr.model.layerwise_init import full_shape
from dsasr.utils.errors import UserError, message_of

_BLOCK = 16_384  # tokens looked up at a time
_ROWS = 64  # of the position embeddings and other tables that a probe needs
_PROBE_TOKENS = 3


@torch.no_grad()
def embedding_rms(embeddings: nn.Module) -> float:
    """Root mean square of the embedding layer's output over the whole vocabulary.

    The layer's weight must be whole on this rank. Takes the memory of `_BLOCK` embeddings.
    """
    vocabulary = embeddings.weight.shape[0]
    total = 0.0
    for start in range(0, vocabulary, _BLOCK):
        ids = torch.arange(start, min(start + _BLOCK, vocabulary), device=embeddings.weight.device)
        total += float(embeddings(ids).float().square_().mean()) * len(ids)
    return float(torch.tensor(total / vocabulary, dtype=torch.float32).sqrt())


def token_rms(llm: PreTrainedModel) -> float:
    """Root mean square of token embeddings as ``inputs_embeds``, of a model that is whole here.

    An adaptor of this scale (`dsasr.model.adaptors`) gives speech the scale of tokens: from here on
    both take the same way through the model.
    """
    return embedding_rms(llm.get_input_embeddings()) * abs(input_scale(llm))


@torch.no_grad()
def embed_tokens(llm: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    """The tokens' embeddings as ``inputs_embeds``, [N, D] in float32.

    Collective where ZeRO-3 has partitioned the model: ranks hold the embedding whole meanwhile.
    """
    embeddings = llm.get_input_embeddings()
    weight, partitioned = embeddings.weight, hasattr(embeddings.weight, "ds_tensor")
    if partitioned:
        weight.all_gather()
    rows_ND = embeddings(torch.tensor(ids, device=weight.device)).float()
    if partitioned:
        weight.partition()
    return rows_ND * input_scale(llm)


def unit_embeddings(
    llm: PreTrainedModel, tokenizer: Tokenizer, units: Sequence[str], are_tokens: bool
) -> Tensor:
    """The language model's embeddings of the CTC head's units but blank, [P - 1, D].

    Units that are its tokens have these tokens' own; others the mean over those that they are
    written with, so that letters and phonetic signs start as what it knows of them (**ours**), or
    zero where the tokenizer writes nothing for them. Collective as `embed_tokens`.
    """
    if are_tokens:
        pieces = {piece: number for number, piece in tokenizer.pieces().items()}
        rows = [[pieces[unit]] for unit in units]
    else:
        rows = [tokenizer.encode(unit.replace(BOUNDARY, " ")) for unit in units]
    embeds_ND = embed_tokens(llm, [number for row in rows for number in row])
    split = embeds_ND.split([len(row) for row in rows])
    return torch.stack([rows_ND.sum(0) / max(len(rows_ND), 1) for rows_ND in split])


@torch.no_grad()
def input_scale(llm: PreTrainedModel) -> float:
    """The factor that the embedding layer's output lacks as ``inputs_embeds``; nearly always 1.

    The base model runs up to its first layer, once from token ids and once from the same tokens'
    embeddings. Only its structure counts: weights are replaced by random ones meanwhile, so it may
    be partitioned, or on the meta device but for its buffers. Counts as 1 where those are there
    too, or under ``torch.device("meta")``. Raises `UserError` for a model that takes more from
    token ids than an embedding, such as embeddings for each layer.
    """
    embeddings, kind = llm.get_input_embeddings(), llm.config.model_type
    generator = torch.Generator().manual_seed(0)
    on_meta = torch.get_default_device().type == "meta"
    if on_meta or any(buffer.is_meta for buffer in llm.base_model.buffers()):
        return 1.0
    rows, width = full_shape(embeddings.weight)
    pad = llm.config.get_text_config().pad_token_id  # some families count positions without it
    device = next((buffer.device for buffer in llm.base_model.buffers()), torch.device("cpu"))
    ids = torch.tensor(
        [[i for i in range(min(rows, 8)) if i != pad][:_PROBE_TOKENS]], device=device
    )
    probe = torch.randn(*ids.shape, width, generator=generator).to(device)
    with ExitStack() as stack:
        stack.enter_context(_without_dropout(llm))
        stack.enter_context(_random_weights(llm, generator, device))
        stack.enter_context(_replaced(embeddings, "forward", lambda *_, **__: probe.clone()))
        from_ids = _first_layer_inputs(llm, input_ids=ids)
        plain = _first_layer_inputs(llm, inputs_embeds=probe.clone())
        twice = _first_layer_inputs(llm, inputs_embeds=2 * probe)
        # Linear in the embeddings up to constants (positions): solve for the factor, then verify.
        slope, offset = (twice[0] - plain[0]).flatten(), (from_ids[0] - plain[0]).flatten()
        scale = 1.0
        if not torch.allclose(from_ids[0], plain[0], rtol=1e-5, atol=1e-6):
            scale += float(offset @ slope / (slope @ slope))
        scaled = _first_layer_inputs(llm, inputs_embeds=scale * probe)
    same = len(from_ids) == len(scaled) and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-4)
        for a, b in zip(from_ids, scaled, strict=True)
    )
    if not same:
        raise UserError(
            f"{kind} computes more from token ids than their embeddings, which is all that speech "
            "has: choose another language model"
        )
    return scale


class _Reached(Exception):
    """The forward pass has come to the first layer."""


def _first_layer_inputs(llm: PreTrainedModel, **inputs: Tensor) -> list[Tensor]:
    """All floating-point tensors that the base model passes to the first layer that it runs."""
    found: list[Tensor] = []

    def catch(_layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        values = (*args, *(kwargs[name] for name in sorted(kwargs)))
        found.extend(v for v in values if isinstance(v, Tensor) and v.is_floating_point())
        raise _Reached

    handles = [layer.register_forward_pre_hook(catch, with_kwargs=True) for layer in _layers(llm)]
    try:
        llm.base_model(**inputs, use_cache=False)
    except _Reached:
        return found
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise UserError(
            f"{llm.config.model_type} does not run on embeddings alone, which is all that speech "
            f"has ({message_of(error)}): choose another language model"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    raise UserError(
        f"{llm.config.model_type} has no layer that its inputs can be followed to: choose another "
        "language model"
    )


def _layers(llm: PreTrainedModel) -> list[nn.Module]:
    layers = [m for m in llm.base_model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if layers:
        return layers
    depth = llm.config.get_text_config().num_hidden_layers
    lists = (m for m in llm.base_model.modules() if isinstance(m, nn.ModuleList))
    return [stack[0] for stack in lists if len(stack) == depth]


@contextmanager
def _random_weights(
    llm: PreTrainedModel, generator: torch.Generator, device: torch.device
) -> Iterator[None]:
    """Random weights outside the layers, of few rows where they are tables; restored at the end."""
    inside = {id(m) for layer in _layers(llm) for m in layer.modules()}
    skipped = inside | {id(llm.get_input_embeddings()), id(llm.get_output_embeddings())}
    saved: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for module in llm.base_model.modules():
            if id(module) in skipped:
                continue
            for name, parameter in module._parameters.items():
                if parameter is None:
                    continue
                shape = full_shape(parameter)
                if isinstance(module, nn.Embedding):
                    shape = (min(shape[0], _ROWS + (module.padding_idx or 0)), *shape[1:])
                values = 0.5 + torch.rand(shape, generator=generator).to(device)
                saved.append((module, name, parameter))
                module._parameters[name] = nn.Parameter(values, requires_grad=False)
        yield
    finally:
        for module, name, parameter in saved:
            module._parameters[name] = parameter


@contextmanager
def _without_dropout(module: nn.Module) -> Iterator[None]:
    training = [m for m in module.modules() if m.training]
    module.eval()
    try:
        yield
    finally:
        for m in training:
            m.training = True


@contextmanager
def _replaced(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    setattr(module, name, value)
    try:
        yield
    finally:
        delattr(module, name)
