"""How fast the fused ops are: ours, eager, torch.compile, torch's own, Liger and CCE, in one run.

    python tools/bench/kernels.py [--ops linear_cross_entropy softmax_entropy adaptor] [--small]

Shapes are those of a 2-billion LM on a GPU, and one that a CPU can finish without; ``--small`` ends
in seconds, but for compiling. Every side is first compared with the float64 reference on few
rows (``error``: of loss and gradients, ‖got − want‖ / ‖want‖), then timed in turn with the others.
``share`` is the part of the measured limit that is reached: the matrix rate over the three products
that forward and backward need (one for forward), or the copy bandwidth over the bytes that must
move. Sides named ``no_entropy`` give the loss alone.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from common import alternate, clock, copy_rate, matrix_rate, median_and_spread, peak_bytes, record
from kernel_sides import SIDES, Side, padded_adaptor

from dsasr.kernels import dispatch, reference
from dsasr.utils.errors import UserError, run_tool

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPS = ("linear_cross_entropy", "softmax_entropy", "adaptor")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SHAPES: dict[str, dict[str, list[dict[str, Any]]]] = {
    "cuda": {
        "linear_cross_entropy": [
            {"N": n, "D": 2048, "V": 151_936, "dtype": "bf16"} for n in (2048, 8192, 32768)
        ],
        "softmax_entropy": [
            {"N": 8192, "V": 151_936, "dtype": "bf16"},
            {"N": 8192, "V": 151_936, "dtype": "fp32"},
            {"N": 65_536, "V": 70, "dtype": "fp32"},
        ],
        "adaptor": [
            {"B": b, "S": 750, "E": 1280, "D": 2048, "stack": 4, "padding": p, "dtype": "bf16"}
            for b, p in ((64, 0.3), (64, 0.05), (16, 0.3))
        ],
    },
    "cpu": {
        "linear_cross_entropy": [
            {"N": 4096, "D": 256, "V": 151_936, "dtype": "fp32"},
            {"N": 300, "D": 256, "V": 1000, "dtype": "fp32"},
        ],
        "softmax_entropy": [
            {"N": 128, "V": 151_936, "dtype": "fp32"},
            {"N": 4096, "V": 70, "dtype": "fp32"},
        ],
        "adaptor": [
            {"B": 8, "S": 400, "E": 256, "D": 512, "stack": 4, "padding": 0.3, "dtype": "fp32"}
        ],
    },
    "small": {
        "linear_cross_entropy": [{"N": 96, "D": 16, "V": 401, "dtype": "fp32"}],
        "softmax_entropy": [{"N": 64, "V": 401, "dtype": "fp32"}],
        "adaptor": [
            {"B": 4, "S": 50, "E": 16, "D": 24, "stack": 4, "padding": 0.3, "dtype": "fp32"}
        ],
    },
}


# -- inputs and the work that they take ------------------------------------------------------------


def inputs(op: str, shape: dict[str, Any], device: str, rows: int | None = None):
    """(arguments, keywords, positions of the arguments that get gradients); ``rows``: fewer."""
    torch.manual_seed(0)
    dtype = DTYPES[shape["dtype"]]

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(size, device=device)).to(dtype).requires_grad_()

    if op == "linear_cross_entropy":
        n, d, v = rows or shape["N"], shape["D"], shape["V"]
        targets_N = torch.randint(0, v, (n,), device=device)
        return (normal(n, d), normal(v, d, scale=d**-0.5), targets_N), {}, (0, 1)
    if op == "softmax_entropy":
        return (normal(rows or shape["N"], shape["V"]),), {}, (0,)
    batch, frames, width, out, stack = (shape[k] for k in ("B", "S", "E", "D", "stack"))
    batch = min(batch, 4) if rows else batch
    lengths_B = spread_lengths(batch, frames, shape["padding"])
    counts_B = -(-lengths_B // stack)
    slots_A = torch.arange(-(-frames // stack))
    valid = (slots_A < counts_B[:, None]).flatten().nonzero().squeeze(1)
    # Each utterance's speech is followed by as many positions of text.
    shift = (counts_B.cumsum(0) - counts_B).repeat_interleave(counts_B)
    index = (torch.arange(len(valid)) + shift).to(device), valid.to(device)
    arguments = (
        normal(batch, frames, width),
        lengths_B,
        normal(out, stack * width, scale=(stack * width) ** -0.5),
        normal(out),
        normal(out, out, scale=out**-0.5),
        normal(out),
    )
    keywords = {"stack": stack, "index": index, "positions": 2 * len(valid)}
    return arguments, keywords, (0, 2, 3, 4, 5)


def spread_lengths(batch: int, frames: int, padding: float) -> Tensor:
    """Evenly spread lengths up to ``frames`` with that share of padding."""
    low = max(1 / frames, 1 - 2 * padding)
    return (torch.linspace(low, 1, batch) * frames).round().long().clamp(1, frames)


def work(op: str, shape: dict[str, Any]) -> tuple[str, float, float]:
    """The limit's kind, and how much of it forward, and forward and backward, must take."""
    if op == "linear_cross_entropy":
        flop = 2.0 * shape["N"] * shape["D"] * shape["V"]
        return "flop", flop, 3 * flop
    if op == "softmax_entropy":
        size = shape["N"] * shape["V"] * DTYPES[shape["dtype"]].itemsize
        return "bytes", size, 3 * size
    lengths_B = spread_lengths(shape["B"], shape["S"], shape["padding"])
    rows = int((-(-lengths_B // shape["stack"])).sum())
    flop = 2.0 * rows * shape["D"] * (shape["stack"] * shape["E"] + shape["D"])
    return "flop", flop, 3 * flop


def differentiate(
    out: Tensor, arguments: tuple, differentiable: tuple[int, ...]
) -> tuple[Tensor, ...]:
    # A sum over N, as training has it: the upstream gradient is one number, with stride 0.
    loss = out.sum() / out.numel()
    return torch.autograd.grad(loss, [arguments[index] for index in differentiable])


# -- checking and measuring ------------------------------------------------------------------------

REFERENCES = {
    "linear_cross_entropy": reference.linear_cross_entropy,
    "softmax_entropy": reference.softmax_entropy,
    "adaptor": padded_adaptor,
}


def errors(op: str, side: Side, shape: dict[str, Any], device: str) -> dict[str, float]:
    """Of the mean, and the worst of the gradients, against the float64 reference."""
    arguments, keywords, differentiable = inputs(op, shape, device, rows=64)
    wide = tuple(
        x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
        for x in arguments
    )
    out, want = side(*arguments, **keywords), REFERENCES[op](*wide, **keywords)
    grads = differentiate(out, arguments, differentiable)
    grads_want = differentiate(want, wide, differentiable)

    def error(a: Tensor, b: Tensor) -> float:
        return float(((a.double() - b).norm() / b.norm().clamp(min=1e-30)).detach())

    worst = max(map(error, grads, grads_want))
    return {"error": error(out.mean(), want.mean()), "gradient_error": worst}


def measure(
    op: str, shape: dict[str, Any], rounds: int, device: str, limits: dict, without: list[str]
) -> None:
    accuracy: dict[str, dict[str, float]] = {}
    sides = {name: side for name, side in SIDES[op](device).items() if name not in without}
    unit, *needed = work(op, shape)
    if needed[-1] / limits[unit] < 0.1:
        rounds *= 10
    for name, side in list(sides.items()):
        try:
            accuracy[name] = errors(op, side, shape, device)
            if accuracy[name]["gradient_error"] > 0.05:
                print(f"{op} {name}: gradients are off by {accuracy[name]}", file=sys.stderr)
        except Exception as error:  # a side that does not run here is named and left out
            if name == "ours":
                raise
            print(f"{op} {name} does not run: {str(error)[:200]}", file=sys.stderr)
            del sides[name]
    peaks = {name: _peak(op, name, side, shape, device) for name, side in sides.items()}
    sides = {name: side for name, side in sides.items() if peaks[name] is not None}
    arguments, keywords, differentiable = inputs(op, shape, device)
    runs = {
        "forward": {n: partial(_forward, s, arguments, keywords) for n, s in sides.items()},
        "both": {
            n: partial(_both, s, arguments, keywords, differentiable) for n, s in sides.items()
        },
    }
    # On a CPU the comparison with the reference has warmed everything up.
    warm = 3 if device == "cuda" else 0
    times = {kind: alternate(by_side, rounds, device, warm) for kind, by_side in runs.items()}
    medians = {
        kind: {name: median_and_spread(seconds) for name, seconds in by_side.items()}
        for kind, by_side in times.items()
    }
    for name in sides:
        fields: dict[str, Any] = {}
        for (kind, by_side), amount in zip(medians.items(), needed, strict=True):
            median, spread = by_side[name]
            fields[f"{kind}_ms"], fields[f"{kind}_spread"] = round(median, 4), round(spread, 3)
            fields[f"{kind}_share"] = round(amount / limits[unit] / (median / 1000), 4)
            for baseline in sides:
                if baseline != name and name == "ours":
                    fields[f"{kind}_over_{baseline}"] = round(median / by_side[baseline][0], 4)
        fields["backward_ms"] = round(fields["both_ms"] - fields["forward_ms"], 4)
        fields["peak_mb"] = round(peaks[name] / 2**20, 1)
        if name == "ours":
            ratios = {n: round(peaks["ours"] / max(p, 1), 4) for n, p in peaks.items() if p}
            fields |= {f"peak_over_{n}": ratio for n, ratio in ratios.items() if n != "ours"}
        record(
            op,
            side=name,
            **shape,
            implementation=dispatch.implementation(op, device, DTYPES[shape["dtype"]]),
            rounds=rounds,
            **fields,
            **{k: float(f"{v:.2g}") for k, v in accuracy[name].items()},
            limit=f"{limits[unit]:.3g} {unit}/s",
            clock=clock(device),
        )


def _forward(side: Side, arguments: tuple, keywords: dict) -> None:
    with torch.no_grad():
        side(*arguments, **keywords)


def _both(side: Side, arguments: tuple, keywords: dict, differentiable: tuple[int, ...]) -> None:
    differentiate(side(*arguments, **keywords), arguments, differentiable)


def _peak(op: str, name: str, side: Side, shape: dict[str, Any], device: str) -> int | None:
    """Bytes above the inputs of forward and backward, or None if they do not fit the device."""
    if device == "cpu":
        command = [sys.executable, __file__, "--peak", json.dumps([op, name, shape])]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"{op} {name}: no peak ({done.stderr[-300:].strip()})", file=sys.stderr)
        return None if done.returncode else int(done.stdout.split()[-1])
    arguments, keywords, differentiable = inputs(op, shape, device)
    try:
        return peak_bytes(partial(_both, side, arguments, keywords, differentiable), device)
    except torch.OutOfMemoryError:
        print(f"{op} {name} does not fit: {shape}", file=sys.stderr)
        return None
    finally:
        del arguments
        gc.collect()
        torch.cuda.empty_cache()


def _print_peak(op: str, name: str, shape: dict[str, Any]) -> None:
    side = SIDES[op]("cpu")[name]
    tiny = SHAPES["small"][op][0]
    # Once at a tiny shape: libraries load, pools start. Compiled code needs the measured one.
    arguments, keywords, differentiable = inputs(op, shape if name == "compile" else tiny, "cpu")
    _both(side, arguments, keywords, differentiable)
    arguments, keywords, differentiable = inputs(op, shape, "cpu")
    gc.collect()
    print(peak_bytes(partial(_both, side, arguments, keywords, differentiable)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ops", nargs="+", choices=OPS, default=OPS)
    parser.add_argument("--small", action="store_true", help="shapes that end in seconds")
    parser.add_argument(
        "--rounds", type=int, default=0, help="0: 20 on a GPU, 5 on a CPU; 10x for short ones"
    )
    parser.add_argument("--threads", type=int, default=0, help="of a CPU; 0: as torch has it")
    parser.add_argument("--without", nargs="*", default=[], help="sides to leave out")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.peak:
        return _print_peak(*json.loads(args.peak))
    if args.rounds < 0 or "ours" in args.without:
        raise UserError("--rounds: give a positive number; --without: ours stays")
    rounds = args.rounds or (20 if DEVICE == "cuda" else 5)
    large = DEVICE == "cuda"
    limits = {
        "flop": matrix_rate(
            8192 if large else 1024, torch.bfloat16 if large else torch.float32, DEVICE
        ),
        "bytes": copy_rate(2**32 if large else 2**27, DEVICE),
    }
    for op in args.ops:
        for shape in SHAPES["small" if args.small else DEVICE][op]:
            measure(op, shape, rounds, DEVICE, limits, args.without)


if __name__ == "__main__":
    sys.exit(run_tool(main))
