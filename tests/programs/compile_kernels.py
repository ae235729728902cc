"""Compile every kernel as training launches it, without a GPU.

usage: compile_kernels.py ARCHITECTURE: 80, 90, 100 or 120 of NVIDIA, or gfx942 of AMD. Prints a
JSON line a kernel and dtype: registers a thread, bytes that are spilled, bytes of shared memory,
whether it loads and stores 16 bytes at a time, how wide its narrowest asynchronous copies are (0:
it has none), whether it loads by TMA, and which of the matrix units' instructions it has.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dsasr.kernels import triton_adaptor, triton_head_statistics, triton_logit_tiles

FP32, BF16, I64, INT = "*fp32", "*bf16", "*i64", "i32"
Z = {"z_ptr": FP32, "z_stride": INT, "columns": INT}
ROW = {**Z, "rows": INT, "start": INT, "cap": "fp32"}
TARGETS = {"targets_ptr": I64, "bias_ptr": FP32}
TILE = {"ROWS": 1, "COLUMNS": 8192}
CARRY = {"carry_ptr": FP32, "carry_stride": INT, "out_ptr": FP32}
FACTORS = {"factors_ptr": FP32, "factors_stride": INT, "out_ptr": BF16, "out_stride": INT}
STATS = {"stats_ptr": FP32, "stats_stride": INT, "out_ptr": BF16, "out_stride": INT}
NUMBERS = {"ignore_index": INT, "cap": "fp32", "smoothing": "fp32", "scale": "fp32"}
ALL = {"TARGETS": True, "BIAS": True, "CAP": True}
NONE = {"TARGETS": False, "BIAS": False, "CAP": False, "targets_ptr": None, "bias_ptr": None}
PLAIN = {"BIAS": False, "CAP": False, "SMOOTH": False, "bias_ptr": None, "COLUMNS": 8192}
SIZES = {"rows": INT, "columns": INT, "depth": INT}
PRODUCT = {"GROUP": 8, "ALIGNED": True, "EVEN": True, "WIDE": False}
TABLE = {"a_first_ptr": I64, "a_width_ptr": I64}
ABO = {"a_ptr": BF16, "b_ptr": BF16, "out_ptr": BF16}
OUT_TABLE = {"out_first_ptr": I64, "out_width_ptr": I64}


def nothing(*names):
    return dict.fromkeys(names)


LOGITS = {
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
    "row_gradient": (
        triton_logit_tiles._row_gradient_kernel,
        {**Z, **STATS, **NUMBERS, "targets_ptr": I64},
        PLAIN,
    ),
    "head_gradient": (
        triton_head_statistics._gradient_kernel,
        {
            **{"out_ptr": BF16, "out_stride": INT, "rows": INT, "columns": INT},
            **{"factors_ptr": FP32, "targets_ptr": I64, "at_target_ptr": FP32, "even_ptr": FP32},
        },
        {"SMOOTH": True, "N": 128, "BLOCKS": 64},
    ),
    "row_gradient_all": (
        triton_logit_tiles._row_gradient_kernel,
        {**Z, **STATS, **NUMBERS, **TARGETS},
        {"BIAS": True, "CAP": True, "SMOOTH": True, "COLUMNS": 8192},
    ),
}
ADAPTOR = {
    "rows": (
        triton_adaptor._rows_kernel,
        {**ABO, **TABLE, "b_stride_n": INT, "bias_ptr": BF16, "before_ptr": BF16, **SIZES},
        {
            **PRODUCT,
            "b_stride_k": 1,
            **nothing("out_first_ptr", "out_width_ptr"),
            **{"A_TABLE": True, "OUT_TABLE": False, "OUT_WIDTH": False},
            **{"BIAS": True, "BEFORE": True, "KIND": 1},
        },
    ),
    "rows_into": (
        triton_adaptor._rows_kernel,
        {**ABO, "b_stride_n": INT, "bias_ptr": BF16, "out_first_ptr": I64, **SIZES},
        {
            **PRODUCT,
            "b_stride_k": 1,
            **nothing("a_first_ptr", "a_width_ptr", "out_width_ptr", "before_ptr"),
            **{"A_TABLE": False, "OUT_TABLE": True, "OUT_WIDTH": False},
            **{"BIAS": True, "BEFORE": False, "KIND": 0},
        },
    ),
    "rows_back": (
        triton_adaptor._rows_kernel,
        {**ABO, "b_stride_k": INT, **OUT_TABLE, **SIZES},
        {
            **PRODUCT,
            "b_stride_n": 1,
            **nothing("a_first_ptr", "a_width_ptr", "bias_ptr", "before_ptr"),
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
MATRIX_UNITS = {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mma": "\tmma.sync"}
HEAD = {
    **{"tiles_ptr": FP32, "target_z_ptr": FP32, "targets_ptr": I64, "bias_ptr": FP32},
    **{"out_ptr": BF16, "out_stride": INT, "hidden_stride": INT, "weight_stride": INT},
    **{**SIZES, "cap": "fp32", "scale": "fp32"},
}
HEAD_FLAGS = {
    "head": {},
    "head_all": {"BIAS", "CAP", "TOTAL"},
    "head_out": {"OUT"},
    "head_out_all": {"OUT", "BIAS", "CAP"},
}


def head_cases(architecture):
    """The head's product; "head_pointers": where rows do not begin on 16 bytes."""
    kernel = triton_head_statistics._product_kernel
    cases = [(name, 2, flags, True) for name, flags in HEAD_FLAGS.items()]
    cases += [("head_pointers", 2, set(), False), ("head", 4, set(), True)]
    for name, size, flags, aligned in cases:
        tile, options = triton_head_statistics.tile_size(architecture, size, aligned=aligned)
        kind = "bf16" if size == 2 else "fp32"
        types = {**HEAD, "out_ptr": f"*{kind}", "hidden": f"*{kind}", "weight": f"*{kind}"}
        if tile["TMA"]:
            types["hidden"] = f"tensordesc<{kind}[{tile['M']}, {tile['K']}]>"
            types["weight"] = f"tensordesc<{kind}[{tile['N']}, {tile['K']}]>"
        constants = {name: name in flags for name in ("BIAS", "CAP", "TOTAL", "OUT")}
        constants |= {"EVEN": True, "WIDE": False, "GROUP": 8, **tile}
        constants |= nothing(*[n for n in ("bias_ptr", "out_ptr") if n[:-4].upper() not in flags])
        yield name, kind, kernel, types, constants, options


def cases(architecture):
    """Name, dtype, kernel, types, constants and options of each compilation."""
    yield from head_cases(architecture)
    for name, (kernel, types, constants) in LOGITS.items():
        yield name, "bf16", kernel, types, constants, {"num_warps": triton_logit_tiles._WARPS}
    for name, (kernel, types, constants) in ADAPTOR.items():
        for dtype, size in (("bf16", 2), ("fp32", 4)):
            typed = {k: FP32 if dtype == "fp32" and v == BF16 else v for k, v in types.items()}
            tile, options = {}, {"num_warps": 4}
            if name != "slope":
                tile, options = triton_adaptor.tile_size(10_000, 2048, 5120, size)
            yield name, dtype, kernel, typed, {**constants, **tile}, options


def compiled(target, kernel, types, constants, options):
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    # Sizes and addresses at training shapes are multiples of 16.
    plain = ("start", "cap", "ignore_index", "smoothing", "scale")
    aligned = [
        name
        for name in names
        if name in types and name not in constants and name not in plain
        if not types[name].startswith("tensordesc")
    ]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    return triton.compile(
        ASTSource(kernel, signature, values, attributes), target=target, options=options
    )


def of_nvidia(code):
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    ptx = code["ptx"]
    copies = [int(width, 16) for width in re.findall(r"cp\.async\.c[ag].*?, (0x\w+)", ptx)]
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spilled": int(re.search(r"STACK:(\d+)", usage)[1]),
        "wide_loads": bool(re.search(r"ld\.global.*\.v4\.b32|ld\.global.*\.v2\.b64", ptx)),
        "wide_stores": bool(re.search(r"st\.global.*\.v4\.b32|st\.global.*\.v2\.b64", ptx)),
        "copy_bytes": min(copies, default=0),
        "tma": "cp.async.bulk.tensor" in ptx,
        "matrix_units": [unit for unit, pattern in MATRIX_UNITS.items() if pattern in ptx],
        "warps_of_roles": "setmaxnreg" in ptx,
    }


def of_amd(code):
    text = code["amdgcn"]

    def number(name):
        return int(re.search(rf"\.{name}:\s+(\d+)", text)[1])

    return {
        "registers": number("vgpr_count"),
        "spilled": number("vgpr_spill_count") + number("private_segment_fixed_size"),
        "wide_loads": bool(re.search(r"(global|buffer)_load_dwordx4", text)),
        "wide_stores": bool(re.search(r"(global|buffer)_store_dwordx4", text)),
        "copy_bytes": 0,
        "tma": False,
        "matrix_units": ["mfma"] * ("mfma" in text),
        "warps_of_roles": False,
    }


def main():
    architecture = sys.argv[1]
    amd = architecture.startswith("gfx")
    target = GPUTarget("hip", architecture, 64) if amd else GPUTarget("cuda", int(architecture), 32)
    for name, dtype, *case in cases("amd" if amd else architecture):
        code = compiled(target, *case)
        found = {"kernel": name, "dtype": dtype, "shared": code.metadata.shared}
        print(json.dumps(found | (of_amd if amd else of_nvidia)(code.asm)), flush=True)


main()
