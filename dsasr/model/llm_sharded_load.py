"""Loading a language model partitioned: no rank has it whole in memory.

The model is built on the meta device from its config, LoRA's matrices included; each layer then
gets its weights from the folder's safetensors files, a tensor at a time, or drawn at random, and is
partitioned before the next one (`layerwise_init`). The values are those of `load_llm`.

Where a folder's tensors are not the model's one by one (transformers renames or joins those of some
architectures, and unpacks quantized ones; see `match_tensors`), the model is loaded whole and then
partitioned.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dsasr.model import layerwise_init, lora
from dsasr.model.hf_weights import TensorFiles, check_present, fill_buffers
from dsasr.model.layerwise_init import Partition
from dsasr.model.llm import load_llm
from dsasr.model.lora import Adapt, DrawAdapter
from dsasr.model.token_embeddings import embedding_rms, input_scale, token_rms
from dsasr.utils import distributed
from dsasr.utils.errors import UserError


def match_tensors(llm: PreTrainedModel, files: TensorFiles) -> dict[str, str] | None:
    """The model's parameters and persistent buffers → names of the same tensors in the files.

    None where some tensor has no counterpart of its shape there, or transformers converts names or
    values on loading. ``llm`` may be on the meta device and have LoRA's layers.
    """
    if _is_converted(llm):
        return None
    tied: dict[int, list[tuple[str, Tensor]]] = {}
    for name, tensor in _state(llm):
        tied.setdefault(id(tensor), []).append((name, tensor))
    file_names: dict[str, str] = {}
    for aliases in tied.values():
        plain = [lora.plain_name(name) for name, _ in aliases]
        matches = [n for n in plain if files.shapes.get(n) == tuple(aliases[0][1].shape)]
        if not matches:
            return None
        file_names |= {name: matches[0] for name, _ in aliases}
    return file_names


def _state(llm: nn.Module):
    """Parameters (tied ones by every name) and persistent buffers, without LoRA's matrices."""
    for name, parameter in llm.named_parameters(remove_duplicate=False):
        if not lora.is_adapter(name):
            yield name, parameter
    for path, layer in llm.named_modules():
        for name, buffer in layer._buffers.items():
            if buffer is not None and name not in layer._non_persistent_buffers_set:
                yield f"{path}.{name}" if path else name, buffer


def _is_converted(llm: PreTrainedModel) -> bool:
    """Whether transformers converts names or values of the folder's tensors on loading."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping

        # add_legacy: renamings of gamma and beta, which leave other names alone.
        if get_model_conversion_mapping(llm, add_legacy=False):
            return True
    except ImportError:
        pass  # an older transformers, which converts nothing
    return getattr(llm.config, "quantization_config", None) is not None


def check_weights(folder: Path, llm: PreTrainedModel) -> None:
    """Raise `UserError` if the folder lacks weights of ``llm``, which may be on the meta device.

    Only headers are read. Of a model whose tensors transformers converts, they must be readable.
    """
    files = TensorFiles(folder)
    check_present(files)
    if _is_converted(llm) or match_tensors(llm, files) is not None:
        return
    prefix, spare = f"{llm.base_model_prefix}.", llm._keys_to_ignore_on_load_missing or ()
    tied: dict[int, tuple[Tensor, list[str]]] = {}
    for name, tensor in _state(llm):
        tied.setdefault(id(tensor), (tensor, []))[1].append(name)
    for tensor, names in tied.values():
        # A folder of the model without its head leaves out the prefix.
        stored = [n for name in names for n in (name, name.removeprefix(prefix))]
        found = [files.shapes[name] for name in stored if name in files.shapes]
        if tuple(tensor.shape) in found or any(re.search(p, names[0]) for p in spare):
            continue
        what = (
            f"has {names[0]} {list(found[0])}, not {list(tensor.shape)}"
            if found
            else (f"lacks {names[0]}")
        )
        raise UserError(f"{folder} {what}: its weights are not those of its config.json")


def load_llm_partitioned(
    folder: Path,
    partition: Partition,
    *,
    attn: str,
    dropout: float,
    adapt: Adapt | None = None,
    draw_adapter: DrawAdapter | None = None,
) -> tuple[PreTrainedModel, float]:
    """`load_llm` with ``adapt`` applied, and its `token_rms`.

    A rank has at most its slices and one layer's own parameters in memory. Raises as `load_llm`
    does, on all ranks. Collective.
    """
    llm = _on_meta(folder, attn, dropout, adapt)
    files = TensorFiles(folder)
    file_names = distributed.broadcast(match_tensors(llm, files))
    if file_names is None:
        return _load_whole(folder, partition, attn, dropout, adapt, draw_adapter)
    fill_buffers(llm, files, file_names)
    rms, embeddings = 0.0, llm.get_input_embeddings()

    def fill_layer(layer: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        nonlocal rms
        for name, parameter in parameters.items():
            if name in file_names:
                files.read(file_names[name], parameter)
            else:
                parameter.copy_(draw_adapter(name, tuple(parameter.shape)))
        if layer is embeddings:
            rms = embedding_rms(layer)

    layerwise_init.materialize(llm, fill_layer, partition)
    return llm.eval(), distributed.broadcast(rms) * abs(input_scale(llm))


def _load_whole(
    folder: Path,
    partition: Partition,
    attn: str,
    dropout: float,
    adapt: Adapt | None,
    draw_adapter: DrawAdapter | None,
) -> tuple[PreTrainedModel, float]:
    if distributed.is_main_rank():
        print(f"{folder}: each rank loads it whole before it is partitioned, for its tensors are "
              "not the model's own", flush=True)  # fmt: skip
    llm = load_llm(folder, attn=attn, dropout=dropout)
    if adapt is not None:
        adapt(llm)
        lora.draw(llm.named_parameters(), draw_adapter)
    rms = token_rms(llm)
    layerwise_init.partition_all(llm, partition)
    return llm, distributed.broadcast(rms)


def draw_llm(
    folder: Path,
    seed: int,
    partition: Partition | None,
    *,
    attn: str,
    dropout: float,
    adapt: Adapt | None = None,
    draw_adapter: DrawAdapter | None = None,
) -> tuple[PreTrainedModel, float]:
    """A model of the folder's config.json with weights drawn from ``seed``; its `token_rms`.

    Each layer is drawn as transformers initializes it. Without ``partition`` the model is whole, of
    the same values. Torch's global random state is left as it was. Collective with ``partition``.
    """
    llm = _on_meta(folder, attn, dropout, adapt)
    fill_buffers(llm)
    owners: dict[int, PreTrainedModel] = {}
    for module in llm.modules():
        if isinstance(module, PreTrainedModel):
            owners |= {id(layer): module for layer in module.modules()}
    rms, embeddings = 0.0, llm.get_input_embeddings()

    def fill_layer(layer: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        nonlocal rms
        if not lora.draw(parameters.items(), draw_adapter):
            owners[id(layer)]._init_weights(layer)
        if layer is embeddings:
            rms = embedding_rms(layer)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layerwise_init.materialize(llm, fill_layer, partition)
    rms = distributed.broadcast(rms) if partition is not None else rms
    return llm, rms * abs(input_scale(llm))


def _on_meta(folder: Path, attn: str, dropout: float, adapt: Adapt | None) -> PreTrainedModel:
    with torch.device("meta"):
        llm = load_llm(folder, attn=attn, dropout=dropout, weights=False)
        if adapt is not None:
            adapt(llm)
    return llm
