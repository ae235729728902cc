"""Compile every kernel for compute capability 9.0 as training launches it, without a GPU.

Prints a line for each: whether it loads 16 bytes at a time, copies asynchronously, uses the matrix
units, and how many bytes it spills to the stack.
"""

import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dsasr.kernels import triton_adaptor, triton_logit_tiles

FP32, BF16, I64, INT = "*fp32", "*bf16", "*i64", "i32"
ROW = {"z_ptr": FP32, "z_stride": INT, "columns": INT, "rows": INT, "start": INT, "cap": "fp32"}
TARGETS = {"targets_ptr": I64, "bias_ptr": FP32}
TILE = {"ROWS": 1, "COLUMNS": 8192}
CARRY = {"carry_ptr": FP32, "carry_stride": INT, "out_ptr": FP32}
FACTORS = {"factors_ptr": FP32, "factors_stride": INT, "out_ptr": BF16, "out_stride": INT}
ALL = {"TARGETS": True, "BIAS": True, "CAP": True}
NONE = {"TARGETS": False, "BIAS": False, "CAP": False, "targets_ptr": None, "bias_ptr": None}
SIZES = {"rows": INT, "columns": INT, "depth": INT}
PRODUCT = {"M": 128, "N": 256, "K": 64, "GROUP": 8, "ALIGNED": True, "EVEN": True, "WIDE": False}
TABLE = {"a_first_ptr": I64, "a_width_ptr": I64}
FORWARD = {"b_stride_n": INT, "bias_ptr": BF16, "before_ptr": BF16}
OUT_TABLE = {"out_first_ptr": I64, "out_width_ptr": I64}

CASES = {
    "finish": (
        triton_logit_tiles._update_kernel,
        {**ROW, **CARRY, "z_ptr": BF16},
        {**NONE, **TILE, "TOTAL": False, "FINISH": True},
    ),
    "update": (
        triton_logit_tiles._update_kernel,
        {**ROW, **CARRY, **TARGETS},
        {**ALL, **TILE, "TOTAL": True, "FINISH": False},
    ),
    "gradient": (
        triton_logit_tiles._gradient_kernel,
        {**ROW, **FACTORS, **TARGETS},
        {**ALL, **TILE, "ENTROPY": True, "SMOOTH": True},
    ),
    "rows": (
        triton_adaptor._rows_kernel,
        {"a_ptr": BF16, "b_ptr": BF16, "out_ptr": BF16, **TABLE, **FORWARD, **SIZES},
        {
            **PRODUCT,
            "b_stride_k": 1,
            "out_first_ptr": None,
            "out_width_ptr": None,
            **{"A_TABLE": True, "OUT_TABLE": False, "OUT_WIDTH": False},
            **{"BIAS": True, "BEFORE": True, "KIND": 1},
        },
    ),
    "rows_back": (
        triton_adaptor._rows_kernel,
        {"a_ptr": BF16, "b_ptr": BF16, "out_ptr": BF16, "b_stride_k": INT, **OUT_TABLE, **SIZES},
        {
            **PRODUCT,
            "b_stride_n": 1,
            **dict.fromkeys(("a_first_ptr", "a_width_ptr", "bias_ptr", "before_ptr")),
            **{"A_TABLE": False, "OUT_TABLE": True, "OUT_WIDTH": True},
            **{"BIAS": False, "BEFORE": False, "KIND": 0},
        },
    ),
    "slope": (
        triton_adaptor._slope_kernel,
        {"before_ptr": BF16, "grad_ptr": BF16, "hidden_ptr": BF16, "count": INT},
        {"KIND": 1, "TILE": 4096},
    ),
}
OPTIONS = {"num_warps": 8, "num_stages": 3}


def compiled(kernel, types, constants):
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    # Sizes and addresses at training shapes are multiples of 16.
    plain = ("start", "cap")
    aligned = [names.index(name) for name in names if name in types and name not in plain]
    attributes = {(index,): [["tt.divisibility", 16]] for index in aligned}
    source = ASTSource(kernel, signature, values, attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=OPTIONS)


def stack_bytes(cubin):
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return re.search(r"STACK:(\d+)", done.stdout)[1]


for name, case in CASES.items():
    code = compiled(*case).asm
    ptx = code["ptx"]
    print(
        name,
        f"wide_loads={'.v4.b32' in ptx or '.v2.b64' in ptx}",
        f"async_copies={'cp.async' in ptx}",
        f"wgmma={'wgmma.mma' in ptx}",
        f"stack={stack_bytes(code['cubin'])}",
    )
