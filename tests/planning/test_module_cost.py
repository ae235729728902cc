"""Counts on the meta device against torch's counter and autograd's hooks on real modules."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from dsasr.model.encoders.conformer import Encoder, EncoderConfig
from dsasr.model.encoders.pretrained import PretrainedEncoderConfig, build_encoder
from dsasr.planning.memory import conformer_values
from dsasr.planning.model_parts import encoder_cost

FAMILIES = runpy.run_path(
    str(Path(__file__).parents[1] / "model" / "encoders" / "conftest.py"), run_name="families"
)["TINY"]


@pytest.fixture(params=FAMILIES)
def family(request, tmp_path) -> str:
    AutoConfig.for_model(request.param, **FAMILIES[request.param]).save_pretrained(tmp_path)
    return request.param


def built(folder, **options):
    return build_encoder(folder, PretrainedEncoderConfig(str(folder), **options))


def cost_of(folder, blocks, **options):
    with torch.device("meta"):
        return encoder_cost(built(folder, layers=2, **options), blocks)


def computed(encoder, rows):
    return encoder(torch.randn(1, rows, encoder.bins), torch.tensor([rows]))


def lengths(encoder) -> tuple[int, ...]:
    return (3999, 5000) if encoder.front_end.kind == "wave" else (33, 70)


@pytest.mark.parametrize("options", [{}, {"pad_to": 0.8}, {"layer_sum": True}])
def test_flops_are_those_that_torch_counts(family, tmp_path, options):
    encoder = built(tmp_path, **options).eval()
    cost = cost_of(tmp_path, len(encoder.blocks), **(options | {"layer_sum": False}))
    for rows in lengths(encoder):
        # torch does not count the fused attention of a CPU.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as seen:
            computed(encoder, rows)
        part = cost.flops(rows)
        assert part.forward == seen.get_total_flops()
        assert part.entry < part.linear and part.attention > 0
        # A norm with weights stands before its first product.
        assert (part.entry == 0) == (family == "wav2vec2-bert")


def test_saved_bytes_are_those_that_autograd_keeps(family, tmp_path):
    encoder = built(tmp_path, dropout=0.1).train()
    cost = cost_of(tmp_path, len(encoder.blocks), dropout=0.1)
    own = {x.untyped_storage()._cdata for x in [*encoder.parameters(), *encoder.buffers()]}
    rows, kept = lengths(encoder)[0], {}

    def pack(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = computed(encoder, rows)
    actual = sum(storage.nbytes() for key, storage in kept.items() if key not in own)
    outside, inside = cost.saved(rows, float32=True, cpu=True)
    assert outside + len(encoder.blocks) * inside == pytest.approx(actual, rel=0.03)
    assert result.frames_BSE.requires_grad


@pytest.fixture
def whisper(tmp_path):
    AutoConfig.for_model("whisper", **FAMILIES["whisper"]).save_pretrained(tmp_path)
    return tmp_path


def test_on_a_gpu_attention_saves_no_weights_and_dropout_bytes(whisper):
    cost = cost_of(whisper, 3, dropout=0.1)
    short, long = (cost.saved(rows, float32=False, cpu=False)[1] for rows in (400, 800))
    assert long == pytest.approx(2 * short, rel=0.02)
    on_cpu = [cost.saved(rows, float32=False, cpu=True)[1] for rows in (400, 800)]
    assert on_cpu[1] > 3 * on_cpu[0] > 3 * short
    wide = cost.saved(800, float32=True, cpu=False)[1]
    assert long < wide < 2 * long  # masks are bytes, statistics float32, in both


def test_a_checkpointed_encoder_costs_the_same(whisper):
    plain = cost_of(whisper, 3).flops(100)
    assert cost_of(whisper, 3, activation_checkpointing=True).flops(100) == plain


@pytest.mark.parametrize("float32", [True, False])
def test_the_conformers_formula_is_what_its_layers_save(float32):
    """Above 512 frames, where it takes fused attention on every machine."""
    cfg, rows = EncoderConfig(width=64, layers=3, heads=4, ffn=256, kernel=5), 2400
    with torch.device("meta"):
        cost = encoder_cost(Encoder(replace(cfg, layers=2)), cfg.layers)
    _, layer = conformer_values(cfg, float32, cpu=False, length=rows // 4)
    _, inside = cost.saved(rows, float32, cpu=False)
    assert inside == pytest.approx((4 if float32 else 2) * layer * rows // 4, rel=0.1)
