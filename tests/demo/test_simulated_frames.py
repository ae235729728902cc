import torch

from dsasr.demo.simulated_frames import HALF, LEAD, LONGEST, RATES, SimulatedFrames


def test_each_unit_is_in_one_half_of_one_frame_in_order():
    torch.manual_seed(0)
    adaptor = SimulatedFrames(4, 1.0, units=6)
    units = torch.tensor([[1, 2, 3, 4, 5], [5, 5, 0, 0, 0]])
    inputs, lengths = adaptor.read_units(units, torch.tensor([5, 2]))
    assert inputs.shape == (2, int(lengths.max()), 12) and lengths.device.type == "cpu"
    assert inputs.sum((1, 2)).tolist() == [5, 2]  # padding is in no frame
    frame_of = [int(inputs[0, :, [u, u + 6]].sum(1).argmax()) for u in range(1, 6)]
    assert frame_of == sorted(frame_of)
    assert inputs[1, :, [5, 11]].sum() == 2 and not inputs[1, int(lengths[1]) :].any()
    longest = 2 + (LEAD + RATES[1] * LONGEST * 5) / (2 * HALF)
    assert lengths.min() >= 1 and lengths.max() <= longest
    # An embedding is that of the units in the frame, each half by its own table.
    embeds, _ = adaptor(inputs, lengths)
    torch.testing.assert_close(embeds, inputs @ adaptor.table)


def test_durations_differ_between_utterances():
    adaptor = SimulatedFrames(4, 1.0, units=6)
    units = torch.full((64, 20), 3)
    _, lengths = adaptor.read_units(units, torch.full((64,), 20))
    mean = float(lengths.double().mean())
    assert len(set(lengths.tolist())) > 5
    # 20 units of 0.1 s at a mean rate of 1.025, after 0.1 s: 2.15 s, and half a frame at the end.
    assert abs(mean - (2.15 / 0.16 + 0.5)) < 1.5
