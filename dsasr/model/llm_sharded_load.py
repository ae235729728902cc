"""A language model whose weights are cut as they come: read tensor by tensor, or drawn at random.

The model is built on the meta device from its config, LoRA's matrices included; each layer then
gets its weights from the folder's safetensors files, a tensor at a time (`layerwise_init`).
Values are those of `load_llm`, which holds the model whole.

Where a folder's tensors are not the model's one by one (transformers renames or joins those of some
architectures, and unpacks quantized ones), it is loaded whole and then cut; `in_pieces` tells.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from dsasr.model import layerwise_init, lora
from dsasr.model.layerwise_init import Cut
from dsasr.model.llm import load_llm, read_llm_config
from dsasr.utils import distributed
from dsasr.utils.errors import UserError

Adapt = Callable[[PreTrainedModel], None]  # puts LoRA's layers in
DrawAdapter = Callable[[str, tuple[int, ...]], Tensor]  # a matrix, by name


class TensorFiles:
    """The tensors of a Hugging Face folder by name, in one safetensors file or in several."""

    def __init__(self, folder: Path):
        """Raises `UserError` for an index or a file that cannot be read."""
        self.folder = folder
        self._files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in self._paths():
            try:
                with safe_open(path, framework="pt") as file:
                    for name in list(file.keys()):
                        self._files[name] = path
                        self.shapes[name] = tuple(file.get_slice(name).get_shape())
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path} cannot be read: {error}") from None

    def _paths(self) -> list[Path]:
        index = self.folder / "model.safetensors.index.json"
        if not index.is_file():
            whole = self.folder / "model.safetensors"
            return [whole] if whole.is_file() else []
        try:
            held = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = sorted({Path(name).name for name in held.values()})
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{index} cannot be read: {error}") from None
        for name in names:
            if not (self.folder / name).is_file():
                raise UserError(
                    f"the language model in {self.folder} lacks {name}: copy or download it again"
                )
        return [self.folder / name for name in names]

    def read(self, name: str, into: Tensor) -> None:
        """Fill ``into`` with the tensor. The file is mapped no longer than that takes."""
        with safe_open(self._files[name], framework="pt") as file:
            into.copy_(file.get_tensor(name))


def in_pieces(llm: PreTrainedModel, files: TensorFiles) -> dict[str, str] | None:
    """The model's parameters and persistent buffers → the files' names of them; None where they are
    not the same tensors. ``llm`` may be on the meta device and have LoRA's layers."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping

        # add_legacy: renamings of gamma and beta, which leave other names alone.
        if get_model_conversion_mapping(llm, add_legacy=False):
            return None
    except ImportError:
        pass  # an older transformers, which converts nothing
    if getattr(llm.config, "quantization_config", None) is not None:
        return None
    tied: dict[int, list[tuple[str, Tensor]]] = {}
    for name, tensor in _state(llm):
        tied.setdefault(id(tensor), []).append((name, tensor))
    places: dict[str, str] = {}
    for aliases in tied.values():
        plain = [lora.plain_name(name) for name, _ in aliases]
        found = [n for n in plain if files.shapes.get(n) == tuple(aliases[0][1].shape)]
        if not found:
            return None
        places |= {name: found[0] for name, _ in aliases}
    return places


def _state(llm: nn.Module):
    """Parameters (tied ones by every name) and persistent buffers, without LoRA's matrices."""
    for name, parameter in llm.named_parameters(remove_duplicate=False):
        if not lora.is_adapter(name):
            yield name, parameter
    for path, layer in llm.named_modules():
        for name, buffer in layer._buffers.items():
            if buffer is not None and name not in layer._non_persistent_buffers_set:
                yield f"{path}.{name}" if path else name, buffer


def load_in_slices(
    folder: Path,
    cut: Cut,
    *,
    attn: str,
    dropout: float,
    adapt: Adapt | None = None,
    draw_adapter: DrawAdapter | None = None,
) -> tuple[PreTrainedModel, float]:
    """`load_llm` with ``adapt`` applied, and the root mean square of its token embeddings.

    No rank holds more than its slices and one layer's own parameters. Raises as `load_llm` does, on
    all ranks. Collective.
    """
    config = read_llm_config(folder, dropout)
    files = TensorFiles(folder)
    llm = _on_meta(config, attn, adapt)
    places = distributed.broadcast(in_pieces(llm, files))
    if places is None:
        return _whole(folder, cut, attn, dropout, adapt, draw_adapter)
    _fill_buffers(llm, files, places)

    def draw(_layer: nn.Module, fresh: Mapping[str, nn.Parameter]) -> None:
        for name, parameter in fresh.items():
            if name in places:
                files.read(places[name], parameter)
            else:
                parameter.copy_(draw_adapter(name, tuple(parameter.shape)))

    rms = 0.0
    if distributed.is_main_rank():
        embeddings = llm.get_input_embeddings().weight
        name = next(n for n, p in llm.named_parameters() if p is embeddings)
        # Before the model's own copy of them is there, and squared in place: one tensor at a time.
        values = torch.empty(embeddings.shape)
        files.read(places[name], values)
        rms = float(values.square_().mean().sqrt())
        del values
    layerwise_init.fill(llm, draw, cut)
    return llm.eval(), distributed.broadcast(rms)


def _whole(folder, cut, attn, dropout, adapt, draw_adapter) -> tuple[PreTrainedModel, float]:
    if distributed.is_main_rank():
        print(f"{folder}: each rank loads it whole before it is cut, for its tensors are not the "
              "model's own", flush=True)  # fmt: skip
    llm = load_llm(folder, attn=attn, dropout=dropout)
    if adapt is not None:
        adapt(llm)
        _draw_adapters(dict(lora.adapters(llm)), draw_adapter)
    rms = float(llm.get_input_embeddings().weight.detach().float().square().mean().sqrt())
    layerwise_init.partition_all(llm, cut)
    return llm, distributed.broadcast(rms)


def _draw_adapters(fresh: Mapping[str, nn.Parameter], draw: DrawAdapter) -> None:
    for name, parameter in fresh.items():
        parameter.data.copy_(draw(name, tuple(parameter.shape)))


def draw_at_random(
    folder: Path,
    seed: int,
    cut: Cut | None,
    *,
    attn: str,
    dropout: float,
    adapt: Adapt | None = None,
    draw_adapter: DrawAdapter | None = None,
) -> tuple[PreTrainedModel, float]:
    """The model of config.json alone, its weights drawn from ``seed``, each layer by its own rule.

    Also gives the root mean square of its token embeddings. Without ``cut`` the model is whole, of
    the same values. Torch's global random state is left as it was.
    """
    llm = _on_meta(read_llm_config(folder, dropout), attn, adapt)
    _fill_buffers(llm)
    owners: dict[int, PreTrainedModel] = {}
    for module in llm.modules():
        if isinstance(module, PreTrainedModel):
            owners |= {id(layer): module for layer in module.modules()}
    rms, embeddings = 0.0, llm.get_input_embeddings()

    def draw(layer: nn.Module, fresh: Mapping[str, nn.Parameter]) -> None:
        nonlocal rms
        drawn = {n: p for n, p in fresh.items() if lora.is_adapter(n)}
        if drawn:
            _draw_adapters(drawn, draw_adapter)
        else:
            owners[id(layer)]._init_weights(layer)
        if layer is embeddings:
            rms = float(layer.weight.detach().float().square().mean().sqrt())

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layerwise_init.fill(llm, draw, cut)
    return llm, distributed.broadcast(rms) if cut is not None else rms


def _on_meta(config: PretrainedConfig, attn: str, adapt: Adapt | None) -> PreTrainedModel:
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=attn
        )
        if adapt is not None:
            adapt(llm)
    return llm


def _fill_buffers(
    llm: PreTrainedModel,
    files: TensorFiles | None = None,
    places: Mapping[str, str] | None = None,
) -> None:
    """Buffers of a model on the meta device: tables by the layers' own rules, the rest from files.

    As transformers does it: with every weight marked as done, initializing fills buffers alone.
    """
    for parameter in llm.parameters():
        parameter._is_hf_initialized = True
    for layer in llm.modules():
        layer._is_hf_initialized = False
        for name, buffer in layer._buffers.items():
            if buffer is not None and buffer.is_meta:
                layer._buffers[name] = torch.empty_like(buffer, device="cpu")
    llm.initialize_weights()
    for path, layer in llm.named_modules():
        for name, buffer in layer._buffers.items():
            full = f"{path}.{name}" if path else name
            if buffer is not None and places and full in places:
                files.read(places[full], buffer)
