"""Every kernel compiles for every architecture on any machine: Triton carries the assemblers."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent.parent / "programs" / "compile_kernels.py"
LOGITS = ("finish", "update", "gradient", "row_gradient", "row_gradient_all")
PRODUCTS = ("rows", "rows_into", "rows_back")
# Bytes of shared memory that a block may have. 8.6 and 8.9 run 8.0's code and have 99 KiB.
SHARED = {"80": 99 << 10, "90": 227 << 10, "100": 227 << 10, "120": 99 << 10, "gfx942": 64 << 10}
SLOW = pytest.mark.slow


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's assembler is a Linux program")
@pytest.mark.parametrize(
    "architecture",
    [pytest.param(name, marks=() if name == "90" else SLOW) for name in SHARED],
)
def test_kernels_compile_without_spills(architecture, tmp_path):
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    process = subprocess.run(
        [sys.executable, str(PROGRAM), architecture], capture_output=True, text=True, env=env
    )
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-4000:]
    lines = [json.loads(line) for line in process.stdout.splitlines()]
    found = {(line["kernel"], line["dtype"]) for line in lines}
    adaptor = {(name, dtype) for name in (*PRODUCTS, "slope") for dtype in ("bf16", "fp32")}
    assert found == adaptor | {(name, "bf16") for name in LOGITS}
    amd = architecture == "gfx942"
    for line in lines:
        assert line["spilled"] == 0 and line["shared"] <= SHARED[architecture], line
        assert 0 < line["registers"] <= (512 if amd else 255), line
        # AMD's matrix units leave four neighbors of a row in a thread: 8 bytes in bf16.
        narrow = ("finish", "update", *(PRODUCTS if amd else ()))
        assert line["wide_stores"] or line["kernel"] in narrow, line
        if line["kernel"] in PRODUCTS:
            assert line["wide_loads"] if amd else line["copy_bytes"] == 16, line
            assert line["matrix_units"] or line["dtype"] == "fp32", line
        else:
            assert line["wide_loads"], line
