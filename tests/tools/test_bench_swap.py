from __future__ import annotations

import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent.parent / "tools" / "bench" / "swap.py"


@pytest.mark.slow
@pytest.mark.launcher
def test_one_line_a_size_with_floor_and_share(launch, tmp_path):
    results = tmp_path / "results.jsonl"
    env = {"DSASR_BENCH_RESULTS": str(results)}
    done = launch(SCRIPT, "--sizes", "1", "--rounds", "1", "--folder", tmp_path, env=env)
    assert done.returncode == 0, done.stdout[-3000:]
    (line,) = [json.loads(x) for x in results.read_text().splitlines()]
    assert line["ranks"] == 2 and 0.5e6 < line["encoder_parameters"] < 1.5e6
    timed = ("hot_swap", "floor", "checksum", "publish", "store_swap", "offload", "switch", "step")
    assert all(line[f"{name}_ms"] > 0 for name in timed)
    ratio = line["hot_swap_ms"] / line["floor_ms"]
    assert line["hot_swap_over_floor"] == pytest.approx(ratio, rel=0.2, abs=0.1)
    # Three encoders and four stages, publishing and looking included.
    swap = line["publish_ms"] + line["store_swap_ms"] + line["checksum_ms"]
    cost = 3 * swap + 4 * max(line["switch_ms"], line["switch_back_ms"])
    assert line["schedule_cost_seconds"] == pytest.approx(cost / 1000, rel=0.01, abs=0.01)
    share = cost / 1000 / (7_300_000 * line["step_seconds"])
    assert line["share_of_training"] == pytest.approx(share, rel=0.05)
    assert not list(tmp_path.glob("tmp*")), "a store was left behind"
