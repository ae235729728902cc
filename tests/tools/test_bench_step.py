from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent.parent / "tools" / "bench" / "step.py"


@pytest.mark.slow
@pytest.mark.launcher
def test_a_line_a_stage_and_zero_whose_figures_hang_together(launch, tmp_path):
    results = tmp_path / "results.jsonl"
    options = ("--small", "--stages", "pretrain", "joint", "--zero", "1", "3")
    done = launch(
        SCRIPT, *options, "--rounds", "2", "--warm-up", "1",
        ranks=1, env={"DSASR_BENCH_RESULTS": str(results)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    lines = [json.loads(x) for x in results.read_text().splitlines()]
    assert [(x["stage"], x["zero"]) for x in lines] == [
        ("pretrain", 1), ("joint", 1), ("pretrain", 3), ("joint", 3)
    ]  # fmt: skip
    for one in lines:
        assert one["over_zero1"] == pytest.approx(
            one["step_ms"] / next(x["step_ms"] for x in lines if x["stage"] == one["stage"]),
            abs=0.002,
        )
        # Of two steps the median is the mean, which the parts must add up to.
        assert sum(one["split_ms"].values()) == pytest.approx(one["step_ms"], rel=0.02)
        seconds = one["step_ms"] / 1000
        assert one["mfu"] == one["share"]  # no vendor's figure for this machine
        assert one["mfu"] == pytest.approx(one["tflop"] / seconds / one["peak_tflops"], rel=0.05)
        assert 0 < one["mfu"] < 1.2 and 0.1 < one["recomputed"] < 0.4
        hours = one["utterances"] * one["seconds_each"] / seconds
        assert one["audio_hours_per_gpu_hour"] == pytest.approx(hours, rel=0.05)
        assert one["peak_mb"] > 100 and 0 <= one["padding"] < 0.5
        assert one["communication_ms"] >= 0
    parts = {"encoder", "adaptor", "llm", "head"}
    assert all("gathered" not in one for one in lines[:2])  # ZeRO-1 has whole weights
    for one in lines[2:]:
        gathered = one["gathered"]
        assert {"encoder"} < set(gathered["parts"]) and gathered["kept_mb"] == 0
        # So small a model is used again within DeepSpeed's reuse distance: gathered once.
        assert all((p["forward"], p["backward"]) == (1, 0) for p in gathered["parts"].values())
        weights = sum(part["mb"] for part in gathered["parts"].values())
        assert gathered["most_mb"] == pytest.approx(weights, abs=0.05)
    for one in lines[1::2]:
        assert {f"{p} forward" for p in parts} | {f"{p} backward" for p in parts} <= set(
            one["split_ms"]
        )
        assert one["split_ms"]["optimizer"] > 0
    assert {"ctc forward", "ctc backward", "encoder backward"} <= set(lines[0]["split_ms"])


def test_batches_are_cut_by_the_recipes_budgets(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    for name in ("common", "marks", "step"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import step

    from dsasr import recipe
    from dsasr.planning.memory import Traffic

    cfg = recipe.load("nim-2.3b")
    stage = next(s for s in cfg.stages if s.name == "joint")
    config = step.batch_config(cfg, stage, small=False)
    traffic = Traffic(8.0, 4.0)
    batches = step.batches(config, 3, traffic, 500, 5)
    assert len(batches) == 3
    for batch in batches:
        rows, frames, _ = batch.features_BTF.shape
        assert rows * frames <= config.frames == 48_000
        speech = -(-frames // config.frames_per_token)
        most = config.prompt_tokens + speech + int(batch.token_lengths_B.max())
        assert rows * most <= config.tokens * 1.05
        assert batch.feature_lengths_B.max() == frames and batch.feature_lengths_B.min() >= 50
        assert batch.padding_share < 0.2
        assert int(batch.tokens_BU.max()) < 500
    prefix, suffix = step.prompt(config)
    assert len(prefix) + len(suffix) == config.prompt_tokens
    mean = sum(b.audio_seconds for b in step.batches(config, 40, traffic, 9, 5)) / sum(
        len(b) for b in step.batches(config, 40, traffic, 9, 5)
    )
    assert mean == pytest.approx(8.0, rel=0.35)


def test_the_papers_size_and_its_work(monkeypatch):
    """Without memory: on device meta."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    for name in ("common", "marks", "step"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import step
    import torch

    from dsasr import recipe
    from dsasr.planning.memory import Traffic
    from dsasr.utils import distributed

    monkeypatch.setattr(distributed, "device", lambda: torch.device("meta"))
    cfg = recipe.load("nim-2.3b", ["engine.precision=bf16"])
    for stage in cfg.stages:
        module = step.build(cfg, stage.branch, small=False)
        size = sum(p.numel() for p in module.parameters())
        encoder = sum(p.numel() for p in module.encoder.parameters())
        assert 5.5e8 < encoder < 6.5e8
        config = step.batch_config(cfg, stage, small=False)
        (batch,) = step.batches(config, 1, Traffic(), 500, 80)
        costs = step.SpeechCosts.of(cfg, 2048 if stage.branch == "sft" else 0)
        work, positions = step.work(cfg, stage, module, batch, costs)
        frames = int(((batch.feature_lengths_B + 3) // 4).sum())
        if stage.name == "pretrain":
            # Two views; six operations a weight and frame.
            assert positions == 2 * frames
            assert work["encoder"].needed == pytest.approx(12 * encoder * frames, rel=0.1)
        else:
            assert 2.2e9 < size < 2.4e9
            assert work["encoder"].forward == pytest.approx(2 * encoder * frames, rel=0.1)
            layers = sum(p.numel() for p in module.llm.base_model.layers.parameters())
            assert work["llm"].forward == pytest.approx(2 * layers * positions, rel=0.1)
            assert (work["encoder"].backward > 0) == (stage.name == "joint")
