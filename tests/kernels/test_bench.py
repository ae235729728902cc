import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
def test_the_benchmark_runs_to_the_end_and_records_its_lines(tmp_path):
    results = tmp_path / "results.jsonl"
    env = {**os.environ, "DSASR_BENCH_RESULTS": str(results), "PYTHONPATH": str(ROOT)}
    env.pop("TRITON_INTERPRET", None)
    script = ROOT / "tools" / "bench" / "kernels.py"
    command = [
        sys.executable,
        str(script),
        "--small",
        "--rounds",
        "1",
        "--ops",
        "linear_cross_entropy",
    ]
    process = subprocess.run(
        [*command, "--without", "compile", "torch_no_entropy", "eager_no_entropy"],
        capture_output=True,
        text=True,
        env=env,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [line["side"] for line in lines] == ["ours", "eager"]
    ours = lines[0]
    assert ours["gradient_error"] < 1e-5 and ours["forward_ms"] > 0 and ours["commit"]
    ratio = ours["both_ms"] / lines[1]["both_ms"]
    assert abs(ours["both_over_eager"] - ratio) < 0.01 * ratio + 1e-3
    assert {"machine", "versions", "peak_mb", "both_share", "limit"} <= set(ours)
