"""A language model with a table of positions: no sequence is longer than the table."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from dsasr.data.batch import Batch
from dsasr.model.adaptors.protocol import AdaptorConfig, build_adaptor
from dsasr.model.ctc import CtcHead
from dsasr.model.encoders.conformer import Encoder, EncoderConfig
from dsasr.model.llm import LlmConfig
from dsasr.model.speech_llm import SpeechLLM

POSITIONS, UNITS, WIDTH = 24, 7, 16


@pytest.fixture
def model() -> SpeechLLM:
    """Its CTC head, as drawn, writes a unit for nearly every one of 50 frames."""
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(width=WIDTH, layers=1, heads=2, ffn=32, kernel=3, mels=20))
    gpt2 = GPT2Config(vocab_size=40, n_positions=POSITIONS, n_embd=WIDTH, n_layer=1, n_head=2)
    adaptor = build_adaptor(AdaptorConfig(kind="ctc"), WIDTH, WIDTH, units=UNITS)
    head = CtcHead(WIDTH, UNITS)
    head.project.weight.data.mul_(30)
    parts = encoder, adaptor, GPT2LMHeadModel(gpt2), (3, 4), (5,), 0, LlmConfig("lm")
    return SpeechLLM(*parts, ctc=head)


@pytest.fixture
def batch() -> Batch:
    features = torch.randn(2, 200, 20, generator=torch.Generator().manual_seed(1))
    tokens = torch.tensor([[7, 8, 9, 10, 2], [7, 2, 0, 0, 0]])
    return Batch.blank(
        features, tokens_BU=tokens, token_lengths_B=torch.tensor([5, 2]), durations=(2.0, 2.0)
    )


def test_units_beyond_the_positions_are_left_out(model, batch):
    units = model._speech(batch).lengths_B
    assert int(units.min()) > POSITIONS
    outputs = model(batch)
    assert torch.isfinite(outputs.loss_sum)
    outputs.loss_sum.backward()
    fitted = model._fitted(model._speech(batch), model._prompts_of(batch), torch.tensor([5, 2]))
    assert fitted.lengths_B.tolist() == [POSITIONS - 3 - 5, POSITIONS - 3 - 2]


def test_a_prompt_leaves_room_for_a_transcript(model, batch):
    prompts = model.eval().prompts(batch)
    assert prompts.lengths_B.tolist() == [POSITIONS - POSITIONS // 4] * 2
