"""What a recipe needs, beside the plan's own figures."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dsasr import recipe
from dsasr.doctor.needs import machine_of, needs, shards_of_ranks
from dsasr.planning.cluster_sizing import FLAC_BYTES, checkpoint_bytes, estimate_step
from dsasr.planning.model_parts import count_parts


@pytest.fixture(scope="module")
def cfg(tiny):
    return recipe.load(str(tiny))


def test_the_plans_figures(cfg, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    machine = machine_of(2, 1, 0.0, 0.01, 0.5)
    assert machine.world == 2 and machine.cpu and (machine.inside, machine.network) == (0.5, 0.5)
    found, parts = needs(cfg, machine), count_parts(cfg)
    rates = {}
    for stage in cfg.stages:
        cost = estimate_step(cfg, stage, machine, parts=parts)
        seconds = max(cost.compute, cost.network) + cost.latency / 2
        rates[stage.name] = cost.audio_hours * 3600 * FLAC_BYTES / seconds
    assert found.read_stage == max(rates, key=rates.get)
    assert found.read == pytest.approx(max(rates.values()))
    saved = checkpoint_bytes(cfg, parts)
    snapshots = 51 * 4 * parts["encoder"].parameters
    assert found.checkpoint == saved and found.space == saved * 11 + snapshots
    assert found.save_reason == "checkpoint.every_steps"


def test_text_alone_reads_nothing_and_slurm_sets_a_time(cfg, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    machine = machine_of(1, 1, 80.0, 300.0, 0.0)
    assert not machine.cpu and machine.inside == 200.0
    align = cfg.stage("align")
    silent = replace(cfg, stages=(cfg.stages[0], replace(align, text_share=1.0), *cfg.stages[2:]))
    silent = replace(silent, checkpoint=replace(cfg.checkpoint, every_steps=0, every_minutes=10.0))
    assert needs(silent, machine).read_stage != "align"
    assert needs(silent, machine).save_reason == "slurm.signal"


def test_ranks_read_different_shards(cfg):
    names = [[path[-10:] for path in paths] for paths in shards_of_ranks(cfg, 2)]
    assert names == [["000000.tar", "000002.tar"], ["000001.tar"]]
    assert [len(paths) for paths in shards_of_ranks(cfg, 8)] == [1] * 8  # more ranks than shards
