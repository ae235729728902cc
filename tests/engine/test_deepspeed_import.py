"""DeepSpeed is imported without the compiler, and leaves the environment as it was."""

from __future__ import annotations

import json
import subprocess
import sys

PROGRAM = """
import json, os, sys
os.environ.update({environment})
from dsasr.engine.deepspeed_import import import_deepspeed
deepspeed = import_deepspeed()
names = ("deepspeed.runtime.zero.muon.muon_optimizer", "torch._inductor.compile_fx")
print(json.dumps([deepspeed.__name__, *(name in sys.modules for name in names),
                  os.environ.get("TORCHDYNAMO_DISABLE")]))
"""


def test_the_import_loads_no_compiler_and_restores_the_switch() -> None:
    program = PROGRAM.replace("{environment}", "{'DS_ACCELERATOR': 'cpu'}")
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout.splitlines()[-1]) == ["deepspeed", True, False, None]
