"""FLOPs against torch's counter on modules, and against numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3Config, Qwen3ForCausalLM

from dsasr.kernels import reference
from dsasr.kernels.adaptor import AdaptorWeights
from dsasr.model import lora
from dsasr.model.adaptors.protocol import AdaptorConfig, build_adaptor
from dsasr.model.ctc import CtcHead
from dsasr.model.encoders.conformer import Encoder, EncoderConfig
from dsasr.model.lora import LoraConfig
from dsasr.planning import flops
from dsasr.planning.model_parts import adaptor_cost, encoder_cost, head_cost
from dsasr.planning.module_cost import ModuleCost

CONVOLUTIONS = ("convolution", "convolution_backward")


def counted(run) -> tuple[int, int]:
    """(all, convolutions alone) as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        run()
    by = {str(op).split(".")[-1]: n for op, n in counter.get_flop_counts()["Global"].items()}
    return counter.get_total_flops(), sum(by.get(name, 0) for name in CONVOLUTIONS)


@pytest.fixture(scope="module")
def lm():
    shape = Qwen3Config(
        vocab_size=41, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=6, tie_word_embeddings=True,
    )  # fmt: skip
    shape._attn_implementation = "eager"
    return Qwen3ForCausalLM(shape)


def conformer(cfg: EncoderConfig) -> ModuleCost:
    with torch.device("meta"):
        return encoder_cost(Encoder(replace(cfg, layers=2)), cfg.layers)


@pytest.mark.parametrize("frames", [33, 70, 8])
def test_encoder(frames):
    cfg = EncoderConfig(
        width=12,
        layers=2,
        heads=2,
        ffn=20,
        kernel=5,
        conv_expansion=2,
        mels=15,
        subsample_channels=3,
    )
    encoder, features = Encoder(cfg), torch.randn(3, frames, 15)
    lengths = torch.full((3,), frames)
    out = []
    forward, convolved = counted(lambda: out.append(encoder(features, lengths).frames_BSE))
    part = conformer(cfg).flops(frames).times(3)
    assert part.forward == forward
    # torch counts the gradient of a depthwise convolution as if it were a dense one.
    whole, of_convolutions = counted(lambda: out[0].sum().backward())
    work = flops.step_flops({"encoder": part}, ["encoder"])["encoder"]
    assert work.forward == forward
    assert work.backward - (2 * convolved - part.entry) == whole - of_convolutions
    assert part.entry == 2 * 3 * ((frames + 1) // 2) * 7 * 9 * 3


def test_lora_in_the_encoder():
    """Alone it needs the blocks' backward pass, but not the front end's."""
    cfg = EncoderConfig(width=12, layers=3, heads=2, ffn=20, kernel=5, mels=15)
    encoder, features, lengths = Encoder(cfg), torch.randn(3, 33, 15), torch.full((3,), 33)
    front = counted(lambda: encoder.subsampling(features, lengths, False))
    matrices = LoraConfig(rank=2)
    adapters = lora.count(encoder, matrices)
    lora.inject(encoder, matrices)
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(lora.is_adapter(name))
    out = []
    forward, convolved = counted(lambda: out.append(encoder(features, lengths).frames_BSE))
    parts = {
        "encoder": conformer(cfg).flops(33).times(3),
        "encoder_lora": flops.encoder_lora(adapters, [9] * 3),
    }
    assert sum(part.forward for part in parts.values()) == forward
    assert parts["encoder"].front == front[0]
    whole, of_convolutions = counted(lambda: out[0].sum().backward())
    work = flops.step_flops(parts, ["encoder_lora"])
    depthwise = convolved - front[1]
    backward = sum(part.backward for part in work.values())
    assert backward - depthwise == whole - of_convolutions
    # Frozen beside an encoder that trains, gradients pass through the matrices.
    joint = flops.step_flops(parts, ["encoder"])
    assert joint["encoder_lora"].backward == parts["encoder_lora"].forward
    assert not flops.step_flops(parts | {"ctc": flops.PartFlops(1.0)}, ["ctc"])["encoder"].backward


def test_ctc_and_the_encoder_below_it():
    ctc, frames = CtcHead(12, 7), torch.randn(2, 5, 12, requires_grad=True)
    lengths = torch.tensor([5, 5])
    with torch.device("meta"):
        part = head_cost(CtcHead(12, 7), 12).flops(5).times(2)
    assert part.forward == counted(lambda: ctc(frames, lengths))[0] == 2 * 10 * 12 * 7
    assert counted(lambda: ctc(frames, lengths).sum().backward())[0] == 3 * part.forward
    parts = {"encoder": conformer(EncoderConfig()).flops(100), "ctc": part}
    # With a frozen encoder only the head's weights have a gradient.
    head_only = flops.step_flops(parts, ["ctc"])
    assert head_only["encoder"].backward == 0 and head_only["ctc"].backward == part.linear
    both = flops.step_flops(parts, ["encoder", "ctc"], recomputed=["encoder"])
    assert both["ctc"].backward == 2 * part.linear
    assert both["encoder"].recomputed == parts["encoder"].forward == both["encoder"].forward


@pytest.mark.parametrize("trained_below", [True, False])
def test_adaptor(trained_below):
    frames = torch.randn(2, 9, 6, requires_grad=trained_below)
    shapes = ((10, 24), (10,), (8, 10), (8,))
    weights = [torch.randn(shape, requires_grad=True) for shape in shapes]
    lengths = torch.tensor([9, 8])

    def run():
        # All stacks of both utterances: 3 and, padded, 3.
        reference.adaptor_padded(frames, lengths, AdaptorWeights(*weights, 4))[0].sum().backward()

    with torch.device("meta"):
        cost = adaptor_cost(build_adaptor(AdaptorConfig(stack=4, hidden=10), 6, 8), 6)
    parts = {"encoder": conformer(EncoderConfig()).flops(36), "adaptor": cost.flops(9).times(2)}
    trains = ["encoder", "adaptor"] if trained_below else ["adaptor"]
    assert counted(run)[0] == flops.step_flops(parts, trains)["adaptor"].needed
    assert cost.flops(8).forward == 2 * 2 * (24 * 10 + 10 * 8)


@pytest.mark.parametrize("trained_below", [True, False])
@pytest.mark.parametrize("settings", [
    {"kind": "mlp", "stack": 3, "hidden": 10},
    {"kind": "conv", "stack": 6, "hidden": 10},
    {"kind": "conv", "stack": 5},
    {"kind": "qformer", "stack": 4, "heads": 2},
    {"kind": "qformer", "stack": 6, "hidden": 12, "heads": 3, "queries": 3, "layers": 3},
])  # fmt: skip
def test_adaptors_of_every_kind(settings, trained_below):
    cfg = AdaptorConfig(**settings)
    adaptor = build_adaptor(cfg, 6, 8)
    frames, lengths = torch.randn(2, 13, 6, requires_grad=trained_below), torch.tensor([13, 13])
    with torch.device("meta"):
        part = adaptor_cost(build_adaptor(cfg, 6, 8), 6).flops(13).times(2)
    parts = {"ctc": flops.PartFlops(0.0), "adaptor": part}
    trains = ["ctc", "adaptor"] if trained_below else ["adaptor"]
    assert counted(lambda: adaptor(frames, lengths, packed=True))[0] == part.forward
    run = counted(lambda: adaptor(frames, lengths, packed=True)[0].sum().backward())
    assert run[0] == flops.step_flops(parts, trains)["adaptor"].needed
    assert 0 < part.entry < part.linear


@pytest.mark.parametrize("trained", [True, False])
def test_language_model_and_head(lm, trained):
    """Through a frozen language model, gradients pass to the embeddings (align)."""
    shape = flops.LlmShape.of(lm)
    assert (shape.layers, shape.attention_width, shape.width, shape.vocab) == (3, 24, 16, 41)
    lm.requires_grad_(trained)
    embeds = torch.randn(2, 11, 16, requires_grad=True)

    def run():
        hidden = lm.base_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        (hidden.flatten(0, 1)[:7] @ lm.lm_head.weight.T).sum().backward()

    parts = {
        "adaptor": flops.PartFlops(1.0),
        "llm": flops.llm(shape, [11, 11], causal=False),
        "head": flops.head(shape, 7),
    }
    trains = ["adaptor", "llm"] if trained else ["adaptor"]
    work = flops.step_flops(parts, trains, recomputed=["llm"])
    assert counted(run)[0] == work["llm"].needed + work["head"].needed
    assert work["llm"].recomputed == parts["llm"].forward
    assert work["head"].recomputed == 0


def test_causal_attention_counts_visible_pairs(lm):
    shape = flops.LlmShape.of(lm)
    seen = torch.ones(9, 9).tril().sum() + torch.ones(4, 4).tril().sum()
    part = flops.llm(shape, [9, 4])
    assert part.attention == 4 * 3 * 24 * seen and part.linear == 2 * shape.linear * 13


def test_the_papers_size():
    """Six operations a parameter and position, roughly, and attention on top."""
    cfg = EncoderConfig(width=1280, layers=16, heads=20, ffn=5120, kernel=33)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Encoder(cfg).parameters())
    part = conformer(cfg).flops(800)
    work = flops.step_flops({"encoder": part}, ["encoder"])["encoder"]
    assert work.needed == pytest.approx(6 * parameters * 200, rel=0.06)
    assert part.attention / part.forward == pytest.approx(0.013, abs=0.003)
    assert part.times(3) == part + part + part
