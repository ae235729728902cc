"""A run's relative paths lead where they led when it was started, from any folder."""

from __future__ import annotations

from pathlib import Path

from dsasr import recipe
from dsasr.checkpoint import stored_recipe
from dsasr.inference.model_from_run import run_recipe


def test_relative_paths_are_from_where_the_run_was_started(tiny, tmp_path, monkeypatch):
    start = tiny.parent
    monkeypatch.chdir(start)
    cfg = recipe.load(
        str(tiny),
        ["run=run", "data.cmvn=cmvn.json", "model.llm.path=lm", "data.train.tiny.shards=train",
         "data.valid.valid.shards=[valid/*.tar, http://host/x.tar]",
         "data.dataloader.noise={valid: 1.0, gone: 2.0}"],
    )  # fmt: skip
    run = tmp_path / "run"
    stored_recipe.write(run, cfg)
    assert run_recipe(run).data == cfg.data  # here
    monkeypatch.chdir(tmp_path)
    found = run_recipe(run, ["evaluation.rules=plain"])
    assert found.folder == run and found.evaluation.rules == "plain"
    assert Path(found.data.cmvn) == start / "cmvn.json"
    assert Path(found.model.llm.path) == start / "lm"
    assert found.data.train[0].shards == str(start / "train")
    assert found.data.valid[0].shards == (f"{start}/valid/*.tar", "http://host/x.tar")
    # What is not there stays as it was: a hub's name, a packaged lexicon, data of elsewhere.
    assert found.data.dataloader.noise == {str(start / "valid"): 1.0, "gone": 2.0}
    assert found.data.phonemes == cfg.data.phonemes  # absolute
    assert found.data.train[0].name == "tiny"


def test_a_recipe_without_its_folder_is_read_as_it_is(tiny, tmp_path, monkeypatch):
    from dsasr import config

    cfg = recipe.load(str(tiny), ["data.cmvn=cmvn.json"])
    (tmp_path / "recipe.yaml").write_text(config.dump(cfg))
    assert stored_recipe.read(tmp_path) == config.to_plain(cfg)
