"""A training step never makes the host wait for the device.

Device "meta" stands for a GPU: it computes nothing, so whatever needs a value of it (`item`,
`nonzero`, a copy to the host, a boolean index) raises. Copies to it are counted if they block.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3Config, Qwen3ForCausalLM, masking_utils

from dsasr.data.audio.augment import SpecAugmentConfig
from dsasr.data.batch import Batch, upload
from dsasr.model.adaptors.mlp import MlpAdaptor
from dsasr.model.adaptors.protocol import AdaptorConfig
from dsasr.model.ctc_model import CtcModel, CtcModelConfig
from dsasr.model.dynamic_chunks import ChunkConfig
from dsasr.model.encoders.conformer import Encoder, EncoderConfig
from dsasr.model.llm import LlmConfig
from dsasr.model.speech_llm import SpeechLLM

ENCODER = {"width": 16, "layers": 2, "heads": 2, "ffn": 32, "kernel": 5, "mels": 12}
CHUNKS = ChunkConfig(full_share=0.0, max_size=6)
STAGES = {
    "align": ("adaptor",),
    "ia_sft": ("adaptor", "llm"),
    "joint": ("encoder", "adaptor", "llm"),
}


class BlockingCopies(TorchDispatchMode):
    """Counts the copies to the device that wait for it, and shows which stages copied at all."""

    def __init__(self):
        super().__init__()
        self.copies, self.blocking = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = str(func)
        source = args[1] if name.startswith("aten.copy_") else args[0] if args else None
        copied = name.startswith(("aten._to_copy", "aten.copy_")) and source.device.type == "cpu"
        if copied and out.device.type == "meta":
            self.copies += 1
            non_blocking = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
            if not non_blocking:
                self.blocking.append(f"{name} {tuple(source.shape)}")
        return out


def batch(count: int = 4) -> Batch:
    frames = torch.tensor((70, 52, 17, 33)[:count], dtype=torch.int64)
    tokens = torch.tensor((6, 1, 3, 4)[:count], dtype=torch.int64)
    return Batch.blank(
        torch.randn(count, 70 if count else 0, 12),
        feature_lengths_B=frames,
        phonemes_BP=torch.ones(count, 4, dtype=torch.int64),
        tokens_BU=torch.ones(count, 6, dtype=torch.int64),
        token_lengths_B=tokens,
        keys=tuple(map(str, range(count))),
        seed=3,
    )


def step(model, cpu_batch: Batch) -> BlockingCopies:
    """One whole step on the device, all but DeepSpeed's part of it."""
    trained = [p for p in model.parameters() if p.requires_grad]
    model.train()
    with BlockingCopies() as copies:
        outputs = model(cpu_batch.to("meta"))
        outputs.loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        sums = {}
        for name, (total, count) in outputs.sums.items():
            sums[name] = (0.0 + total, 0.0 + count)  # as `BranchEngine.step` and the monitor do
    assert outputs.loss.device.type == "meta" and sums
    assert all(p.grad is not None for p in trained)
    return copies


@pytest.mark.parametrize("utterances", [4, 0], ids=["batch", "empty"])
@pytest.mark.parametrize("consistency", [0.2, 0.0], ids=["cr_ctc", "ctc"])
def test_pretraining_waits_for_nothing(monkeypatch, utterances, consistency):
    def ctc(log_probs_SBP, phonemes_BP, frames_B, counts_B, **_):
        # torch has no such loss on this device. On a GPU it would copy lengths that lie there.
        assert frames_B.device.type == counts_B.device.type == "cpu"
        assert phonemes_BP.device.type == "meta"
        return log_probs_SBP[..., 0].sum(0)

    monkeypatch.setattr(F, "ctc_loss", ctc)
    chunks, spec = CHUNKS, SpecAugmentConfig()
    with torch.device("meta"):
        encoder = Encoder(EncoderConfig(**ENCODER, activation_checkpointing=True))
        model = CtcModel(encoder, 9, CtcModelConfig(consistency, spec=spec, chunks=chunks))
    copies = step(model, batch(utterances))
    assert copies.copies and not copies.blocking


def speech_llm(stage: str, pack: int, device: str) -> SpeechLLM:
    shape = Qwen3Config(
        vocab_size=41, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device(device):
        model = SpeechLLM(
            Encoder(EncoderConfig(**ENCODER)),
            MlpAdaptor(AdaptorConfig(hidden=10), 16, 16),
            Qwen3ForCausalLM(shape),
            [1, 2], [3], 0, LlmConfig(pack=pack, activation_checkpointing=True),
            SpecAugmentConfig(), CHUNKS,
        )  # fmt: skip
    for part in ("encoder", "adaptor", "llm"):
        getattr(model, part).requires_grad_(part in STAGES[stage])
    return model.train()


@pytest.mark.parametrize("pack", [0, 64], ids=["rows", "packed"])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("utterances", [4, 0], ids=["batch", "empty"])
def test_fine_tuning_waits_for_nothing(monkeypatch, stage, pack, utterances):
    if not pack:  # a check of transformers that waits, of rows with an utterance each
        monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda _: None)
    model = speech_llm(stage, pack, "meta")
    copies = step(model, batch(utterances))
    assert copies.copies and not copies.blocking


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("stage", STAGES)
def test_fine_tuning_waits_for_nothing_on_a_gpu(stage):
    """torch itself raises at every wait that it knows of."""
    model, cpu_batch = speech_llm(stage, 64, "cuda"), batch()
    model(
        cpu_batch.to("cuda")
    ).loss.backward()  # compiles the kernels, creates the libraries' handles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(cpu_batch.to("cuda")).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_device_shows_what_waits():
    x = torch.ones(3, device="meta")
    waits = (x.sum().item, x.nonzero, x.cpu, x.tolist, lambda: x[x > 0], lambda: bool(x[0] > 0))
    for wait in waits:
        with pytest.raises((RuntimeError, NotImplementedError)):
            wait()
    with BlockingCopies() as copies:
        torch.ones(2).to("meta")
        torch.empty(2, device="meta").copy_(torch.ones(2))
        upload(torch.ones(2), "meta")
    assert copies.copies == 3 and len(copies.blocking) == 2


def test_a_batch_remembers_where_it_came_from():
    cpu_batch = batch()
    assert cpu_batch.host is cpu_batch
    meta_batch = cpu_batch.to("meta")
    assert meta_batch.host is cpu_batch and meta_batch.to("meta").host is cpu_batch
    changed_batch = dataclasses.replace(meta_batch, seed=4)
    assert changed_batch.host is cpu_batch and changed_batch.features_BTF.device.type == "meta"
