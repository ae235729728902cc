"""Adaptors: from encoder frames to embeddings in the language model's space.

mlp      ``stack`` consecutive frames concatenated, then two linear layers (the paper's)
conv     strided convolutions over time, then a linear layer
qformer  learned queries that attend to a window of ``stack`` frames (SALMONN, arXiv 2310.13289)
ctc      the embedding expected under the CTC head's posterior (LegoSLM, arXiv 2505.11352)
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

import torch
from torch import Tensor

from dsasr.data.batch import upload
from dsasr.model.encoders.protocol import valid_frames
from dsasr.utils import ranges
from dsasr.utils.errors import UserError
from dsasr.utils.ranges import PositiveFloat, Range

# Root mean square of activation(x) for x ~ N(0, 1).
ACTIVATION_RMS = {"gelu": 0.6521, "silu": 0.5968, "relu": 0.7071}
CLASSES = {
    "mlp": ("mlp", "MlpAdaptor"),
    "conv": ("conv", "ConvAdaptor"),
    "qformer": ("qformer", "QformerAdaptor"),
    "ctc": ("ctc", "CtcAdaptor"),
}
# Keys that only some kinds have.
_ONLY = {
    "stack": ("mlp", "conv", "qformer"),
    "hidden": ("mlp", "conv", "qformer"),
    "activation": ("mlp", "conv"),
    "layers": ("qformer",),
    "heads": ("qformer",),
    "queries": ("qformer",),
    "temperature": ("ctc",),
    "merge": ("ctc",),
    "frames": ("ctc",),
}


@dataclass(frozen=True)
class AdaptorConfig:
    """The adaptor's kind, and the settings of that kind."""

    # mlp: stacked frames through two layers; conv: strided convolutions; qformer: queries that
    # attend to windows of frames; ctc: embeddings expected under the CTC posterior
    kind: Literal["mlp", "conv", "qformer", "ctc"] = "mlp"
    # encoder frames of one speech token; qformer: of one window, which gives `queries` tokens
    stack: Annotated[int, Range(1, 1024)] = 4
    # inner width (not of ctc); 0: the language model's width
    hidden: Annotated[int, Range(0, 1 << 20)] = 0
    activation: str = "gelu"  # mlp, conv: gelu, silu or relu
    layers: Annotated[int, Range(1, 1024)] = 2  # qformer: layers of attention and feed-forward
    # qformer: attention heads; must divide the inner width
    heads: Annotated[int, Range(1, 1024)] = 8
    # qformer: speech tokens of one window; must divide stack
    queries: Annotated[int, Range(1, 1024)] = 1
    temperature: PositiveFloat = 1.0  # ctc: of the posterior; below 1 sharper, above 1 flatter
    # ctc: one speech token for each unit that CTC writes; false: one for each encoder frame
    merge: bool = True
    frames: bool = False  # ctc: add a learned projection of the encoder's frames, zero at first

    def __post_init__(self) -> None:
        ranges.check(self)
        if self.activation not in ACTIVATION_RMS:
            raise UserError(
                f"adaptor activation {self.activation!r}: choose one of {', '.join(ACTIVATION_RMS)}"
            )
        if self.kind == "qformer" and self.stack < 2:
            raise UserError(
                "model.adaptor: a qformer needs a stack of at least 2: of one frame there is "
                "nothing to choose; give model.adaptor.kind=mlp"
            )
        if self.kind == "qformer" and self.stack % self.queries:
            raise UserError(
                f"model.adaptor: a window of stack={self.stack} frames cannot give "
                f"queries={self.queries} speech tokens of equally many frames: choose a multiple"
            )
        for name, kinds in _ONLY.items():
            default = type(self).__dataclass_fields__[name].default
            if self.kind not in kinds and getattr(self, name) != default:
                raise UserError(
                    f"model.adaptor.{name} has no effect on an adaptor of kind {self.kind}: leave "
                    f"it out, or give model.adaptor.kind={' or '.join(kinds)}"
                )

    @property
    def reads_ctc(self) -> bool:
        """Whether the adaptor reads the CTC head's posterior instead of the encoder's frames."""
        return self.kind == "ctc"

    @property
    def frames_per_token(self) -> int | None:
        """Encoder frames of one speech token; None where the audio decides.

        A last window of a qformer gives all its tokens however few frames it has.
        """
        if self.reads_ctc:
            return None if self.merge else 1
        return self.stack // self.queries


class Adaptor(Protocol):
    """Inputs [B, S, E] to embeddings; an utterance's embeddings do not depend on its batch."""

    cfg: AdaptorConfig

    def output_lengths(self, lengths_B: Tensor) -> Tensor:
        """Embeddings that inputs of ``lengths_B`` frames give."""

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the module's own weights anew, not those of layers inside it."""

    def __call__(
        self,
        frames_BSE: Tensor,
        lengths_B: Tensor,
        packed: bool = False,
        out_LD: Tensor | None = None,
        index_N: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Embeddings [B, A, D], zero where padded, or ``packed`` [N, D]; and their lengths_B.

        With ``out_LD`` the valid embeddings are written to its rows ``index_N`` in place, and it is
        returned. With lengths on the CPU the host does not wait for a GPU.
        """


def build_adaptor(
    cfg: AdaptorConfig, width: int, out_width: int, scale: float = 1.0, units: int = 0
) -> Adaptor:
    """The adaptor that ``cfg`` describes, from an encoder of ``width`` to embeddings of
    ``out_width``.

    ``scale``: the root mean square that the embeddings start with, that of the language model's
    token embeddings (**ours**). ``units``: of the CTC head, blank included; of kind ctc only.
    """
    module, name = CLASSES[cfg.kind]
    cls = getattr(importlib.import_module(f"dsasr.model.adaptors.{module}"), name)
    extra = (units,) if cfg.reads_ctc else ()
    return cls(cfg, width, out_width, scale, *extra)


def pack(frames_BSE: Tensor, lengths_B: Tensor) -> Tensor:
    """The valid frames [N, E], utterance by utterance.

    N depends on the lengths: where they lie on a GPU, the host waits for it.
    """
    valid_BS = valid_frames(lengths_B.cpu(), frames_BSE.shape[1])
    rows_N = upload(valid_BS.flatten().nonzero().squeeze(1), frames_BSE.device)
    return frames_BSE.flatten(0, 1).index_select(0, rows_N)


def deliver(
    embeds_ND: Tensor,
    lengths_B: Tensor,
    slots: int,
    packed: bool,
    out_LD: Tensor | None,
    index_N: Tensor | None,
) -> Tensor:
    """Packed embeddings of ``lengths_B`` in the form that a caller of `Adaptor` asks for.

    ``slots``: A, of the padded form.
    """
    if out_LD is not None:
        return out_LD.index_copy_(0, index_N, embeds_ND.to(out_LD.dtype))
    return embeds_ND if packed else padded(embeds_ND, valid_frames(lengths_B, slots))


def padded(embeds_ND: Tensor, valid_BA: Tensor) -> Tensor:
    """Packed embeddings [N, D] → [B, A, D], zero where ``valid_BA`` is False."""
    rows = embeds_ND.new_zeros(valid_BA.numel(), embeds_ND.shape[1])
    index_N = valid_BA.flatten().nonzero().squeeze(1).to(embeds_ND.device)
    return rows.index_copy(0, index_N, embeds_ND).view(*valid_BA.shape, -1)
