"""LoRA in a recipe's encoder: what trains, what a snapshot and a checkpoint hold, what is exported.

tests/model/encoders/test_encoder_lora.py has the layers of every family.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from dsasr import config, recipe
from dsasr.analysis.probed_encoders import open_checkpoint, random_baseline
from dsasr.build import Builder
from dsasr.checkpoint import tensor_fragments, zero_partition
from dsasr.checkpoint.locate import open_run_checkpoint
from dsasr.checkpoint.snapshot_store import SnapshotStore
from dsasr.checkpoint.tensor_fragments import FragmentError, FragmentReader
from dsasr.inference import export
from dsasr.inference.model_from_run import RunModel
from dsasr.model import lora
from dsasr.model.lora import LoraConfig
from dsasr.recipe import Recipe
from dsasr.schedule import Snapshot
from dsasr.stages import StageConfig
from dsasr.training import preflight
from dsasr.utils.errors import UserError

MATRICES = [
    "model.encoder_lora={rank: 2, alpha: 6, dropout: 0.1}",
    "stages.pretrain.trains={encoder_lora: 1.0e-2, ctc: 1.0e-2}",
    "stages.joint.trains={encoder_lora: 1.0e-2, adaptor: 1.0e-3}",
]


def of_whisper(folder: Path) -> list[str]:
    """What the tiny recipe changes to start from a Whisper."""
    return [
        f"model.encoder={{path: {folder}}}", "data.cmvn=''", "model.adaptor.stack=8",
        "model.pretrain.chunks=null", "data.dataloader.batch.max_seconds=20",
    ]  # fmt: skip


@pytest.fixture(params=["conformer", "whisper"])
def load(request, tiny, whisper):
    """``load(*overrides)``: the tiny recipe with LoRA in its own encoder, or in a Whisper."""
    base = of_whisper(whisper) if request.param == "whisper" else []
    return lambda *overrides: recipe.load(str(tiny), [*base, *MATRICES, *overrides])


def fill(module: torch.nn.Module, seed: int = 1) -> None:
    """Matrices as training might leave them: B is no longer zero."""
    generator = torch.Generator().manual_seed(seed)
    for _, matrix in lora.adapters(module):
        matrix.data.copy_(0.3 * torch.randn(matrix.shape, generator=generator))


def train(module, stage: StageConfig, batches, steps: int = 3) -> None:
    """Steps of the stage without an engine: as `BranchEngine` chooses what trains."""
    module.requires_grad_(False)
    trained = [p for part in stage.trains for p in lora.part(module, part)]
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    module.train()
    for number in range(steps):
        module(batches[number % len(batches)]).loss.backward()
        assert all(p.grad is not None for p in trained)
        optimizer.step()
        optimizer.zero_grad()


def without_lora(cfg: Recipe) -> Recipe:
    """The same recipe with an encoder that trains whole."""
    stages = tuple(
        dataclasses.replace(
            stage, trains={n.removesuffix("_lora"): rate for n, rate in stage.trains.items()}
        )
        for stage in cfg.stages
    )
    return dataclasses.replace(
        cfg, stages=stages, model=dataclasses.replace(cfg.model, encoder_lora=None)
    )


def part_of(name: str) -> str:
    top = name.partition(".")[0]
    if lora.is_adapter(name):
        return "encoder_lora" if top == "encoder" else "lora"
    return top


# -- built -------------------------------------------------------------------------------------


def test_both_branches_have_the_same_matrices_and_the_weights_of_a_model_without(load):
    cfg = load()
    plain = without_lora(cfg)
    drawn: dict[str, dict[str, torch.Tensor]] = {}
    for branch in ("pretrain", "sft"):
        module = Builder(cfg).module(branch)
        named = dict(zero_partition.named_parameters(module))
        drawn[branch] = {n: p for n, p in named.items() if lora.is_adapter(n)}
        sliced = Builder(cfg).module(branch, lambda parameters: None)
        for name, parameter in zero_partition.named_parameters(sliced):
            assert torch.equal(parameter, named[name]), name
        for name, parameter in zero_partition.named_parameters(Builder(plain).module(branch)):
            assert torch.equal(parameter, named[name]), name
    assert drawn["pretrain"].keys() == drawn["sft"].keys() and drawn["sft"]
    for name, matrix in drawn["pretrain"].items():
        assert name.startswith("encoder.") and torch.equal(matrix, drawn["sft"][name])
        assert matrix.any() == (".lora_A." in name)
    reseeded = Builder(dataclasses.replace(cfg, seed=2)).module("sft")
    assert not any(
        torch.equal(p, drawn["sft"][f"encoder.{n}"])
        for n, p in lora.adapters(reseeded.encoder) if ".lora_A." in n
    )  # fmt: skip


def test_only_the_matrices_move(load):
    cfg = load()
    for branch, name in (("pretrain", "pretrain"), ("sft", "joint")):
        build, stage = Builder(cfg), cfg.stage(name)
        module = build.module(branch)
        before = {n: p.detach().clone() for n, p in zero_partition.named_parameters(module)}
        train(module, stage, build.validation_batches(branch))
        changed = {
            part_of(n) for n, p in zero_partition.named_parameters(module)
            if not torch.equal(p, before[n])
        }  # fmt: skip
        assert changed == set(stage.trains)


def test_dropout_is_the_matrices_own_and_only_while_they_train(load):
    cfg = load(
        "model.encoder.dropout=0.0", "model.pretrain.spec=null", "model.pretrain.chunks=null"
    )
    for branch in ("pretrain", "sft"):
        build = Builder(cfg)
        module, batch = build.module(branch), build.validation_batches(branch)[0]
        fill(module)
        head = "ctc" if branch == "pretrain" else "adaptor"
        losses = {}
        for trained in ("encoder", "encoder_lora", head):
            module.requires_grad_(False)
            for parameter in lora.part(module, trained):
                parameter.requires_grad_(True)
            losses[trained] = float(module.train()(batch).loss.detach())
        calm = float(module.eval()(batch).loss.detach())
        noisy = {n for n, value in losses.items() if value != pytest.approx(calm, abs=1e-6)}
        assert noisy == {"encoder_lora"}, branch


# -- published, saved and exported -------------------------------------------------------------


def test_a_snapshot_holds_both_and_is_swapped_in_whole(load, tmp_path):
    cfg = load()
    build, store = Builder(cfg), SnapshotStore(tmp_path / "store")
    live, sft = build.module("pretrain"), build.module("sft")
    fill(live)
    store.claim("run")
    info = {"config": "c", "reference": None, "architecture": cfg.encoder_architecture()}
    assert store.publish(live, {}, Snapshot("encoder-000000007", 7, "drift"), info)
    reader = store.open("encoder-000000007", cfg.encoder_architecture())
    zero_partition.replace_weights(sft, reader, ("encoder.",))
    weights, swapped = (dict(zero_partition.named_parameters(m, "encoder.")) for m in (live, sft))
    assert weights.keys() == swapped.keys()
    assert all(torch.equal(p, swapped[n]) for n, p in weights.items())
    fragments = zero_partition.weight_fragments(sft, "encoder.")
    assert tensor_fragments.checksum(fragments) == reader.manifest["checksum"]
    batch = build.validation_batches("pretrain")[0]
    features = batch.features_BTF, batch.feature_lengths_B
    with torch.no_grad():
        a, b = (m.eval().encoder(*features).frames_BSE for m in (live, sft))
    assert torch.equal(a, b)
    # The other way of a colocated run.
    fill(live, seed=2)
    named = (zero_partition.named_tensors(m, "encoder.") for m in (live, sft))
    zero_partition.copy_weights(*named)
    assert all(torch.equal(p, swapped[n]) for n, p in weights.items())


def test_other_matrices_are_another_architecture(load, tmp_path):
    cfg = load()
    store, live = SnapshotStore(tmp_path / "store"), Builder(cfg).module("pretrain")
    store.claim("run")
    info = {"config": "c", "reference": None, "architecture": cfg.encoder_architecture()}
    store.publish(live, {}, Snapshot("encoder-000000007", 7, "drift"), info)
    for matrices in ("{rank: 3}", "{rank: 2, alpha: 4}"):
        other = load(f"model.encoder_lora={matrices}")
        with pytest.raises(FragmentError, match=r"model\.encoder_lora is not this recipe's"):
            store.open("encoder-000000007", other.encoder_architecture())
    reader = FragmentReader(store.folder / "encoder-000000007")
    without = without_lora(cfg)
    with pytest.raises(FragmentError, match=r"which this model lacks: give the model\.lora or"):
        zero_partition.replace_weights(Builder(without).module("sft"), reader, ("encoder.",))
    assert without.encoder_architecture() != cfg.encoder_architecture()
    assert without.encoder_fingerprint() != cfg.encoder_fingerprint()


@pytest.fixture
def trained(load, tmp_path) -> Path:
    """A run folder whose checkpoint holds matrices that have been trained."""
    cfg = load(f"run={tmp_path / 'run'}")
    build = Builder(cfg)
    model = build.speech_llm()
    fill(model)
    train(model, cfg.stage("joint"), build.validation_batches("sft"))
    folder = Path(cfg.run) / "checkpoints" / "step-0000000042"
    folder.parent.mkdir(parents=True)
    fragments = {f"sft/{k}": f for k, f in zero_partition.weight_fragments(model).items()}
    progress = {"pretrain": 20, "in_use": None}
    manifest = {"kind": "checkpoint", "steps": 42, "progress": progress,
                "branches": {"sft": {"stage": "joint"}}}  # fmt: skip
    tensor_fragments.write_folder(folder, fragments, manifest)
    (Path(cfg.run) / "recipe.yaml").write_text(config.dump(cfg))
    return Path(cfg.run)


def test_exported_it_is_a_plain_encoder_that_says_the_same(trained, tmp_path):
    """Merged and unmerged agree to 1e-5 of the largest value in float32."""
    run = RunModel.from_run(trained)
    reader = open_run_checkpoint(trained)
    names = {k.removeprefix("sft/") for k in reader.shapes}
    expected = set(Builder(without_lora(run.builder.recipe)).speech_llm().state_dict())
    without = {n for n in names if not lora.is_adapter(n)}
    assert without == expected - {"llm.lm_head.weight"}
    matrices = names - without
    assert matrices and all(n.startswith("encoder.") for n in matrices)
    assert all(n.endswith((".lora_A.default.weight", ".lora_B.default.weight")) for n in matrices)
    folder = export.export_run(run.builder, reader, tmp_path / "model")
    exported = export.load_export(folder)
    assert not any("lora" in name for name in exported.model.state_dict())
    batch = run.builder.validation_batches("sft")[0]
    with torch.no_grad():
        ours = run.model.encode(batch).frames_BSE
        theirs = exported.model.encode(batch).frames_BSE
        for _, matrix in lora.adapters(run.model.encoder):
            matrix.zero_()
        bare = run.model.encode(batch).frames_BSE
    scale = float(ours.abs().max())
    assert float((ours - theirs).abs().max()) < 1e-5 * scale
    assert float((ours - bare).abs().max()) > 0.02 * scale, "the matrices do something"


def test_what_cannot_be_exported_is_said(trained, tmp_path):
    build, reader = RunModel.from_run(trained).builder, open_run_checkpoint(trained)
    none = Builder(without_lora(build.recipe))
    with pytest.raises(UserError, match=r"disagree on model\.encoder_lora"):
        export.export_run(none, reader, tmp_path / "model")
    with pytest.raises(UserError, match="its language model has no LoRA"):
        export.export_run(build, reader, tmp_path / "model", adapter=True)


def test_a_probed_encoder_has_its_matrices_and_a_random_one_fresh_ones(trained):
    probed, run = open_checkpoint(trained), RunModel.from_run(trained)
    expected = dict(lora.adapters(run.model.encoder))
    assert expected
    for name, matrix in lora.adapters(probed.encoder):
        assert torch.equal(matrix, expected[name])
    baseline = dict(lora.adapters(random_baseline(probed).encoder))
    assert baseline.keys() == expected.keys()
    assert all(matrix.any() == (".lora_A." in name) for name, matrix in baseline.items())


# -- refused -----------------------------------------------------------------------------------


def test_a_stage_trains_one_of_both_and_needs_its_settings(tiny):
    for branch in ("pretrain", "sft"):
        with pytest.raises(UserError, match="both 'encoder' and 'encoder_lora'"):
            StageConfig("x", branch, {"encoder": 1e-3, "encoder_lora": 1e-3}, steps=3)
    with pytest.raises(UserError, match=r"give model\.encoder_lora, such as"):
        recipe.load(str(tiny), MATRICES[1:])
    with pytest.raises(UserError, match="no stage trains 'encoder_lora'"):
        recipe.load(str(tiny), MATRICES[:1])
    # Without training, its matrices are a snapshot's.
    cfg = recipe.load(str(tiny), [MATRICES[0], "model.encoder_from=somewhere"])
    assert cfg.parts("sft") == ("encoder", "encoder_lora", "adaptor", "llm")
    with pytest.raises(UserError, match="rank must be from 1 to"):
        LoraConfig(rank=0)
    bad = recipe.load(str(tiny), [*MATRICES, "model.encoder_lora.targets=[project]"])
    with pytest.raises(UserError, match="none of the linear layers of the encoder's blocks"):
        preflight.check(Builder(bad))


def test_a_stage_that_trains_the_matrices_keeps_its_encoder(tiny):
    """No later snapshot replaces what the sft branch has trained."""
    cfg: Recipe = recipe.load(str(tiny), MATRICES)
    joint = cfg.stage("joint")
    assert joint.trains_encoder and joint.trains_sft_encoder
    assert cfg.stage("pretrain").trains_encoder and not cfg.stage("pretrain").trains_sft_encoder
    assert not cfg.stage("ia_sft").trains_encoder
