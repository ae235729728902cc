"""Floating-point operations (FLOPs) of a training step by part, as the mathematics needs them.

The language model is counted here, by formula; encoder, CTC head and adaptor by running their
shapes (`dsasr.planning.module_cost`). Products and convolutions count, 2 for each multiplication
and addition; norms, activations, softmaxes, losses and the optimizer (below one percent at the
sizes that matter) do not. Lengths are those of the utterances, so padding does not count, but for
an encoder's own (``model.encoder.pad_to``). In causal attention a position sees (L + 1) / 2
positions on average, itself included; dynamic chunks count as full context (1% of an encoder's
FLOPs at 8 s).

Model FLOP utilization as PaLM has it (arXiv 2204.02311, appendix B), with less counted (**ours**:
no padding, no unseen pair, no gradient that no parameter needs):

    MFU = Σ_parts (forward + backward) / (seconds · peak FLOP/s)

``recomputed`` is what activation checkpointing computes again; the machine does it, but MFU does
not count it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields

from torch import nn

from dsasr.model.lora import BASE, is_adapter


@dataclass(frozen=True)
class PartFlops:
    """FLOPs of a part's forward pass."""

    linear: float  # products with weights
    attention: float = 0.0  # products of activations with each other
    entry: float = 0.0  # the share of ``linear`` that reads the part's input
    front: float = 0.0  # the share of ``linear`` before the layers that LoRA adapts
    fixed: float = 0.0  # products of the part's input with numbers that need no gradient

    @property
    def forward(self) -> float:
        return self.linear + self.attention + self.fixed

    def times(self, factor: float) -> PartFlops:
        """FLOPs of ``factor`` times as many utterances."""
        return PartFlops(*(getattr(self, item.name) * factor for item in fields(self)))

    def __add__(self, other: PartFlops) -> PartFlops:
        names = [item.name for item in fields(self)]
        return PartFlops(*(getattr(self, name) + getattr(other, name) for name in names))


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one part in one step."""

    forward: float
    backward: float
    recomputed: float  # by activation checkpointing

    @property
    def needed(self) -> float:
        return self.forward + self.backward


@dataclass(frozen=True)
class LlmShape:
    """What the FLOPs of a causal language model depend on."""

    linear: int  # weights in the linear layers of all blocks, without the head
    layers: int
    attention_width: int  # heads · head width
    width: int
    vocab: int
    adapters: int = 0  # weights in LoRA matrices

    @classmethod
    def of(cls, llm: nn.Module) -> LlmShape:
        """Of a Hugging Face causal LM, on any device, partitioned or not."""
        config, head = llm.config.get_text_config(), llm.get_output_embeddings()
        heads = config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        products = {
            f"{n}.weight": m.in_features * m.out_features
            for n, m in llm.base_model.named_modules()
            if isinstance(m, nn.Linear)
        }
        adapters = sum(size for name, size in products.items() if is_adapter(name))
        return cls(
            linear=sum(products.values()) - adapters,
            adapters=adapters,
            layers=config.num_hidden_layers,
            attention_width=heads * size,
            width=head.in_features,
            vocab=head.out_features,
        )


def llm(shape: LlmShape, lengths: Sequence[float], causal: bool = True) -> PartFlops:
    """The language model's layers on sequences of ``lengths`` positions each."""
    pairs = sum(n * (n + 1) / 2 if causal else n * n for n in lengths)
    attention = 4.0 * shape.layers * shape.attention_width * pairs
    return PartFlops(2.0 * shape.linear * sum(lengths), attention)


def lora(shape: LlmShape, lengths: Sequence[float]) -> PartFlops:
    """The LoRA matrices in the layers, on sequences of ``lengths`` positions each."""
    return PartFlops(2.0 * shape.adapters * sum(lengths))


def encoder_lora(adapters: int, frames: Sequence[float]) -> PartFlops:
    """LoRA matrices of ``adapters`` weights in the encoder's blocks, on utterances of ``frames``
    encoder frames each."""
    return PartFlops(2.0 * adapters * sum(frames))


def head(shape: LlmShape, targets: float) -> PartFlops:
    """The language model's head at ``targets`` positions."""
    return PartFlops(2.0 * targets * shape.width * shape.vocab)


def step_flops(
    parts: Mapping[str, PartFlops], trains: Collection[str], recomputed: Collection[str] = ()
) -> dict[str, StepFlops]:
    """FLOPs of a step by part.

    ``parts`` in order from the input on; ``recomputed``: parts whose layers are checkpointed.

    The backward pass ends at the first part that is trained. The gradient of a weight costs its
    product once more where the part is trained; the gradient of an input costs it once more unless
    nothing below needs it. The head belongs to the language model. LoRA (``encoder_lora``,
    ``lora``) stands where the model does that it adapts: where it trains, that model's backward
    pass runs, down to the layers that are adapted.
    """
    names = list(parts)
    trained = {name: name in trains or (name == "head" and "llm" in trains) for name in names}
    place = {name: names.index(BASE.get(name, name)) for name in names}
    first = min((place[name] for name in names if trained[name]), default=len(names))
    step = {}
    for name, part in parts.items():
        backward = again = 0.0
        if place[name] >= first:
            inputs, below = part.linear, place[name] > first
            if not below:
                inputs -= part.entry if trained[name] else part.front
            backward = 2 * part.attention + inputs + (part.linear if trained[name] else 0.0)
            backward += part.fixed if below else 0.0
            again = part.forward if name in recomputed else 0.0
        step[name] = StepFlops(part.forward, backward, again)
    return step
