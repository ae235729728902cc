"""The kernels compile for Hopper on any machine: Triton carries the assembler."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent.parent / "programs" / "compile_kernels.py"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's assembler is a Linux program")
def test_kernels_compile_for_hopper(tmp_path):
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    process = subprocess.run(
        [sys.executable, str(PROGRAM)], capture_output=True, text=True, env=env
    )
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-4000:]
    lines = {line.split()[0]: line for line in process.stdout.splitlines()}
    assert {"update", "finish", "gradient", "rows", "rows_back", "slope"} <= set(lines)
    for name in ("update", "finish", "gradient", "slope"):
        assert "stack=0" in lines[name] and "wide_loads=True" in lines[name], lines[name]
    assert "wgmma=True" in lines["rows"] and "async_copies=True" in lines["rows"], lines["rows"]
