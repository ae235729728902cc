"""How long a whole training step takes at a recipe's size: its stages, under ZeRO 1, 2 and 3.

    deepspeed tools/bench/step.py --recipe nim-2.3b [--stages joint] [--zero 1 3] [key=value …]
    DS_ACCELERATOR=cpu python tools/bench/step.py --small

Weights and features are random; the recipe gives the shapes. Durations are drawn (lognormal, mean
--seconds, spread 0.6), transcripts at --tokens a second, and cut into batches by the recipe's own
budgets, padding and all. The step is `BranchEngine.step`, as a run makes it; what is not in it is
the making of batches (`tools/bench/loader.py`). One line a stage and ZeRO is recorded:

- ``step_ms`` of the slowest rank; ``tokens_per_s``: positions of the language model, or the
  encoder's frames in pretraining, and ``audio_hours_per_gpu_hour``; padding counts in neither
- ``mfu``: Σ forward and backward FLOPs of `dsasr.planning.flops` / (step · peak). ``peak_from``
  says whether the peak is the vendor's for dense bf16 or, of an unknown machine, this run's
  square matrix product; ``share`` is by the latter everywhere. ``recomputed``: what is done twice,
  over that sum.
- ``split_ms``: from one mark to the next in the device's queue. Backward times hold what is
  recomputed and, in the last one, DeepSpeed's reduction.
- of one more step, profiled: ``communication_ms`` of the device, overlapped or not, and ``waits``,
  the calls that kept the host waiting; under ZeRO-3 ``gathered``: how many times the weights of
  each part were gathered, forward and backward, the most MB whole at once, and the MB still
  whole after the step
- ``peak_mb`` of the device; on a CPU of the process
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import matrix_rate, record
from marks import Marks, peak, profiled, restart_peak
from step_work import PHONEME_RATE, PHONEMES, SpeechCosts, work
from torch import nn
from transformers import AutoModelForCausalLM, Qwen3Config

from dsasr import recipe
from dsasr.data.batch import Batch
from dsasr.data.dataloader.bucketing import BatchConfig, bucket_order, split_into_batches
from dsasr.engine import process_setup
from dsasr.engine.branch_engine import BranchEngine
from dsasr.engine.config import precision, read_ds_config
from dsasr.kernels import dispatch
from dsasr.model import lora
from dsasr.model.adaptors.protocol import build_adaptor
from dsasr.model.ctc_model import CtcModel
from dsasr.model.llm_hub import llm_config
from dsasr.model.speech_llm import SpeechLLM
from dsasr.planning.memory import Traffic
from dsasr.planning.model_parts import (
    fresh_encoder,
)
from dsasr.recipe import Recipe
from dsasr.stages import StageConfig
from dsasr.utils import distributed
from dsasr.utils.environment import machine
from dsasr.utils.errors import UserError, run_tool
from dsasr.utils.library_warnings import silence_library_warnings
from dsasr.utils.progress import Bar

STAGES = ("pretrain", "align", "ia_sft", "joint")
PREFIX_SHARE = 0.75  # of the prompt before the speech
CORPUS = 2000  # utterances that batches are cut from
# Dense bf16, as the vendor gives it. Longest name first.
PEAKS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H200": 989e12, "H100": 989e12, "A100": 312e12}
SMALL = (
    "model.encoder={width: 96, layers: 2, heads: 4, ffn: 384, kernel: 15}",
    "model.encoder.activation_checkpointing=true",
    "model.adaptor={stack: 4, hidden: 128}",
    "model.llm={path: small, pack: 256, activation_checkpointing: true}",
)
SMALL_LM = {
    "vocab_size": 4096, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "tie_word_embeddings": True,
}  # fmt: skip
SMALL_BATCH = {"frames": 3000, "tokens": 900, "samples": 32}


# -- what is trained, and on what ------------------------------------------------------------------


def build(cfg: Recipe, branch: str, small: bool) -> nn.Module:
    """The branch's module with random weights, on the device."""
    model, dtype = cfg.model, precision(cfg.engine)
    torch.manual_seed(0)
    with distributed.device():
        encoder = fresh_encoder(cfg)
        if model.encoder_lora is not None:
            lora.inject(encoder, model.encoder_lora)
        if branch == "pretrain":
            return CtcModel(encoder, PHONEMES, model.pretrain)
        shape = Qwen3Config(**SMALL_LM) if small else llm_config(model.llm.path)
        llm = AutoModelForCausalLM.from_config(
            shape, dtype=dtype, attn_implementation=model.llm.attn, trust_remote_code=False
        )
        if model.lora is not None:
            lora.inject(llm, model.lora)
        text = shape.get_text_config()
        rms = text.initializer_range  # of random weights; on device meta there are none to measure
        adaptor = build_adaptor(model.adaptor, encoder.width, text.hidden_size, rms)
    prefix, suffix = prompt(batch_config(cfg, cfg.schedule().sft[0], small))
    return SpeechLLM(
        encoder, adaptor, llm, prefix, suffix, 0, model.llm,
        spec=model.pretrain.spec if model.sft.spec else None, chunks=model.sft.chunks,
    )  # fmt: skip


def prompt(config: BatchConfig) -> tuple[list[int], list[int]]:
    """As many tokens as the budgets count a prompt for."""
    before = max(1, round(PREFIX_SHARE * config.prompt_tokens))
    return [1] * before, [2] * max(0, config.prompt_tokens - before)


def batch_config(cfg: Recipe, stage: StageConfig, small: bool) -> BatchConfig:
    config = cfg.dataloader(stage)[0].batch
    return replace(config, **SMALL_BATCH) if small else config


def batches(
    config: BatchConfig,
    count: int,
    traffic: Traffic,
    vocab: int,
    bins: int,
    rows: Callable[[float], int] | None = None,
) -> list[Batch]:
    """``count`` batches of this rank's, as the planner would cut them from such a corpus.

    ``rows``: from seconds to rows of features of ``bins``; one every 10 ms if not given.
    """
    rng = np.random.default_rng(100 + distributed.rank())
    drawn = rng.lognormal(np.log(traffic.seconds) - 0.18, 0.6, CORPUS)
    frames = (100 * drawn.clip(max(0.5, config.min_seconds), config.max_seconds)).astype(np.int64)
    tokens = np.maximum(1, rng.poisson(frames / 100 * traffic.tokens))
    chars = np.ceil(tokens / config.tokens_per_char).astype(np.int64)
    order = bucket_order(frames, chars, config.bucket, rng)
    frames, tokens = frames[order], tokens[order]
    ranges = split_into_batches(frames, chars[order], config)
    picked = ranges[rng.choice(len(ranges), count, replace=count > len(ranges))]
    return [
        _batch(frames[a:b], tokens[a:b] + 1, vocab, bins, number, rows)
        for number, (a, b) in enumerate(picked)
    ]


def _batch(
    frames: np.ndarray,
    tokens: np.ndarray,
    vocab: int,
    bins: int,
    number: int,
    rows: Callable[[float], int] | None,
) -> Batch:
    lengths_B, token_lengths_B = torch.from_numpy(frames), torch.from_numpy(tokens)
    count = len(frames)
    phoneme_lengths_B = (lengths_B / 100 * PHONEME_RATE).long().clamp_min(1)
    if rows is not None:
        lengths_B = torch.tensor([rows(n / 100) for n in frames.tolist()])
    features_BTF = torch.randn(count, int(lengths_B.max()), bins)
    features_BTF[torch.arange(features_BTF.shape[1]) >= lengths_B[:, None]] = 0.0
    return Batch.blank(
        features_BTF,
        feature_lengths_B=lengths_B,
        phonemes_BP=torch.randint(1, PHONEMES, (count, int(phoneme_lengths_B.max()))),
        phoneme_lengths_B=phoneme_lengths_B,
        tokens_BU=torch.randint(3, vocab, (count, int(token_lengths_B.max()))),
        token_lengths_B=token_lengths_B,
        keys=tuple(f"{distributed.rank()}-{number}-{i}" for i in range(count)),
        durations=tuple((frames / 100).tolist()),
        seed=number,
        number=number,
    )


# -- measuring -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limits:
    measured: float  # FLOP/s of a square matrix product in this run
    peak: float
    origin: str

    @classmethod
    def of(cls, dtype: torch.dtype) -> Limits:
        large = distributed.device().type == "cuda"
        measured = matrix_rate(8192 if large else 1024, dtype, distributed.device())
        known = [peak for name, peak in PEAKS.items() if large and name in machine()]
        if known and dtype is torch.bfloat16:
            return cls(measured, known[0], "vendor")
        return cls(measured, measured, "measured")


def measure(
    branch: BranchEngine, stage: StageConfig, timed: Sequence[Batch], warm_up: int
) -> dict[str, Any]:
    """Time ``timed``, ``stage.grad_accum_steps`` a step, but for the first ``warm_up`` steps."""
    branch.enter(stage)
    marks, size = Marks(), stage.grad_accum_steps
    groups = [timed[i : i + size] for i in range(0, len(timed), size)]
    marks.watch(branch)
    for number, group in enumerate(Bar(groups, stage.name, leave=False, disable=not _shown())):
        if number == warm_up:
            marks.seconds()  # nothing of the warm-up is left in the queue
            marks.clear()
            distributed.barrier()
            restart_peak()
        marks.step()
        report = branch.step(group, number)
        marks("end")
    whole, parts = marks.seconds()
    found = {"peak_mb": round(peak() / 2**20, 1), "clock": marks.clock}
    loss = report.sums["ctc" if stage.branch == "pretrain" else "nll"][0]
    if not torch.isfinite(loss):
        raise RuntimeError(f"{stage.name}: the loss is {loss}")
    slowest = [max(times) for times in zip(*distributed.all_gather_object(whole), strict=True)]
    found["seconds"] = slowest
    found["split_ms"] = {name: round(1000 * s, 3) for name, s in parts.items()}
    return found | profiled(branch, groups[-1], len(groups))


def _shown() -> bool:
    return distributed.is_main_rank() and sys.stderr.isatty()


def line(
    cfg: Recipe, stage: StageConfig, module: nn.Module, timed: Sequence[Batch], steps: int,
    found: dict[str, Any], limits: Limits, costs: SpeechCosts,
) -> dict[str, Any]:  # fmt: skip
    """What is recorded of one case; ``timed`` are the batches that it was measured on."""
    seconds, world = sum(found.pop("seconds")), distributed.world_size()
    needed = again = positions = 0.0
    for batch in timed:
        parts, here = work(cfg, stage, module, batch, costs)
        needed += sum(w.needed for w in parts.values())
        again += sum(w.recomputed for w in parts.values())
        positions += here
    audio = sum(batch.audio_seconds for batch in timed)
    frames = sum(float(b.feature_lengths_B.sum()) for b in timed)
    padded = sum(b.features_BTF.shape[0] * b.features_BTF.shape[1] for b in timed)
    # Every rank draws from the same distribution: rank 0's work stands for each.
    return {
        "tokens_per_s": round(world * positions / seconds, 1),
        "audio_hours_per_gpu_hour": round(audio / seconds, 2),
        "mfu": round(needed / seconds / limits.peak, 4),
        "share": round(needed / seconds / limits.measured, 4),
        "recomputed": round(again / needed, 4),
        "tflop": round(needed / steps / 1e12, 4),
        "utterances": round(sum(map(len, timed)) / steps, 1),
        "seconds_each": round(audio / sum(map(len, timed)), 2),
        "padding": round(1 - frames / padded, 4),
        **found,
        "peak_tflops": round(limits.peak / 1e12, 3),
        "peak_from": limits.origin,
    }


def run(options: argparse.Namespace, cfg: Recipe) -> None:
    dtype = precision(cfg.engine)
    limits = Limits.of(dtype)
    stages = {stage.name: stage for stage in cfg.stages if stage.name in options.stages}
    missing = [name for name in options.stages if name not in stages]
    if missing:
        raise UserError(f"the recipe has no stage '{missing[0]}': it has {', '.join(stages)}")
    first: dict[str, float] = {}
    for zero in options.zero:
        for stage in stages.values():
            middle, fields = case(options, cfg, stage, zero, limits)
            first.setdefault(stage.name, middle)
            over = {f"over_zero{options.zero[0]}": round(middle / first[stage.name], 3)}
            if distributed.is_main_rank():
                name = "small" if options.small else options.recipe
                record("step", recipe=name, stage=stage.name, zero=zero, **over, **fields)
            gc.collect()
            if distributed.device().type == "cuda":
                torch.cuda.empty_cache()


def case(
    options: argparse.Namespace, cfg: Recipe, stage: StageConfig, zero: int, limits: Limits
) -> tuple[float, dict[str, Any]]:
    """The median step's seconds, and the fields to record, of one stage under one ZeRO."""
    # A module of its own: ZeRO-3 leaves partitioned weights behind.
    module = build(cfg, stage.branch, options.small)
    sft = stage.branch == "sft"
    vocab = module.head.out_features if sft else 4
    costs = SpeechCosts.of(cfg, module.head.in_features if sft else 0)
    unseen = options.warm_up * stage.grad_accum_steps
    timed = batches(
        batch_config(cfg, stage, options.small),
        unseen + options.rounds * stage.grad_accum_steps,
        Traffic(options.seconds, options.tokens),
        vocab,
        costs.shape.bins,
        costs.shape.rows,
    )
    dtype = precision(cfg.engine)
    with tempfile.TemporaryDirectory() as folder:
        config = deepspeed_config(zero, options.zero3, Path(folder))
        settings = replace(cfg.engine, deepspeed=config)
        branch = BranchEngine(stage.branch, module, settings, Path(folder))
        found = measure(branch, stage, timed, options.warm_up)
        times = found["seconds"]
        fields = line(cfg, stage, module, timed[unseen:], options.rounds, found, limits, costs)
        branch.close()
    middle = statistics.median(times)
    quarters = statistics.quantiles(times, method="inclusive")
    head = {
        "ranks": distributed.world_size(),
        "dtype": str(dtype).removeprefix("torch."),
        "kernels": dispatch.implementation("linear_cross_entropy", distributed.device(), dtype),
        "rounds": options.rounds,
        **({"zero3": options.zero3} if options.zero3 and zero == 3 else {}),
        "step_ms": round(1000 * middle, 2),
        "spread": round((quarters[2] - quarters[0]) / middle, 3),
    }
    return middle, head | fields


def deepspeed_config(zero: int, keys: Mapping[str, int], folder: Path) -> str:
    """The packaged config of a ZeRO stage; of ZeRO-3 with ``keys``, the path of a copy that has
    them."""
    name = f"zero{zero}"
    if not keys or zero != 3:
        return name
    config = read_ds_config(name)
    config["zero_optimization"].update(keys)
    path = folder / "zero3.json"
    path.write_text(json.dumps(config))
    return str(path)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="nim-2.3b")
    parser.add_argument("--stages", "--stage", nargs="+", default=STAGES)
    parser.add_argument("--zero", nargs="+", type=int, choices=(1, 2, 3), default=(1, 2, 3))
    parser.add_argument("--small", action="store_true", help="a shape that a CPU ends in a minute")
    parser.add_argument("--rounds", type=int, default=0, help="timed steps; 0: 20 on a GPU, else 5")
    parser.add_argument("--warm-up", type=int, default=4, help="steps before them")
    parser.add_argument("--seconds", type=float, default=8.0, help="of audio, an utterance's mean")
    parser.add_argument("--tokens", type=float, default=4.0, help="of the transcript, a second")
    parser.add_argument(
        "--zero3", nargs="+", default=[], metavar="KEY=NUMBER",
        help="keys of ZeRO-3's zero_optimization, such as stage3_max_reuse_distance=0",
    )  # fmt: skip
    parser.add_argument("--local_rank", type=int, default=0, help="set by the deepspeed launcher")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe overrides")
    options = parser.parse_args()
    options.rounds = options.rounds or (20 if distributed.device().type == "cuda" else 5)
    if options.rounds < 2 or options.warm_up < 1 or min(options.seconds, options.tokens) <= 0:
        raise UserError("--rounds: at least 2; --warm-up: at least 1; the rates above 0")
    pairs = [key.partition("=") for key in options.zero3]
    if pairs and (3 not in options.zero or not all(value.isdigit() for *_, value in pairs)):
        raise UserError("--zero3: give KEY=NUMBER, and 3 among --zero")
    options.zero3 = {key: int(value) for key, _, value in pairs}
    return options


def main() -> None:
    options = parse()
    os.environ.setdefault("LOCAL_RANK", str(options.local_rank))
    silence_library_warnings()
    overrides = [*(SMALL if options.small else ()), *options.overrides]
    cfg = recipe.load(options.recipe, overrides)
    process_setup.set_threads(cfg.engine)
    dispatch.select(cfg.kernels)
    process_setup.init_distributed()
    run(options, cfg)


if __name__ == "__main__":
    distributed.end_process(run_tool(main))
