"""`dsasr init` from a corpus to its folder: whole or not at all, and done once."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from dsasr import recipe
from dsasr.build import Builder
from dsasr.data.shards.writer import read_dataset
from dsasr.setup import project, ways
from dsasr.setup.project import init
from dsasr.setup.workspace import Options
from dsasr.training import preflight
from dsasr.utils.errors import UserError


@pytest.fixture
def run(tmp_path, models, monkeypatch):
    """``run(folder, …)``: what the command says, in lines; works in ``tmp_path``."""
    monkeypatch.chdir(tmp_path)

    def command(*data: Path, **options) -> list[str]:
        lines: list[str] = []
        given = {"processes": 1, **models, **options}
        init(Options(tuple(data), **given), say=lines.append)
        return lines

    return command


def refusal(run, /, *data: Path, **options) -> str:
    with pytest.raises(UserError) as error:
        run(*data, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def corpus(make, folder: Path, count: int = 40, **splits: int) -> Path:
    make.jsonl(folder / "train.jsonl", make.rows(count, speakers=10))
    return folder


def test_from_a_manifest_to_a_recipe_that_training_takes(tmp_path, make, run):
    lines = run(corpus(make, tmp_path / "my speech"))
    said = "\n".join(lines)
    told = ("JSONL manifest", "made of the training data", "script Latin", "16,000 Hz", "en 40")
    for words in (*told, "seconds", "Planned on this machine"):
        assert words in said, words
    assert [line.split()[:2] for line in lines if line.startswith("dsasr ")] == [
        ["dsasr", "train"], ["dsasr", "train"], ["dsasr", "evaluate"]
    ]  # fmt: skip
    folder = tmp_path / "mine"
    names = {"init.json", "mine.yaml", "shards", "text.txt", "try.yaml", "units.json"}
    assert {path.name for path in folder.iterdir()} == names
    samples = {name: read_dataset(folder / "shards" / name)["samples"]
               for name in ("train", "valid", "test")}  # fmt: skip
    assert sum(samples.values()) == 40 and min(samples.values()) >= 4
    for name in ("mine.yaml", "try.yaml"):
        preflight.check(Builder(recipe.load(str(folder / name))))
    assert not list(tmp_path.glob(".mine*"))


def test_a_second_run_does_nothing_and_says_so(tmp_path, make, run):
    folder = corpus(make, tmp_path / "in")
    first = run(folder)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "mine").rglob("*")}
    again = run(folder)
    assert "nothing was done again" in again[0]
    assert again[-3:] == first[-3:]
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "mine").rglob("*")}


def test_other_data_or_options_need_a_word(tmp_path, make, run):
    folder = corpus(make, tmp_path / "in")
    run(folder)
    shard = next((tmp_path / "mine" / "shards" / "train").glob("*.tar"))
    place = shard.stat().st_ino
    assert "other options" in refusal(run, folder, encoder="scratch")
    run(folder, run=Path("elsewhere"), overwrite=True)
    assert shard.stat().st_ino == place  # not packed again
    assert recipe.load("mine/mine.yaml").run == str(tmp_path / "elsewhere")
    corpus(make, folder, 30)
    assert "other data" in refusal(run, folder, run=Path("elsewhere"))
    run(folder, run=Path("elsewhere"), overwrite=True)
    assert sum(read_dataset(f"mine/shards/{name}")["samples"]
               for name in ("train", "valid", "test")) == 30  # fmt: skip


def test_a_dry_run_writes_nothing(tmp_path, make, run):
    folder = corpus(make, tmp_path / "in")
    before = sorted(tmp_path.rglob("*"))
    said = "\n".join(run(folder, dry_run=True))
    assert sorted(tmp_path.rglob("*")) == before
    assert "nothing was written" in said and "base: whisper-read" in said
    said = "\n".join(run(folder, dry_run=True, llm=""))
    assert "nothing was written" in said and "base:" not in said


def test_a_failure_leaves_no_folder(tmp_path, make, run, monkeypatch):
    folder = corpus(make, tmp_path / "in")
    monkeypatch.setattr(project.preflight, "check", lambda builder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(folder)
    assert not list(tmp_path.glob("*mine*"))


def test_an_interrupted_run_goes_on_with_its_shards(tmp_path, make, run, monkeypatch):
    folder = corpus(make, tmp_path / "in")

    def interrupt(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(project, "try_recipe", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(folder)
    assert not (tmp_path / "mine").exists()
    (shard,) = (tmp_path / ".mine.tmp" / "shards" / "train").glob("*.tar")
    place = shard.stat().st_ino
    run(folder)
    assert (tmp_path / "mine" / "shards" / "train" / shard.name).stat().st_ino == place


@pytest.mark.parametrize(
    ("layout", "splits", "sets"),
    [
        ("librispeech", {"train_clean_100": 12, "dev_clean": 3, "test_clean": 3},
         {"train-clean-100": 12, "dev-clean": 3, "test-clean": 3}),
        ("aishell", {"train": 9, "dev": 3, "test": 3}, {"train": 9, "dev": 3, "test": 3}),
    ],
)  # fmt: skip
def test_trees_keep_their_splits(tmp_path, make, run, layout, splits, sets):
    getattr(make, layout)(tmp_path / layout, **splits)
    run(tmp_path / layout)
    assert {name: read_dataset(f"mine/shards/{name}")["samples"] for name in sets} == sets
    data = recipe.load("mine/mine.yaml").data
    assert len(data.train) == len(data.valid) == 1


def test_ten_files_by_one_speaker(tmp_path, make, run):
    make.jsonl(tmp_path / "in" / "a.jsonl", make.rows(10, speakers=1))
    lines = run(tmp_path / "in")
    (line,) = [line for line in lines if line.startswith("made of the training data")]
    assert "valid (1) and test (1)" in line and "voices that it knows" in line


def test_data_that_cannot_be_written_to(tmp_path, make, run):
    folder = corpus(make, tmp_path / "in")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    for path in (*before, folder):
        os.chmod(path, 0o555 if path.is_dir() else 0o444)
    try:
        run(folder)
    finally:
        for path in (folder, *before):
            os.chmod(path, 0o755)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_audio_that_cannot_be_read_is_named(tmp_path, make, run):
    folder = corpus(make, tmp_path / "in")
    broken = folder / "audio" / "u000.wav"
    broken.write_bytes(broken.read_bytes()[:1000])
    said = "\n".join(run(folder))
    assert "1 left out, see" in said and "bad_samples.jsonl" in said
    for path in (folder / "audio").iterdir():
        path.write_bytes(b"RIFF")
    message = refusal(run, folder, out=Path("other"))
    assert "none of the" in message and not (tmp_path / "other").exists()


def test_what_is_refused_before_any_work(tmp_path, make, run, models):
    folder = corpus(make, tmp_path / "in")
    assert "--llm is not given" in refusal(run, folder, llm="")
    assert "there is no" in refusal(run, folder, text=Path("nowhere.txt"))
    assert "line break" in refusal(run, folder, out=Path("a\nb"))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("x")
    assert "not of dsasr init" in refusal(run, folder, out=Path("taken"))
    assert "config.json" in refusal(run, folder, llm="no/such/folder")
    assert "no known encoder" in refusal(run, folder, encoder=models["llm"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "taken"]


@pytest.mark.parametrize(
    ("patch", "words"),
    [
        ((project.Device, "here", lambda: project.Device(0, 0.01, 1.0, 2)),
         "and 0.0 GB may be taken (85% of 0.0 GB free)"),
        ((ways, "SMALL_LLM", 0), "pip install 'dsasr[lora]'"),
    ],
    ids=["memory", "lora"],
)  # fmt: skip
def test_what_is_refused_before_anything_is_packed(tmp_path, make, run, monkeypatch, patch, words):
    def pack(*arguments):
        raise AssertionError("it was packed")

    folder = corpus(make, tmp_path / "in")
    monkeypatch.setattr(*patch)
    monkeypatch.setattr(ways, "is_installed", lambda module: False)
    monkeypatch.setattr(project.prepare, "pack_sets", pack)
    assert words in refusal(run, folder)
    assert not list(tmp_path.glob("*mine*"))


def test_a_hub_name_without_a_network(tmp_path, make, run, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = corpus(make, tmp_path / "in")
    message = refusal(run, folder, encoder="")  # the default, which is on the hub
    assert "--encoder" in message and "scratch" in message
    assert "--llm" in refusal(run, folder, llm="nobody/no-such-model")
    assert not list(tmp_path.glob("*mine*"))


def test_an_encoder_from_scratch_gets_its_mean_and_variance(tmp_path, make, run):
    said = run(corpus(make, tmp_path / "in"), encoder="scratch")
    built = recipe.load("mine/mine.yaml")
    assert Path(built.data.cmvn).is_file() and Path(built.data.phonemes).is_file()
    assert built.pretrained_encoder is None
    assert "some hundred hours" in " ".join(said)


def test_paths_of_the_recipe_work_from_anywhere(tmp_path, make, run, monkeypatch):
    run(corpus(make, tmp_path / "in"), out=Path("a place/mine"))
    text = (tmp_path / "a place" / "mine" / "mine.yaml").read_text()
    monkeypatch.chdir("/")
    preflight.check(Builder(recipe.load(str(tmp_path / "a place" / "mine" / "try.yaml"))))
    assert ".tmp/" not in text
    note = json.loads((tmp_path / "a place" / "mine" / "init.json").read_text())
    assert "'a place/mine/try.yaml'" in " ".join(note["lines"])
