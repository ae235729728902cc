"""Weights of pretrained encoders: read from safetensors tensor by tensor, or drawn at random.

The encoder is built on the meta device; each layer then gets its weights, and with ``partition``
leaves each rank its own slices before the next layer's turn, so that no rank has the encoder whole.
Tensors are found by name, wherever the encoder is inside the folder's model (``model.encoder.…`` of
a Whisper, ``wav2vec2.…`` of a CTC model). LoRA's matrices are drawn.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from dsasr.model import layerwise_init, lora
from dsasr.model.encoders.pretrained import (
    PretrainedEncoder,
    PretrainedEncoderConfig,
    build_encoder,
)
from dsasr.model.encoders.whisper import Positions
from dsasr.model.hf_weights import TensorFiles, check_present, fill_buffers
from dsasr.model.layerwise_init import Partition
from dsasr.model.lora import Adapt, DrawAdapter
from dsasr.utils.errors import UserError

# Names of older checkpoints → today's in transformers.
_NORM = ".parametrizations.weight."
LEGACY = {
    f"{_NORM}original0": ".weight_g",
    f"{_NORM}original1": ".weight_v",
}


def load_encoder(
    folder: Path,
    cfg: PretrainedEncoderConfig,
    seed: int = 0,
    partition: Partition | None = None,
    *,
    adapt: Adapt | None = None,
    draw_adapter: DrawAdapter | None = None,
) -> PretrainedEncoder:
    """The encoder of a Hugging Face folder, in float32; ``seed`` draws what is not read.

    ``adapt`` injects LoRA's layers, whose matrices ``draw_adapter`` draws.
    Collective with ``partition``. Raises `UserError` for a folder that is none, of an unknown
    family, without safetensors, or whose tensors are not the encoder's.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with torch.device("meta"):
            encoder = build_encoder(folder, cfg)
            if adapt is not None:
                adapt(encoder)
        source = _Source(folder, encoder) if cfg.weights else None
        _fill_tables(encoder, source)
        layerwise_init.materialize(encoder, _Drawer(encoder, source, draw_adapter), partition)
    return encoder


def check_weights(folder: Path, encoder: PretrainedEncoder) -> None:
    """Raise `UserError` if the folder lacks the weights of ``encoder``, which may be on the meta
    device: for a check before anything is built."""
    _Source(folder, encoder)


class _Source:
    """Where each tensor of an encoder stands in a folder's safetensors files."""

    def __init__(self, folder: Path, encoder: PretrainedEncoder):
        self.files = TensorFiles(folder)
        check_present(self.files)
        self.folder = folder
        self.prefix = self._prefix(encoder.anchor)
        self._check(encoder)

    def _prefix(self, anchor: str) -> str:
        names = [n for n in self.files.shapes if n == anchor or n.endswith(f".{anchor}")]
        # An encoder's, where a decoder or a second tower has layers of the same name.
        names.sort(key=lambda name: ("decoder" in name, "encoder" not in name, len(name)))
        if not names:
            raise UserError(f"{self.folder} holds no weights of its encoder: there is no {anchor}")
        return names[0][: -len(anchor)]

    def _check(self, encoder: PretrainedEncoder) -> None:
        missing, reshaped = [], []
        for name, tensor in encoder.model.state_dict(keep_vars=True).items():
            if lora.is_adapter(name):
                continue
            name = lora.plain_name(name)
            if self.has(name):
                found = self.shape(name)
                if found != tuple(tensor.shape):
                    reshaped.append(f"{name} {list(found)}, not {list(tensor.shape)}")
            else:
                missing.append(name)
        if missing or reshaped:
            what = f"lacks {missing[0]}" if missing else f"has {reshaped[0]}"
            more = len(missing) + len(reshaped) - 1
            raise UserError(
                f"{self.folder} {what}{f' (and {more} more)' if more else ''}: its weights are not "
                "those of its config.json"
            )

    def _name(self, name: str) -> str | None:
        for candidate in (name, *(name.replace(new, old) for new, old in LEGACY.items())):
            if self.prefix + candidate in self.files.shapes:
                return self.prefix + candidate
        return None

    def _halves(self, name: str) -> tuple[str, str] | None:
        """Direction and length of a weight-normalized convolution that is one weight here."""
        if not name.endswith("conv.weight"):
            return None
        stem = name.removesuffix(".weight")
        halves = [self._name(f"{stem}{_NORM}original{i}") for i in (1, 0)]
        return tuple(halves) if all(halves) else None

    def has(self, name: str) -> bool:
        return self._name(name) is not None or self._halves(name) is not None

    def shape(self, name: str) -> tuple[int, ...]:
        return self.files.shapes[self._name(name) or self._halves(name)[0]]

    def read(self, name: str, into: Tensor) -> None:
        """Fill ``into`` with the encoder's tensor of this name."""
        if (stored := self._name(name)) is not None:
            self.files.read(stored, into)
            return
        direction, length = self._halves(name)
        into_length = torch.empty(self.files.shapes[length])
        self.files.read(direction, into)
        self.files.read(length, into_length)
        dims = [d for d in range(into.dim()) if into_length.shape[d] == 1]
        into.mul_(into_length / into.norm(dim=dims, keepdim=True))


class _Drawer:
    """Fills a layer's parameters: from the source, or by the layers' own rules."""

    def __init__(
        self,
        encoder: PretrainedEncoder,
        source: _Source | None,
        draw_adapter: DrawAdapter | None,
    ):
        self.encoder, self.source, self.draw_adapter = encoder, source, draw_adapter

    def __call__(self, layer: nn.Module, fresh: Mapping[str, nn.Parameter]) -> None:
        if lora.draw(fresh.items(), self.draw_adapter):
            return
        for name, parameter in fresh.items():
            inner = lora.plain_name(name.removeprefix("model."))
            if name == "layer_weights":
                parameter.zero_()
            elif self.source is not None and self.source.has(inner):
                self.source.read(inner, parameter)
            else:
                self.encoder.model._init_weights(layer)
                return


def _fill_tables(encoder: PretrainedEncoder, source: _Source | None) -> None:
    """Buffers, on every rank: tables by the layers' own rules, stored ones from the source."""
    fill_buffers(encoder.model)
    for path, layer in encoder.model.named_modules():
        for name, buffer in layer._buffers.items():
            full = f"{path}.{name}" if path else name
            if buffer is not None and source is not None and source.has(full):
                source.read(full, buffer)
    if source is None:
        for layer in encoder.modules():
            if isinstance(layer, Positions):
                layer.reset_table()
