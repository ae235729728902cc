"""The statistics that a CTC head takes out of an encoder's frames."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import torch

from dsasr.data.batch import Batch
from dsasr.model.ctc import CtcHead, CtcHeadConfig
from dsasr.model.encoders.conformer import Encoder, EncoderConfig
from dsasr.training import frame_statistics


def engine_of(layers: int) -> SimpleNamespace:
    """What `measure` asks of a branch's engine, around an encoder and a head."""
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(width=8, layers=1, heads=2, ffn=8, kernel=3, mels=8))
    encoder.blocks[-1].norm.weight.data[3] = 40.0  # a channel far larger than the others
    module = SimpleNamespace(encoder=encoder, ctc=CtcHead(8, 5, CtcHeadConfig(layers=layers)))

    @contextmanager
    def evaluating():
        encoder.eval()
        with torch.no_grad():
            yield module

    return SimpleNamespace(module=module, evaluating=evaluating)


def batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    made = [
        Batch.blank(
            torch.randn(len(lengths), max(lengths), 8, generator=generator),
            feature_lengths_B=torch.tensor(lengths),
            keys=tuple(map(str, lengths)),
        )
        for lengths in ([40, 13, 27], [61])
    ]
    return [*made, Batch.blank(torch.zeros(0, 0, 8))]


def test_each_channel_has_mean_0_and_deviation_1_over_all_valid_frames():
    engine = engine_of(layers=1)
    assert frame_statistics.measure(engine, batches())
    encoder, head = engine.module.encoder, engine.module.ctc
    frames = []
    with torch.no_grad():
        for batch in batches()[:2]:
            output = encoder(batch.features_BTF, batch.feature_lengths_B)
            frames += [f[:n] for f, n in zip(output.frames_BSE, output.lengths_B, strict=True)]
    frames_NE = torch.cat(frames).double()
    assert frames_NE.std(0)[3] > 20 * frames_NE.std(0)[0]
    torch.testing.assert_close(head.frame_mean_E.double(), frames_NE.mean(0), rtol=1e-5, atol=1e-5)
    deviation_E = frames_NE.std(0, correction=0)
    torch.testing.assert_close(head.frame_std_E.double(), deviation_E, rtol=1e-5, atol=1e-5)
    standardized_NE = head._standardized(frames_NE.float())
    torch.testing.assert_close(standardized_NE.std(0, correction=0), torch.ones(8))


def test_a_step_without_utterances_leaves_them_to_the_next_one():
    engine = engine_of(layers=1)
    assert not frame_statistics.measure(engine, batches()[2:])
    assert not engine.module.ctc.frame_std_E.any() and not engine.module.ctc.frame_mean_E.any()
    assert frame_statistics.measure(engine, batches())
    assert bool((engine.module.ctc.frame_std_E > 0).all())


def test_a_head_that_has_statistics_keeps_them():
    engine = engine_of(layers=1)
    engine.module.ctc.frame_std_E.fill_(2.0)
    assert frame_statistics.measure(engine, batches())
    assert bool((engine.module.ctc.frame_std_E == 2).all())
    assert not engine.module.ctc.frame_mean_E.any()


def test_without_convolutions_or_statistics_frames_are_left_as_they_are():
    linear = engine_of(layers=0)
    frame_statistics.measure(linear, batches())
    assert "frame_std_E" not in linear.module.ctc.state_dict()
    head, frames_BSE = CtcHead(8, 5, CtcHeadConfig(layers=2)), torch.randn(2, 7, 8)
    assert torch.equal(head._standardized(frames_BSE), frames_BSE)
