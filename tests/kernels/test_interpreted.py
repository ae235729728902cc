"""The Triton kernels in the interpreter, which is switched on before Triton is first imported."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is that process")
def test_every_kernel_under_the_interpreter():
    ops = ("linear_cross_entropy", "softmax_entropy", "adaptor", "triton_head_statistics")
    files = [HERE / f"test_{op}.py" for op in ops]
    process = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", "triton", *files],
        capture_output=True,
        text=True,
        cwd=HERE.parent.parent,
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    passed = re.search(r"(\d+) passed", process.stdout)
    assert process.returncode == 0 and int(passed[1]) > 100, (
        process.stdout[-5000:] + process.stderr[-2000:]
    )
