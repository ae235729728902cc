"""LoRA: low-rank matrices trained beside frozen weights (arXiv 2106.09685).

    y = W·x + alpha / rank · B·A·dropout(x)        A: [rank, in], B: [out, rank], B = 0 at first

The recipe's ``model.lora`` injects them into the language model, ``model.encoder_lora`` into the
encoder of both branches; a stage trains them as its part ``lora`` or ``encoder_lora``, instead of
``llm`` or ``encoder``. The layers are the library peft's. Choices made here:

- They are injected in place. A wrapper would hide the model from code that needs its base model,
  its embeddings or its head.
- peft names the weight that it wraps ``X.base_layer.weight``. In checkpoints and snapshots it is
  ``X.weight``, as without LoRA (`plain_name`); beside it lie ``X.lora_A.default.weight`` and
  ``X.lora_B.….weight``.
- Each matrix is drawn from a generator of its own, seeded by its name: the same on every rank, for
  any world size and partitioning.
- The head and the embeddings are refused: the fused loss reads the head's weight, not its output,
  and the embeddings are usually the same tensor. In an encoder only its blocks are adapted.
- Matrices that are no linear layer's cannot be adapted, such as experts that transformers keeps in
  one tensor. Where a model has those, "all layers" is refused, and `coverage` says the share of
  those that are named.
- An export is merged, W + alpha / rank · B·A in float32, and is a plain model again.

A stage with other parts than ``lora`` keeps the matrices frozen but in use. The mean of checkpoints
is one of A and of B, not of their product; for checkpoints of one run the two are close.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dsasr.config import nearest
from dsasr.model.encoders.protocol import Encoder
from dsasr.utils import ranges
from dsasr.utils.errors import UserError
from dsasr.utils.ranges import Dropout, PositiveFloat, Range

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BASE = {"lora": "llm", "encoder_lora": "encoder"}  # part of a stage → the model that it adapts
Adapt = Callable[[nn.Module], None]  # injects LoRA's layers
DrawAdapter = Callable[[str, tuple[int, ...]], Tensor]  # name, shape → a matrix
_ADAPTER = "default"  # peft's name for the only one
_WEIGHT, _A, _B = ".weight", f".lora_A.{_ADAPTER}.weight", f".lora_B.{_ADAPTER}.weight"


@dataclass(frozen=True)
class LoraConfig:
    """``targets``: the linear layers of the model's blocks, by the last part of their names
    (q_proj …); empty: all of them. The sum is weighed by alpha / rank."""

    rank: Annotated[int, Range(1, 65_536)] = 16  # rank of the matrices; at least 1
    alpha: PositiveFloat = 32.0  # the sum is scaled by alpha / rank
    dropout: Dropout = 0.0  # dropout of the input of A, in training
    # linear layers of the blocks, by the last part of their names (q_proj, …); empty: all of them
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        ranges.check(self)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


# -- injection -----------------------------------------------------------------------------------


def targeted(model: PreTrainedModel | Encoder, cfg: LoraConfig) -> dict[str, nn.Linear]:
    """Name → linear layer that ``cfg`` adapts, of a model without LoRA yet, on any device.

    Raises `UserError` for a target that is no such layer.
    """
    encoder = isinstance(model, Encoder)
    linear = _encoder_layers(model) if encoder else _llm_layers(model)
    key, what = ("model.encoder_lora", "encoder") if encoder else ("model.lora", "language model")
    kinds = sorted({name.rpartition(".")[2] for name in linear})
    if not kinds:
        instead = "encoder" if encoder else "llm"
        raise UserError(
            f"{key}: the {what} has no linear layer to adapt; give {key}=null and stages that "
            f"train '{instead}' whole"
        )
    for target in cfg.targets:
        if target not in kinds:
            raise UserError(
                f"{key}.targets: '{target}' is none of the linear layers of the {what}'s blocks "
                f"that can be adapted ({', '.join(kinds)}){nearest(target, kinds)}"
            )
    targets = cfg.targets or tuple(kinds)
    if not encoder and not cfg.targets and (stacked := _stacked_matrices(model)):
        name, share = stacked
        raise UserError(
            f"{key}: {share:.0%} of the weights of the language model's blocks are stacked in one "
            f"tensor for several experts or heads ({name}), which LoRA does not reach: name the "
            f"linear layers in {key}.targets ({', '.join(kinds)})"
        )
    return {name: m for name, m in linear.items() if name.rpartition(".")[2] in targets}


def _llm_layers(llm: PreTrainedModel) -> dict[str, nn.Linear]:
    base, head = llm.base_model, llm.get_output_embeddings()
    prefix = "" if base is llm else f"{llm.base_model_prefix}."
    return {
        f"{prefix}{name}": module
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }


def _block_matrices(llm: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Name in the base model → parameter of two dimensions or more, but for embeddings and head."""
    head = llm.get_output_embeddings()
    return {
        f"{path}.{name}" if path else name: parameter
        for path, module in llm.base_model.named_modules()
        if not isinstance(module, nn.Embedding) and module is not head
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.ndim >= 2
    }


def _stacked_matrices(llm: PreTrainedModel) -> tuple[str, float] | None:
    """The name of a tensor of several matrices, and the share of such of the blocks' weights."""
    matrices = _block_matrices(llm)
    convolutions = {
        id(m.weight) for m in llm.base_model.modules() if isinstance(m, nn.Conv1d | nn.Conv2d)
    }
    stacked = {n: p for n, p in matrices.items() if p.ndim >= 3 and id(p) not in convolutions}
    if not stacked:
        return None
    total = sum(parameter.numel() for parameter in matrices.values())
    return next(iter(stacked)), sum(parameter.numel() for parameter in stacked.values()) / total


def coverage(llm: PreTrainedModel, cfg: LoraConfig) -> str:
    """A line for people: what ``cfg`` adapts of a language model without LoRA."""
    layers = targeted(llm, cfg)
    total = sum(parameter.numel() for parameter in _block_matrices(llm).values())
    adapted = sum(layer.weight.numel() for layer in layers.values())
    kinds = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
    return (
        f"LoRA adapts {len(layers)} linear layers ({kinds}): {adapted / total:.1%} of the weights "
        "of the language model's blocks"
    )


def _encoder_layers(encoder: Encoder) -> dict[str, nn.Linear]:
    """Those of its blocks, but for layers that do not run by their own forward."""
    return {
        name: module
        for name, module in encoder.blocks.named_modules()
        if isinstance(module, nn.Linear)
        and name.rpartition(".")[2] not in encoder.read_past_forward
    }


def count(model: PreTrainedModel | Encoder, cfg: LoraConfig) -> int:
    """The parameters that ``cfg`` adds to a model without LoRA."""
    return sum(cfg.rank * (m.in_features + m.out_features) for m in targeted(model, cfg).values())


def inject(model: PreTrainedModel | Encoder, cfg: LoraConfig, meta: bool = False) -> None:
    """Inject the layers into ``model``; `initial` draws their values. ``meta``: without memory."""
    config = _peft_config(cfg, targeted(model, cfg))
    encoder = isinstance(model, Encoder)
    try:
        _peft().inject_adapter_in_model(
            config, model.blocks if encoder else model, _ADAPTER, low_cpu_mem_usage=meta
        )
    except (ValueError, NotImplementedError) as error:  # architectures that peft leaves alone
        key = "model.encoder_lora" if encoder else "model.lora"
        raise UserError(f"{key}: peft refuses this model: {' '.join(str(error).split())}") from None
    if encoder:
        model.blocks[0].register_forward_pre_hook(_require_input_gradient)


def _require_input_gradient(block: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Before an encoder's first block, where the matrices train and nothing before them does:
    DeepSpeed 0.19 releases the weights of a layer whose input needs no gradient before its backward
    pass has used them."""
    if torch.is_grad_enabled() and not inputs[0].requires_grad and any(
        parameter.requires_grad for parameter in block.parameters()
    ):  # fmt: skip
        inputs[0].requires_grad_()


def check(model: PreTrainedModel | Encoder, cfg: LoraConfig) -> None:
    """Raise `UserError` where `inject` would; ``model``, on the meta device, is left as it was."""
    inject(copy.deepcopy(model), cfg, meta=True)


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise UserError("LoRA needs the library peft: pip install 'dsasr[lora]'") from None
    return peft


def _peft_config(cfg: LoraConfig, layers: Mapping[str, Any], base: str | None = None) -> Any:
    return _peft().LoraConfig(
        r=cfg.rank,
        lora_alpha=int(cfg.alpha) if cfg.alpha == int(cfg.alpha) else cfg.alpha,
        lora_dropout=cfg.dropout,
        target_modules=sorted({name.rpartition(".")[2] for name in layers}),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
    )


def initial(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A matrix's initial value: A uniform in ±1/√in, as in peft, B zero; float32."""
    matrix = torch.zeros(shape)
    if is_adapter(name) and name.endswith(_A):
        bound = 1 / math.sqrt(shape[1])
        matrix.uniform_(-bound, bound, generator=generator)
    return matrix


# -- names and parts -----------------------------------------------------------------------------


def plain_name(name: str) -> str:
    """A parameter's name in files: that of the model without LoRA."""
    return name.replace(".base_layer.", ".")


def is_adapter(name: str) -> bool:
    """Whether a weight of that name is an A or a B."""
    return name.endswith((_A, _B))


def adapters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Name → A or B, of all in ``module``."""
    return ((name, p) for name, p in module.named_parameters() if is_adapter(name))


def draw(named: Iterable[tuple[str, nn.Parameter]], draw_adapter: DrawAdapter) -> bool:
    """Give the matrices among ``named`` parameters, which are whole, the values of
    ``draw_adapter``; returns whether there are any."""
    matrices = [(name, parameter) for name, parameter in named if is_adapter(name)]
    for name, parameter in matrices:
        parameter.data.copy_(draw_adapter(name, tuple(parameter.shape)))
    return bool(matrices)


def part(module: nn.Module, name: str) -> list[nn.Parameter]:
    """The parameters of a model's part. ``lora``: the matrices in its ``llm``; ``llm``: the rest
    of it; so with ``encoder_lora``; ``layer_sum``: the weights of the sum over the encoder's
    blocks, which are among those of ``encoder`` too. Empty where the model has no such part."""
    if name == "layer_sum":
        weights = getattr(getattr(module, "encoder", None), "layer_weights", None)
        return [] if weights is None else [weights]
    child = getattr(module, BASE.get(name, name), None)
    if child is None:
        return []
    return [p for n, p in child.named_parameters() if is_adapter(n) == (name in BASE)]


class Dropouts:
    """The dropouts before the As in ``module``, which the mode of ``module`` does not decide.

    A stage that trains the model itself keeps its matrices frozen, and without dropout.
    """

    def __init__(self, module: nn.Module):
        named = list(module.named_modules())
        # Modules, for weights are replaced when they are drawn.
        self._layers = [
            m for n, m in named if n.endswith((f"lora_A.{_ADAPTER}", f"lora_B.{_ADAPTER}"))
        ]
        self._dropouts = [
            m for n, m in named if n.endswith(f"lora_dropout.{_ADAPTER}")
            and isinstance(m, nn.Dropout)
        ]  # fmt: skip

    def train(self, mode: bool) -> None:
        """On in training where the matrices train."""
        mode = mode and any(layer.weight.requires_grad for layer in self._layers)
        for dropout in self._dropouts:
            dropout.training = mode


# -- export --------------------------------------------------------------------------------------


def factors(name: str) -> tuple[str, str]:
    """The names of A and B of the weight ``name``, whether there are any or not."""
    layer = name.removesuffix(_WEIGHT)
    return layer + _A, layer + _B


def merged(weight_OI: Tensor, a_RI: Tensor, b_OR: Tensor, cfg: LoraConfig) -> Tensor:
    """W + alpha / rank · B·A, in float32 at least."""
    dtype = torch.promote_types(weight_OI.dtype, torch.float32)
    return torch.addmm(weight_OI.to(dtype), b_OR.to(dtype), a_RI.to(dtype), alpha=cfg.scale)


def save_adapter(
    folder: Path, cfg: LoraConfig, matrices: Mapping[str, Tensor], base: str | None = None
) -> None:
    """Write a folder that ``PeftModel.from_pretrained`` loads.

    ``matrices``: name in ``llm`` → A or B; ``base``: the language model that training started from.
    """
    folder.mkdir()
    layers = {name.removesuffix(_A) for name in matrices if name.endswith(_A)}
    config = _peft_config(cfg, dict.fromkeys(layers), base)
    config.inference_mode = True
    config.save_pretrained(str(folder))
    named = {f"base_model.model.{n.replace(f'.{_ADAPTER}.', '.')}": t for n, t in matrices.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
