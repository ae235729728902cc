"""A run that starts with another model's weights: what it takes and refuses, how it resumes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from transformers import WhisperConfig, WhisperModel

from dsasr import config, recipe, train
from dsasr.build import Builder
from dsasr.checkpoint import zero_partition
from dsasr.checkpoint.locate import open_run_checkpoint
from dsasr.checkpoint.tensor_fragments import FragmentReader
from dsasr.data.text.phoneme_vocab import PhonemeVocab
from dsasr.inference import export
from dsasr.inference.model_from_run import RunModel
from dsasr.schedule import Snapshot
from dsasr.tracking.run_log import read_events
from dsasr.training import initial_weights
from dsasr.training.trainer import Trainer
from dsasr.utils import distributed
from dsasr.utils.errors import UserError

# There is no process group here to cut parameters for: ZeRO-2 leaves them whole.
WHOLE = "engine.deepspeed=zero2"


def snapshot_of(run: Path) -> Path:
    return run / "snapshots" / "encoder-000000000"


def checkpoint_of(run: Path) -> Path:
    return run / "checkpoints" / "step-0000000000"


def finetune(tiny: Path, folder: Path, model: Path, *overrides: str) -> recipe.Recipe:
    """The packaged recipe on the tiny corpus."""
    shards = [f"data.train.own.shards={tiny.parent / 'train'}",
              f"data.valid.own-valid.shards={tiny.parent / 'valid'}"]  # fmt: skip
    few = ["data.dataloader={num_workers: 0, batch: {frames: 400, min_seconds: 0.05}}",
           "monitor.tensorboard=false"]  # fmt: skip
    return recipe.load(
        "finetune", [f"run={folder}", f"model.init_from={model}", WHOLE, *shards, *few, *overrides]
    )


def weights(trainer: Trainer, branch: str, prefix: str = "") -> dict[str, torch.Tensor]:
    module = trainer.branches.get(branch).module
    return {n: t.detach().clone() for n, t in zero_partition.named_tensors(module, prefix).items()}


def stored(run: Path, prefix: str) -> dict[str, torch.Tensor]:
    reader = FragmentReader(checkpoint_of(run))
    keys = [k for k in reader.shapes if k.startswith(prefix)]
    return {k.partition("/")[2]: reader.whole(k) for k in keys}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def initialized(folder: Path) -> list[dict]:
    return [e for e in read_events(folder) if e["event"] == "initialized"]


# -- what is taken -----------------------------------------------------------------------------


def test_before_the_first_step_a_fine_tuned_export_says_what_it_said(tiny, source, tmp_path):
    cfg = finetune(tiny, tmp_path / "run", source / "model")
    expected = export.load_export(source / "model").model
    of_run = recipe.load(str(tiny))
    assert (cfg.model.encoder, cfg.model.adaptor) == (of_run.model.encoder, of_run.model.adaptor)
    trainer = Trainer(cfg)
    module = trainer.branches.get("sft").module.eval()
    for batch in trainer.builder.validation_batches("sft"):
        with torch.no_grad():
            ours, theirs = module(batch), expected(batch)
            assert torch.equal(ours.loss, theirs.loss)
            assert torch.equal(ours.sums["entropy"][0], theirs.sums["entropy"][0])
            prompts = module.prompts(batch)[0], expected.prompts(batch)[0]
            assert torch.equal(*prompts)
    trainer.close()
    event = initialized(cfg.folder)[0]
    assert event["key"] == "init_from" and event["left"] == {} and event["head_kept"]
    assert list(event["taken"]) == ["encoder", "adaptor", "llm"] and list(event["fresh"]) == [
        "lora"
    ]
    adaptor = expected.adaptor
    assert event["taken"]["adaptor"] == [4, sum(p.numel() for p in adaptor.parameters())]
    # The sft branch starts with it at once.
    turn = trainer.next_turn()
    assert (turn.kind, turn.stage.name, turn.load.id) == ("step", "adapt", "given")


def test_fine_tuning_keeps_the_head_of_its_encoder(tiny, source, tmp_path):
    """Its transcripts are scored and timed by it; so are those of a fine-tuning of that."""
    model = source / "model"
    theirs = export.load_export(model).model.ctc.state_dict()
    for folder, start in (("a", model), ("b", tmp_path / "a")):
        trainer = Trainer(finetune(tiny, tmp_path / folder, start))
        assert trainer.branches.get("sft").module.ctc is None
        assert trainer.save()
        trainer.close()
        of_run = RunModel.from_run(tmp_path / folder).model
        assert same(of_run.ctc.state_dict(), theirs) and of_run.speller is not None

    damaged = tmp_path / "b" / "ctc_head" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"ctc_head/model\.safetensors cannot be read"):
        RunModel.from_run(tmp_path / "b")

    def head_kept(*overrides: str) -> bool:
        cfg = finetune(tiny, tmp_path / "c", model, *overrides)
        (plan,) = initial_weights.plan(Builder(cfg))
        assert ("head" in plan.left) == (not plan.head)
        return bool(plan.head)

    assert head_kept("model.init_parts=[encoder, llm, head]")
    assert not head_kept("model.init_parts=[encoder, llm]")
    # A new start without it leaves none of an earlier one.
    shutil.copytree(tmp_path / "a" / "ctc_head", tmp_path / "d" / "ctc_head")
    without = "model.init_parts=[encoder, adaptor, llm]"
    Trainer(finetune(tiny, tmp_path / "d", model, without)).close()
    assert not (tmp_path / "d" / "ctc_head").exists()
    # One of other units stays behind.
    other = PhonemeVocab([*PhonemeVocab.load(model / "phonemes.json").symbols[1:], "new"])
    other.save(tmp_path / "phonemes.json")
    assert not head_kept(f"data.phonemes={tmp_path / 'phonemes.json'}")


@pytest.mark.parametrize("kind", ["run", "checkpoint"])
def test_both_branches_take_their_own_from_a_run(source, tmp_path, kind, trainer_of):
    run = source / "run"
    place = run if kind == "run" else checkpoint_of(run)
    trainer = trainer_of(tmp_path / "run", f"model.init_from={place}", "seed=2")
    for branch in ("pretrain", "sft"):
        assert same(weights(trainer, branch), stored(run, f"{branch}/"))
    assert not same(stored(run, "pretrain/encoder."), stored(run, "sft/encoder."))
    event = initialized(trainer.recipe.folder)[0]
    assert list(event["taken"]) == ["encoder", "head", "adaptor", "llm"]
    assert event["left"] == event["fresh"] == {}
    # Pretraining still publishes what the sft branch waits for.
    assert not trainer.recipe.has_initial_encoder and trainer.next_turn().stage.name == "pretrain"
    trainer.close()


def test_parts_are_chosen_and_the_rest_is_fresh(tiny, source, tmp_path, trainer_of):
    run = source / "run"
    fresh = Builder(recipe.load(str(tiny)))
    adaptor = dict(fresh.speech_llm().adaptor.named_parameters(prefix="adaptor"))
    trainer = trainer_of(tmp_path / "a", f"model.init_from={run}", "model.init_parts=[encoder]")
    assert same(weights(trainer, "sft", "encoder."), stored(run, "sft/encoder."))
    assert same(weights(trainer, "sft", "adaptor."), adaptor)
    trainer.close()
    event = initialized(tmp_path / "a")[0]
    assert list(event["taken"]) == ["encoder"]
    assert list(event["left"]) == list(event["fresh"]) == ["head", "adaptor", "llm"]
    trainer = trainer_of(tmp_path / "b", f"model.init_from={run}", "model.init_parts=[adaptor]")
    assert same(weights(trainer, "sft", "adaptor."), stored(run, "sft/adaptor."))
    encoder = dict(fresh.speech_llm().encoder.named_parameters(prefix="encoder"))
    assert same(weights(trainer, "sft", "encoder."), encoder)
    trainer.close()


def test_a_deeper_encoder_is_partly_fresh_with_a_warning(source, tmp_path, trainer_of, capsys):
    run = source / "run"
    overrides = [f"model.init_from={run}", "model.encoder.layers=2", "branch=sft"]
    trainer = trainer_of(tmp_path / "run", *overrides)
    encoder = weights(trainer, "sft", "encoder.")
    taken = {name: t for name, t in encoder.items() if ".blocks.1." not in name}
    assert same(taken, stored(run, "sft/encoder.")) and len(taken) < len(encoder)
    event = initialized(trainer.recipe.folder)[0]
    fresh = len(encoder) - len(taken)
    assert (event["taken"]["encoder"][0], event["fresh"]["encoder"][0]) == (len(taken), fresh)
    expected = f"WARNING only a part of the encoder is from {checkpoint_of(run)}: {fresh} of its "
    assert expected in capsys.readouterr().out


def test_lora_goes_on_from_a_run_with_lora(source, tmp_path, trainer_of, lora_overrides):
    trainer = trainer_of(
        tmp_path / "run", f"model.init_from={source / 'lora'}", "seed=2", *lora_overrides
    )
    assert same(weights(trainer, "sft"), stored(source / "lora", "sft/"))
    assert initialized(tmp_path / "run")[0]["taken"]["lora"][0] == 14
    trainer.close()


def test_encoder_from_a_snapshot_in_both_branches(source, tmp_path, trainer_of):
    """The pretrain branch too; its head, which the snapshot has, stays as drawn."""
    folder = snapshot_of(source / "run")
    trainer = trainer_of(tmp_path / "run", f"model.encoder_from={folder}", "seed=2")
    reader = FragmentReader(folder)
    expected = {k: reader.whole(k) for k in reader.shapes if k.startswith("encoder.")}
    for branch in ("pretrain", "sft"):
        assert same(weights(trainer, branch, "encoder."), expected)
    assert not torch.equal(weights(trainer, "pretrain")["ctc.project.weight"],
                           reader.whole("ctc.project.weight"))  # fmt: skip
    assert trainer.branches.get("sft").checksum() == reader.manifest["checksum"]
    assert list(initialized(tmp_path / "run")[0]["taken"]) == ["encoder"]
    turn = trainer.next_turn()  # with an encoder from outside the sft branch waits for none
    assert turn.load.id == "given" and turn.stage.branch == "sft"
    trainer.close()


def test_an_encoder_from_one_place_and_the_rest_from_another(source, tmp_path, trainer_of):
    places = [f"model.encoder_from={snapshot_of(source / 'run')}",
              f"model.init_from={source / 'model'}"]  # fmt: skip
    trainer = trainer_of(tmp_path / "run", *places, "seed=2")
    encoder = FragmentReader(snapshot_of(source / "run"))
    assert all(torch.equal(t, encoder.whole(n))
               for n, t in weights(trainer, "sft", "encoder.").items())  # fmt: skip
    assert same(weights(trainer, "sft", "adaptor."), stored(source / "run", "sft/adaptor."))
    first, second = initialized(tmp_path / "run")
    assert list(first["taken"]) == ["encoder"]
    assert list(second["taken"]) == ["head", "adaptor", "llm"]
    assert first["fresh"] == second["fresh"] == {}
    trainer.close()


def test_a_rank_reads_its_own_slices(tiny, source, tmp_path, monkeypatch, trainer_of):
    """Weights as ZeRO-3 partitions them, on the second of three ranks."""
    trainer = trainer_of(tmp_path / "run", "branch=sft")
    plan = initial_weights.plan(
        Builder(recipe.load(str(tiny), [f"run={tmp_path / 'b'}", WHOLE, "branch=sft",
                                        f"model.init_from={source / 'model'}"]))
    )  # fmt: skip
    engine = trainer.branches.get("sft")
    whole = {name: p.shape for name, p in zero_partition.named_parameters(engine.module)}
    for parameter in engine.module.parameters():
        parameter.ds_shape, size = parameter.shape, -(-parameter.numel() // 3)
        parameter.ds_tensor = torch.full((size,), torch.nan)
        parameter.ds_status = type("Status", (), {"name": "NOT_AVAILABLE"})()
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    opened = initial_weights.open_source(source / "model")
    read: list[int] = []

    class Counting:
        folder, shapes = opened.readers["sft"].folder, opened.readers["sft"].shapes

        def __contains__(self, key):
            return key in self.shapes

        def read(self, key, first, last):
            read.append(last - first)
            return opened.readers["sft"].read(key, first, last)

    engine.load_initial(Counting(), plan[0].names, set())
    files = opened.readers["sft"]
    for name, parameter in zero_partition.named_parameters(engine.module):
        size = parameter.ds_tensor.numel()
        expected = files.whole(name).reshape(-1)[size : 2 * size]
        assert torch.equal(parameter.ds_tensor[: len(expected)], expected), name
    assert max(read) == max(-(-shape.numel() // 3) for shape in whole.values())
    trainer.close()


def test_low_precision_weights_keep_the_masters_of_parts_that_train(source, tmp_path, trainer_of):
    """Those of a checkpoint, or float32 weights themselves: rounded, they are the weights."""
    overrides = [f"model.init_from={source / 'run'}", "engine.precision=bf16",
                 "stages.joint.trains={encoder: 1.0e-4, adaptor: 1.0e-3}",
                 "stages.ia_sft.trains={adaptor: 1.0e-3}"]  # fmt: skip
    trainer = trainer_of(tmp_path / "run", *overrides)
    engine, expected = trainer.branches.get("sft"), stored(source / "run", "sft/")
    masters = {
        key.removeprefix("sft/master/"): fragment.tensor
        for key, fragment in engine.fragments().items()
        if key.startswith("sft/master/")
    }
    trained = {n for n in expected if n.startswith(("encoder.", "adaptor."))}
    assert masters.keys() == trained
    for name, parameter in zero_partition.named_parameters(engine.module):
        assert torch.equal(parameter, expected[name].bfloat16())
        if name in masters:
            assert torch.equal(masters[name], expected[name].reshape(-1))
    assert trainer.save()
    trainer.close()
    # A run that is resumed before its first sft step has them too.
    again = trainer_of(tmp_path / "run", *overrides)
    fragments = again.branches.get("sft").fragments()
    for name, master in masters.items():
        assert torch.equal(fragments[f"sft/master/{name}"].tensor, master)
    again.close()


def test_each_job_of_a_concurrent_run_takes_its_own_parts(source, tmp_path, trainer_of):
    parts = [f"model.init_from={source / 'run'}", "model.init_parts=[head, adaptor]"]
    for branch, part in (("pretrain", "head"), ("sft", "adaptor")):
        trainer = trainer_of(tmp_path / "run", f"branch={branch}", *parts, "seed=2")
        prefix = {"head": "ctc."}.get(part, f"{part}.")
        assert same(weights(trainer, branch, prefix), stored(source / "run", f"{branch}/{prefix}"))
        assert list(initialized(trainer.recipe.folder)[0]["taken"]) == [part]
        trainer.close()


def test_an_sft_job_whose_adaptor_reads_the_ctc_head_takes_it_too(source, tmp_path, trainer_of):
    run = source / "run"
    parts = [f"model.init_from={run}", "model.init_parts=[encoder, head]"]
    parts += ["model.adaptor={kind: ctc}"]
    trainer = trainer_of(tmp_path / "run", "branch=sft", *parts, "seed=2")
    ctc = weights(trainer, "sft", "ctc.")
    assert ctc and same(ctc, stored(run, "pretrain/ctc."))
    trainer.close()


# -- resume ------------------------------------------------------------------------------------


def test_a_resumed_run_needs_the_source_no_more(tiny, source, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(source / "model", model)
    trainer = Trainer(finetune(tiny, tmp_path / "run", model))
    before = weights(trainer, "sft")
    assert trainer.save()
    trainer.close()
    shutil.rmtree(model)
    again = Trainer(finetune(tiny, tmp_path / "run", model))
    assert same(weights(again, "sft"), before) and again.progress.published[0].id == "given"
    again.close()
    assert len(initialized(tmp_path / "run")) == 1
    # Nor does what comes after training.
    restored = RunModel.from_run(tmp_path / "run")
    kept = zero_partition.named_tensors(restored.model)
    assert all(torch.equal(kept[name], weight) for name, weight in before.items())
    folder = export.export_run(
        restored.builder, open_run_checkpoint(tmp_path / "run"), tmp_path / "again"
    )
    state, expected = (export.load_export(f).model.state_dict() for f in (folder, source / "model"))
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)


def test_a_fresh_start_needs_the_source_and_leaves_nothing_without(tiny, tmp_path):
    with pytest.raises(UserError, match=r"model\.init_from: there is no folder .*/gone"):
        Trainer(finetune(tiny, tmp_path / "run", tmp_path / "gone"))
    assert not (tmp_path / "run").exists()


def test_an_export_carries_the_configuration_of_an_encoder_that_others_trained(
    tiny, tmp_path, trainer_of
):
    whisper = tmp_path / "whisper"
    shape = {"d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2,
             "encoder_ffn_dim": 32, "decoder_layers": 1, "decoder_attention_heads": 2,
             "decoder_ffn_dim": 8, "vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1,
             "eos_token_id": 2, "decoder_start_token_id": 1}  # fmt: skip
    WhisperModel(WhisperConfig(**shape)).save_pretrained(whisper)
    settings = [f"model.encoder={{path: {whisper}}}", "data.cmvn=''", "model.adaptor.stack=8",
                "model.pretrain.chunks=null", "data.dataloader.batch.max_seconds=20"]  # fmt: skip
    trainer = trainer_of(tmp_path / "run", *settings, "branch=sft", "seed=7")
    trainer.branches.get("sft")
    assert trainer.save()
    model = export.export_run(
        trainer.builder, open_run_checkpoint(tmp_path / "run" / "sft"), tmp_path / "model"
    )
    shutil.rmtree(whisper)
    seconds = "data.dataloader.batch.max_seconds=20"
    cfg = finetune(tiny, tmp_path / "tuned", model, seconds)
    assert cfg.model.encoder.path == str(model / "encoder") and cfg.model.adaptor.stack == 8
    tuned = Trainer(cfg)
    expected = export.load_export(model).model
    module = tuned.branches.get("sft").module.eval()
    for batch in tuned.builder.validation_batches("sft"):
        with torch.no_grad():
            assert torch.equal(module(batch).loss, expected(batch).loss)
    assert tuned.save()
    tuned.close()
    shutil.rmtree(model)
    again = Trainer(finetune(tiny, tmp_path / "tuned", model, seconds))
    assert same(weights(again, "sft"), stored(tmp_path / "tuned", "sft/"))
    again.close()


# -- beside --------------------------------------------------------------------------------------


def test_check_tells_whether_a_source_fits(tiny, source, tmp_path, capsys, trainer_of):
    overrides = [f"run={tmp_path / 'run'}", f"model.init_from={source / 'run'}", WHOLE]
    arguments = ["--recipe", str(tiny), "--check", *overrides]
    assert train.main(arguments) == 0 and "in order" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"\[32, 16\] there and \[48, 16\] here"):
        train.main([*arguments, "model.encoder.ffn=48"])
    # A run that resumes does not look.
    there = shutil.copytree(source / "run", tmp_path / "there")
    overrides = [f"run={tmp_path / 'run'}", f"model.init_from={there}", WHOLE]
    trainer = trainer_of(tmp_path / "run", *overrides[1:])
    assert trainer.save()
    shutil.rmtree(there)
    assert train.main(["--recipe", str(tiny), "--check", *overrides]) == 0


def test_a_store_knows_encoders_that_started_elsewhere(tiny):
    plain, started = (
        recipe.load(str(tiny), o).encoder_fingerprint() for o in ([], ["model.init_from=x"])
    )
    assert plain != started
    adaptor = recipe.load(str(tiny), ["model.init_from=x", "model.init_parts=[adaptor]"])
    assert adaptor.encoder_fingerprint() not in (plain, started)


def test_what_a_recipe_gives_itself_it_keeps(tiny, source, tmp_path):
    cfg = finetune(tiny, tmp_path / "run", source / "model", "model.encoder.dropout=0.3",
                   f"data.cmvn={tiny.parent / 'cmvn.json'}")  # fmt: skip
    assert (cfg.model.encoder.dropout, cfg.model.encoder.width) == (0.3, 16)
    assert cfg.data.cmvn == str(tiny.parent / "cmvn.json")
    assert cfg.model.llm.path == str(source / "model" / "llm")
    values = yaml.safe_load(config.dump(cfg))
    assert config.build(recipe.Recipe, values) == cfg
    # A part that is not taken brings no settings.
    partly = finetune(tiny, tmp_path / "run", source / "model", "model.init_parts=[encoder]")
    assert partly.model.adaptor.hidden == 0 and partly.model.llm.path == ""


def test_a_snapshot_of_an_encoder_and_its_head(source, tmp_path, trainer_of):
    """Pretraining goes on with both, where `encoder_from` would take the encoder alone."""
    folder = snapshot_of(source / "run")
    trainer = trainer_of(tmp_path / "run", f"model.init_from={folder}", "branch=pretrain")
    reader = FragmentReader(folder)
    assert all(torch.equal(t, reader.whole(n)) for n, t in weights(trainer, "pretrain").items())
    trainer.close()
    assert Snapshot(**{k: reader.manifest[k] for k in ("id", "pretrain", "cause")}).pretrain == 0
