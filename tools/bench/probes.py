"""The time of a phoneme probe: PAI of synthetic frames, without and with the shuffled control.

OMP_NUM_THREADS=2 python tools/bench/probes.py
python tools/bench/probes.py --frames 1000000 --width 1024 --device cuda

``--signal`` is the standard deviation of the phonemes' means over that of a direction: with 0.05 a
linear probe of 256 directions resolves 6% of the phonemes' entropy, with 0.1 28%.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time

import torch
from common import record

from dsasr.entropy_allocation.frame_set import FrameSet
from dsasr.entropy_allocation.pai_csai import VInformationConfig, pai
from dsasr.utils.errors import run_tool

UTTERANCE_FRAMES = 250  # ten seconds


def frames(count: int, width: int, phonemes: int, signal: float, device: str) -> FrameSet:
    """Correlated Gaussian frames around a mean per phoneme, of 40 speakers."""
    generator = torch.Generator().manual_seed(0)
    label_N = torch.randint(1, phonemes, (count,), generator=generator)
    means_PD = signal * torch.randn(phonemes, width, generator=generator)
    mixing_DD = torch.randn(width, width, generator=generator) / width**0.5
    x_ND = (means_PD[label_N] + torch.randn(count, width, generator=generator)) @ mixing_DD
    utterance_N = torch.arange(count) // UTTERANCE_FRAMES
    speakers = tuple(f"s{u % 40}" for u in range(int(utterance_N[-1]) + 1))
    columns = (x_ND, label_N, label_N[:, None], torch.zeros_like(label_N), utterance_N)
    return FrameSet(*columns, speakers).to(device)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=200_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--phonemes", type=int, default=60)
    parser.add_argument("--signal", type=float, default=0.1)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    data = frames(args.frames, args.width, args.phonemes, args.signal, args.device)
    for control in (False, True):
        config = VInformationConfig(
            max_frames=args.frames, max_width=args.width, control=control, draws=200
        )
        started, before = time.monotonic(), _cpu()
        estimate = pai(data, config)
        record(
            "probes", frames=args.frames, width=args.width, phonemes=args.phonemes,
            signal=args.signal, control=control, share=round(estimate.share, 4),
            seconds=round(time.monotonic() - started, 2), cpu_seconds=round(_cpu() - before, 2),
        )  # fmt: skip
    return 0


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    sys.exit(run_tool(main))
