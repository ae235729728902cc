"""How often CSAI is "found" where the encoder tells nothing of words but through phonemes.

python tools/experiments/csai_nulls.py [--nulls 200] [--utterances 50 150 400] [--kinds phoneme]

Writes results/csai_nulls.md; rows of other kinds and sizes that are there stay. Needs no trained
encoder: utterances of random words of a random lexicon, with features of two kinds. ``phoneme``:
the frame's phoneme and noise. ``window``: a nonlinear layer over the phonemes around it, an offset
of the utterance, and noise that is correlated from frame to frame, as an encoder's frames are.
Given the phonemes of the window both are independent of the word, so that whatever is found is a
false positive. Each null has a lexicon, utterances, features and a split of its own.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from dsasr.entropy_allocation.allocation_row import Estimate
from dsasr.entropy_allocation.frame_set import FrameSet, FrameSetBuilder
from dsasr.entropy_allocation.pai_csai import VInformationConfig, csai
from dsasr.utils.errors import UserError, run_tool
from dsasr.utils.io import atomic_write

OUT = Path(__file__).parent / "results" / "csai_nulls.md"
WORDS, PHONEMES, WINDOW, WIDTH, SPEAKERS = 120, 24, 2, 16, 16
KINDS = ("phoneme", "window")
ROWS = tuple(f"| {kind} |" for kind in KINDS)


def speech(utterances: int, seed: int) -> FrameSet:
    """Labeled frames without features: 4 words an utterance, the rarer ones as by Zipf's law."""
    rng = np.random.default_rng(seed)
    lexicon = [rng.integers(1, PHONEMES, rng.integers(1, 5)).tolist() for _ in range(WORDS)]
    odds = 1 / np.arange(1, WORDS + 1)
    builder = FrameSetBuilder(WINDOW)
    for u in range(utterances):
        spoken = rng.choice(WORDS, 4, p=odds / odds.sum()).tolist()
        phonemes = [p for word in spoken for p in lexicon[word]]
        of_phoneme = torch.tensor([word for word in spoken for _ in lexicon[word]])
        lengths = rng.integers(1, 3, len(phonemes))  # frames of each phoneme
        positions_S = torch.from_numpy(np.repeat(np.arange(len(phonemes)), lengths))
        x_SE = torch.zeros(len(positions_S), 1)
        builder.add(x_SE, positions_S, phonemes, of_phoneme[positions_S], f"s{u % SPEAKERS}")
    return builder.build()


def features(data: FrameSet, kind: str, seed: int) -> torch.Tensor:
    """Features [N, E] of one of `KINDS`, independent of the words given the windows."""
    generator = torch.Generator().manual_seed(seed)
    noise_NE = torch.randn(len(data), WIDTH, generator=generator)
    if kind == "phoneme":
        table = 2 * torch.randn(PHONEMES, WIDTH, generator=generator)
        return table[data.phoneme_N] + 0.3 * noise_NE
    onehot_NKP = torch.nn.functional.one_hot(data.window_NK, PHONEMES).float()
    near_K = torch.tensor([0.3, 0.6, 1.0, 0.6, 0.3])
    weight = torch.randn(2 * WINDOW + 1, PHONEMES, WIDTH, generator=generator)
    hidden_NE = torch.einsum("nkp,kpe,k->ne", onehot_NKP, weight, near_K).relu()
    mix = torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5
    offset_UE = 0.5 * torch.randn(len(data.speakers), WIDTH, generator=generator)
    smooth_NE = (noise_NE + noise_NE.roll(1, 0) + noise_NE.roll(2, 0)) / 3**0.5
    return 2 * hidden_NE @ mix + offset_UE[data.utterance_N] + 0.3 * smooth_NE


def measure(kind: str, utterances: int, seed: int) -> tuple[Estimate, bool]:
    """CSAI of one null, and whether it is found; some controls where they already decide."""
    data = speech(utterances, seed)
    data = data.with_features(features(data, kind, seed + 1))
    # Without planted signals: they are for the limit of detection.
    full = VInformationConfig(window=WINDOW, seed=seed, planted_shares=())
    first = csai(data, replace(full, control=False, phoneme_only_draws=1))
    return first, first.detected and csai(data, full).detected


def row(kind: str, utterances: int, nulls: Sequence[tuple[Estimate, bool]], seconds: float) -> str:
    """A line of the table: shares found without and with the controls."""
    count = len(nulls)
    above, found = sum(e.low > 0 for e, _ in nulls), sum(found for _, found in nulls)
    gains = np.array([e.value for e, _ in nulls])
    least, most = np.quantile(gains, [0.05, 0.95])
    return (
        f"| {kind} | {utterances} | {count} | {gains.mean():.3f} ({least:.3f} to {most:.3f}) | "
        f"{above} ({100 * above / count:.1f}%) | {found} "
        f"({100 * found / count:.1f}%) | {seconds:.0f} |"
    )


HEAD = f"""# CSAI of features that tell nothing of words beyond phonemes

`python tools/experiments/csai_nulls.py` ({WORDS} words over {PHONEMES - 1} phonemes, 4 words an
utterance, {SPEAKERS} speakers; one core, shared). Nothing is to be found: the bar is 5%.

| features | utterances | nulls | CSAI, nats/frame: mean (90% of them) | interval above 0 | found: \
above both controls too | seconds |
|---|---|---|---|---|---|---|
"""


def kept(path: Path) -> dict[tuple[str, str], str]:
    """The rows of a table written before, by kind and size."""
    lines = path.read_text().splitlines() if path.is_file() else []
    cells = [(line.split(" | "), line) for line in lines if line.startswith(ROWS)]
    return {(kind.removeprefix("| "), size): line for (kind, size, *_), line in cells}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--nulls", type=int, default=200, help="of each size and kind")
    parser.add_argument("--utterances", type=int, nargs="+", default=[50, 150, 400])
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    if args.nulls < 1 or min(args.utterances) < 3:
        raise UserError("at least 1 null, of at least 3 utterances")
    torch.set_num_threads(1)
    rows = kept(args.out)
    for kind in args.kinds:
        for utterances in args.utterances:
            started = time.monotonic()
            nulls = [measure(kind, utterances, 1000 * n) for n in range(args.nulls)]
            line = row(kind, utterances, nulls, time.monotonic() - started)
            rows[kind, str(utterances)] = line
            print(line, flush=True)
            order = sorted(rows, key=lambda key: (KINDS.index(key[0]), int(key[1])))
            atomic_write(args.out, HEAD + "\n".join(rows[key] for key in order) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
