"""Which checkpoint a run resumes from, and when it must not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dsasr import config, recipe
from dsasr.build import Builder
from dsasr.checkpoint.manager import CheckpointManager
from dsasr.checkpoint.manifest import DIGEST, FORMAT, MANIFEST
from dsasr.checkpoint.merge import average
from dsasr.checkpoint.tensor_fragments import Fragment, FragmentReader
from dsasr.schedule import Progress
from dsasr.training import resume
from dsasr.utils.errors import UserError


def two_checkpoints(tiny: Path, folder: Path) -> CheckpointManager:
    """Two checkpoints of the tiny recipe."""
    cfg = recipe.load(str(tiny), [f"run={folder}", "checkpoint.keep=2"])
    manager = CheckpointManager(folder / "checkpoints", cfg.checkpoint)
    for steps in (1, 2):
        weights = {"w": Fragment((3,), 0, torch.full((3,), float(steps)))}
        state = dict.fromkeys(resume.STATE) | {"recipe": config.to_plain(cfg)}
        progress = config.to_plain(Progress())
        manager.save(steps, weights, {**state, "progress": progress, "branches": {}})
    return manager


def found_steps(tiny: Path, manager: CheckpointManager, *overrides: str):
    cfg = recipe.load(str(tiny), [f"run={manager.folder.parent}", *overrides])
    reader, passed_over = resume.find_checkpoint(cfg, manager)
    return (reader.manifest["steps"] if reader else None), passed_over


def test_auto_resumes_from_the_newest_whole_checkpoint_and_a_path_from_its_own(tiny, tmp_path):
    manager = two_checkpoints(tiny, tmp_path / "run")
    first, second = manager.list()
    assert found_steps(tiny, manager) == (2, [])
    assert found_steps(tiny, manager, f"resume={first}") == (1, [])
    file = next(second.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-4])
    steps, passed_over = found_steps(tiny, manager)
    assert steps == 1 and second.name in passed_over[0]
    empty = CheckpointManager(tmp_path / "none" / "checkpoints", manager.config)
    assert found_steps(tiny, empty) == found_steps(tiny, empty, "resume=never") == (None, [])


def test_a_refused_resume_names_the_fix(tiny, tmp_path):
    manager = two_checkpoints(tiny, tmp_path / "run")
    with pytest.raises(UserError, match=r"holds a run already.*run=FOLDER"):
        found_steps(tiny, manager, "resume=never")
    with pytest.raises(UserError, match=r"resume=.*nowhere"):
        found_steps(tiny, manager, f"resume={tmp_path / 'nowhere'}")
    changed = "model.encoder.dropout=0.3"
    with pytest.raises(UserError, match=r"model\.encoder\.dropout: 0\.1 → 0\.3.*allow_changed"):
        found_steps(tiny, manager, changed)
    assert found_steps(tiny, manager, changed, "allow_changed=true") == (2, [])


def test_files_with_another_content_are_refused(tiny, tmp_path):
    cmvn, words = tmp_path / "cmvn.json", tmp_path / "words"
    cmvn.write_bytes((tiny.parent / "cmvn.json").read_bytes())
    words.write_text("ba b a\ndo d o\nfi f i\ngu g u\n")
    overrides = [f"data.cmvn={cmvn}", f"run={tmp_path / 'run'}",
                 f"data.phonemizer={{kind: lexicon, lexicons: ['{words}']}}"]  # fmt: skip
    cfg = recipe.load(str(tiny), overrides)
    manifest = {"contents": resume.contents(Builder(cfg))}
    assert set(manifest["contents"]) == {
        "data.cmvn", "data.phonemes", "data.phonemizer.lexicons[0]", "model.tokenizer",
    }  # fmt: skip
    resume.check_contents(manifest, Builder(cfg))
    resume.check_contents({}, Builder(cfg))  # a checkpoint of before
    words.write_text("ba b a\ndo d o\nfi f i\ngu g o\n")
    with pytest.raises(UserError, match=r"another content of data\.phonemizer\.lexicons\[0\]: put"):
        resume.check_contents(manifest, Builder(cfg))
    cmvn.write_text(cmvn.read_text() + " ")
    with pytest.raises(UserError, match=r"content of data\.cmvn, data\.phonemizer"):
        resume.check_contents(manifest, Builder(cfg))
    changed = recipe.load(str(tiny), [*overrides, "allow_changed=true"])
    resume.check_contents(manifest, Builder(changed))


def test_a_checkpoint_has_the_contents_that_the_run_started_with(tiny, trainer_of, tmp_path):
    cmvn = tmp_path / "cmvn.json"
    cmvn.write_bytes((tiny.parent / "cmvn.json").read_bytes())
    trainer = trainer_of(tmp_path / "run", f"data.cmvn={cmvn}")
    trainer.branches.get("pretrain")
    cmvn.write_text(cmvn.read_text() + " ")
    assert trainer.save()
    trainer.close()
    with pytest.raises(UserError, match=r"another content of data\.cmvn"):
        trainer_of(tmp_path / "run", f"data.cmvn={cmvn}")


def test_a_deepspeed_json_with_another_content_is_refused(tiny, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    cfg = recipe.load(str(tiny), [f"engine.deepspeed={path}", f"run={tmp_path / 'run'}"])
    manifest = {"contents": resume.contents(Builder(cfg))}
    resume.check_contents(manifest, Builder(cfg))
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    with pytest.raises(UserError, match=r"another content of engine\.deepspeed: put the file back"):
        resume.check_contents(manifest, Builder(cfg))
    # One of the package's own goes by its name, which the recipe has.
    packaged = Builder(recipe.load(str(tiny), [f"run={tmp_path / 'run'}"]))
    assert "engine.deepspeed" not in resume.contents(packaged)


def test_a_check_before_the_ranks_meet_refuses_the_same(tiny, tmp_path):
    manager = two_checkpoints(tiny, tmp_path / "run")

    def check(*overrides: str) -> None:
        resume.check(recipe.load(str(tiny), [f"run={tmp_path / 'run'}", *overrides]))

    check()
    check(f"resume={manager.list()[0]}", "allow_changed=true")
    for overrides, says in (
        (["resume=never"], "holds a run already"),
        ([f"resume={tmp_path / 'nowhere'}"], "nowhere has no readable manifest"),
        (["seed=9"], "seed: 1 → 9"),
    ):
        with pytest.raises(UserError, match=says):
            check(*overrides)
    (tmp_path / "snapshot").mkdir()
    text = json.dumps({"format": FORMAT, "files": {}})
    (tmp_path / "snapshot" / MANIFEST).write_text(text)
    with pytest.raises(UserError, match="is no checkpoint of a run"):
        check(f"resume={tmp_path / 'snapshot'}")


def test_only_a_whole_checkpoint_of_this_architecture_is_resumed(tiny, tmp_path):
    manager = two_checkpoints(tiny, tmp_path / "run")
    path = manager.list()[0]
    # The same weights with other heads compute something else, also where changes are allowed.
    for named in ([], [f"resume={path}"]):
        with pytest.raises(UserError, match=r"another architecture.*model\.encoder\.heads=2"):
            found_steps(tiny, manager, "model.encoder.heads=4", "allow_changed=true", *named)
    mean = average([FragmentReader(p) for p in manager.list()], tmp_path / "mean")
    with pytest.raises(UserError, match=r"no checkpoint to resume from \(average\)"):
        found_steps(tiny, manager, f"resume={mean}")
    file = next(path.glob("*.safetensors"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # a flipped bit
    with pytest.raises(UserError, match=r"^resume=.*sha256") as caught:
        found_steps(tiny, manager, f"resume={path}")
    assert "\n" not in str(caught.value)
    file.write_bytes(whole)
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["steps"] = 3  # so it would not trip on its weights, but count wrongly
    (path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="its manifest was altered"):
        found_steps(tiny, manager, f"resume={path}")
    del manifest[DIGEST], manifest["streams"]
    (path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="has no 'streams'"):
        found_steps(tiny, manager, f"resume={path}")


def test_the_recipe_is_saved_in_the_run_folder(tiny, tmp_path):
    cfg = recipe.load(str(tiny), [f"run={tmp_path / 'run'}"])
    resume.save_recipe(cfg)
    saved = (cfg.folder / "recipe.yaml").read_text()
    assert saved == f"# relative paths are from {Path.cwd()}\n{config.dump(cfg)}"
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        resume.save_recipe(recipe.load(str(tiny), [f"run={tmp_path / 'file' / 'run'}"]))
