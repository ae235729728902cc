"""What falls short, from reports made by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dsasr.doctor.findings import Job, Needs, Report, examine
from dsasr.doctor.machine import Gpu, Link
from dsasr.doctor.measure import Transfer

VERSIONS = {"python": "3.11", "torch": "2.14", "dsasr's code": "abc"}
MANY = Transfer(200_000_000, 2.0)


def report(rank: int, **changes) -> Report:
    node = f"n{rank}"
    gpus = (Gpu(0, "H200", total=141.0),)
    whole = Report(
        rank, node, node, VERSIONS, gpus, has_gpu=True, products=600.0, clock=0.001 * rank,
        all_reduce=40.0, link=Link("4 InfiniBand ports", 50.0), read=MANY, write=MANY,
    )  # fmt: skip
    return replace(whole, **changes)


NEEDS = Needs(read=100e6, read_stage="joint", checkpoint=2e9, space=20e9, save_seconds=60.0,
              save_reason="slurm.signal")  # fmt: skip
JOB = Job("/shared/run", 50e9, NEEDS)


def short(reports, job=JOB) -> dict[str, str]:
    return {row.check: row.short for row in examine(reports, job) if row.short}


def test_a_sound_job_has_a_table_and_nothing_falls_short():
    rows = examine([report(0), report(1)], JOB)
    assert {row.check: (row.measured, row.needed) for row in rows} == {
        "ranks": ("2 on n0, n1", ""),
        "versions": ("python 3.11, torch 2.14", "equal"),
        "GPUs": ("2 × H200", "no errors"),
        "products": ("600 TFLOP/s a rank", "≥ 80% of median"),
        "clocks": ("0.001 s apart", "≤ 2 s"),
        "all-reduce": ("40 GB/s", "4 InfiniBand ports: 50 GB/s"),
        "run folder": ("the same on all nodes", ""),
        "reading": ("200 MB/s", "100 MB/s (joint)"),
        "writing": ("200 MB/s", "2 GB a checkpoint: 10 s"),
        "free space": ("50 GB", "20 GB for checkpoints and snapshots"),
    }
    assert short([report(0), report(1)]) == {}


@pytest.mark.parametrize(
    ("check", "changes", "words"),
    [
        ("versions", {"versions": {**VERSIONS, "torch": "2.12"}},
         ["torch: 2.14 on n0; 2.12 on n1"]),
        ("versions", {"versions": {"python": "3.11", "torch": "2.14"}},
         ["dsasr's code: abc on n0"]),
        ("GPUs", {"gpus": (Gpu(3, "H200", troubles=("2 uncorrected memory errors",)),)},
         ["GPU 3 (H200) of n1: 2 uncorrected memory errors", "--exclude"]),
        ("GPUs", {"gpus": (Gpu(0, "A100"),)}, ["several kinds: 1 × H200, 1 × A100"]),
        ("GPUs", {"gpus": (), "gpu_problem": "nvidia-smi does not answer"}, ["n1: nvidia-smi"]),
        ("GPUs", {"has_gpu": False}, ["n1: torch sees no GPU"]),
        ("products", {"products": 300.0}, ["rank 1 on n1 (300)", "the slowest"]),
        ("clocks", {"clock": -5.0}, ["n1", "chronyd"]),
        ("all-reduce", {"all_reduce": 3.0}, ["6% of the link", "slurm.network"]),
        ("run folder", {"sees_folder": False}, ["n1 do not see", "/shared/run"]),
        ("reading", {"read": Transfer(problem="no answer within 15 s")}, ["rank 1 on n1"]),
        ("reading", {"read": Transfer(1_000_000, 20.0)}, ["10.1 MB/s", "joint", "cache_gb"]),
        ("writing", {"write": Transfer(problem="Read-only file system")}, ["Read-only", "n1"]),
        ("writing", {"write": Transfer(1_000_000, 20.0)}, ["199 s", "slurm.signal leaves (60 s)"]),
    ],
)  # fmt: skip
def test_one_thing_that_falls_short_has_one_line_that_says_where(check, changes, words):
    found = short([report(0), report(1, **changes)])
    if check == "clocks":
        found = short([report(0), report(1, **changes), report(2)])
    assert list(found) == [check]
    assert all(word in found[check] for word in words), found


def test_space_for_the_checkpoints():
    found = short([report(0), report(1)], replace(JOB, free=19e9))
    assert list(found) == ["free space"] and "19 GB are free in /shared/run" in found["free space"]


def test_too_little_read_is_not_judged():
    little = Transfer(100_000, 1.0)
    rows = examine([report(0, read=little)], JOB)
    assert "too little to judge" in next(r.measured for r in rows if r.check == "reading")
    assert short([report(0, read=little)]) == {}


def test_one_rank_on_a_cpu_without_a_recipe():
    alone = Report(0, "n0", "n0", VERSIONS, products=0.03)
    assert [(r.check, r.measured) for r in examine([alone], Job())] == [
        ("ranks", "1 on n0"), ("versions", "python 3.11, torch 2.14"),
        ("GPUs", "none: ranks on CPUs"), ("products", "0.03 TFLOP/s a rank"),
    ]  # fmt: skip


def test_the_products_of_ranks_on_cpus_are_not_judged():
    ranks = [report(r, has_gpu=False, gpus=(), products=0.1 * (r + 1)) for r in range(3)]
    assert short(ranks) == {}


def test_the_first_rank_of_a_node_speaks_for_the_others():
    others = [report(r, node="n0", host="n0", versions={}, gpus=(), link=Link()) for r in (1, 2)]
    link = Link("NVLink", 478.0)
    assert list(short([report(0, link=link), *others])) == ["all-reduce"]
    assert short([report(0, link=Link("NVLink", 60.0)), *others]) == {}


def test_a_link_that_is_not_known_is_not_judged():
    slow = [report(r, all_reduce=0.01, link=Link("eth0")) for r in range(2)]
    assert short(slow) == {}
