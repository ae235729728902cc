"""Floating-point operations of a training step by part: what the mathematics asks for.

Products and convolutions count, 2 for each multiplication and addition; norms, activations,
softmaxes, losses and the optimizer (below one percent at the sizes that matter) do not. Lengths are
the utterances' own, so padding is no work. In causal attention a position sees (L + 1) / 2 others
on average, itself counted; dynamic chunks count as full context (1% of an encoder's work at 8 s).

Model FLOP utilization as PaLM has it (arXiv 2204.02311, appendix B), with less counted (**ours**:
no padding, no unseen pair, no gradient that no parameter needs):

    MFU = Σ_parts (forward + backward) / (seconds · peak FLOP/s)

``recomputed`` is what activation checkpointing and the fused head do again; it is work of the
machine's, and no part of MFU.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from dsasr.model.encoders.conformer import EncoderConfig
from dsasr.model.lora import is_adapter


@dataclass(frozen=True)
class Part:
    """Forward work of a part. ``linear``: products with weights; ``attention``: of activations with
    each other; ``entry``: of ``linear``, what reads the part's own input."""

    linear: float
    attention: float = 0.0
    entry: float = 0.0

    @property
    def forward(self) -> float:
        return self.linear + self.attention

    def times(self, factor: float) -> Part:
        """The work of ``factor`` times as many utterances."""
        return Part(self.linear * factor, self.attention * factor, self.entry * factor)


@dataclass(frozen=True)
class Work:
    """Of one part in one step."""

    forward: float
    backward: float
    recomputed: float

    @property
    def needed(self) -> float:
        return self.forward + self.backward


@dataclass(frozen=True)
class LlmShape:
    """``linear``: weights in the linear layers of all blocks, the head not counted; ``adapters``:
    those in LoRA matrices beside them."""

    linear: int
    layers: int
    attention_width: int  # heads · head width
    width: int
    vocab: int
    adapters: int = 0

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


def encoder(cfg: EncoderConfig, frames: Sequence[float]) -> Part:
    """Of utterances of so many feature frames each."""
    linear = attention = entry = 0.0
    channels, width, inner = cfg.subsample_channels, cfg.width, cfg.width * cfg.conv_expansion
    mels1 = (cfg.mels - 1) // 2
    mels2 = (mels1 - 1) // 2
    ffn = 2 * (2 * width * cfg.ffn)
    projections = 4 * width * width
    convolution = 3 * width * inner + cfg.kernel * inner
    block = 2 * (ffn + projections + convolution)
    for length in frames:
        half, quarter = (length + 1) // 2, (length + 3) // 4
        first = 2 * half * mels1 * 9 * channels
        second = 2 * quarter * mels2 * 9 * channels * channels
        project = 2 * quarter * mels2 * channels * width
        entry += first
        linear += first + second + project + cfg.layers * quarter * block
        attention += cfg.layers * 4 * quarter * quarter * width
    return Part(linear, attention, entry)


def ctc(width: int, vocab: int, frames: Sequence[float]) -> Part:
    """The phoneme head, of utterances of so many feature frames each."""
    work = 2.0 * width * vocab * sum((length + 3) // 4 for length in frames)
    return Part(work, entry=work)


def adaptor(stack: int, width: int, hidden: int, out: int, frames: Sequence[float]) -> Part:
    """Of utterances of so many feature frames each; a last, partial stack counts whole."""
    stacks = sum(-(-((length + 3) // 4) // stack) for length in frames)
    entry = 2.0 * stacks * stack * width * hidden
    return Part(entry + 2.0 * stacks * hidden * out, entry=entry)


def llm(shape: LlmShape, lengths: Sequence[float], causal: bool = True) -> Part:
    """The layers, of sequences of so many positions each."""
    pairs = sum(n * (n + 1) / 2 if causal else n * n for n in lengths)
    attention = 4.0 * shape.layers * shape.attention_width * pairs
    return Part(2.0 * shape.linear * sum(lengths), attention)


def lora(shape: LlmShape, lengths: Sequence[float]) -> Part:
    """LoRA matrices in the layers, of sequences of so many positions each."""
    return Part(2.0 * shape.adapters * sum(lengths))


def head(shape: LlmShape, targets: float) -> Part:
    """The LM head, at so many targets."""
    return Part(2.0 * targets * shape.width * shape.vocab)


def step(
    parts: Mapping[str, Part], trains: Collection[str], recomputed: Collection[str] = ()
) -> dict[str, Work]:
    """Work of a step; ``parts`` from the input on, ``recomputed``: those whose layers checkpoint.

    The backward pass ends at the first part that is trained. A weight's gradient costs its product
    once more where the part is trained, its input's gradient once more unless nothing below needs
    it. The head is the language model's, and makes its product again in the backward pass. LoRA
    matrices (``lora``) stand before the language model: where they train, its backward pass runs.
    """
    names = list(parts)
    trained = {name: name in trains or (name == "head" and "llm" in trains) for name in names}
    first = min((i for i, name in enumerate(names) if trained[name]), default=len(names))
    found = {}
    for place, (name, part) in enumerate(parts.items()):
        backward = again = 0.0
        if place >= first:
            inputs = part.linear - (part.entry if place == first else 0.0)
            backward = 2 * part.attention + inputs + (part.linear if trained[name] else 0.0)
            again = part.forward if name in recomputed or name == "head" else 0.0
        found[name] = Work(part.forward, backward, again)
    return found
