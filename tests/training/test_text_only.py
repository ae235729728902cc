"""A run whose LLM reads what the CTC head writes, trained on speech and on text alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from dsasr import config, recipe
from dsasr.build import Builder
from dsasr.checkpoint.locate import open_run_checkpoint
from dsasr.checkpoint.manifest import MANIFEST
from dsasr.checkpoint.tensor_fragments import FragmentReader
from dsasr.data.text.phoneme_vocab import PhonemeVocab
from dsasr.inference import export
from dsasr.inference.model_from_run import RunModel
from dsasr.tracking.run_log import read_events, read_metrics
from dsasr.training import preflight
from dsasr.utils.errors import UserError

TRAIN = Path(__file__).parents[2] / "dsasr" / "train.py"
STAGES = [
    {"name": "head", "branch": "pretrain", "objective": "ctc", "trains": {"ctc": 5e-3}, "steps": 4},
    {"name": "tune", "branch": "pretrain", "objective": "ctc",
     "trains": {"encoder": 1e-3, "ctc": 5e-3}, "steps": 6},
    {"name": "read", "branch": "sft", "trains": {"adaptor": 1e-3, "llm": 1e-3}, "steps": 5,
     "text_share": 1.0},
    {"name": "ia_sft", "branch": "sft", "trains": {"adaptor": 1e-3, "llm": 1e-3}, "steps": 8,
     "text_share": 0.5, "swaps": True, "steps_after_final_swap": 2},
    {"name": "joint", "branch": "sft", "trains": {"encoder": 1e-4, "ctc": 1e-4, "adaptor": 1e-3},
     "steps": 5, "text_share": 0.4},
]  # fmt: skip
LAST = "step-0000000028"


@pytest.fixture(scope="module")
def overrides(tiny, tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("text")
    PhonemeVocab.build([["▁", *"badofigu"]]).save(folder / "characters.json")
    (folder / "text.txt").write_text("\n".join(["ba do", "fi gu ba", "gu", "do do fi", "ba fi"]))
    return [
        f"data.phonemes={folder}/characters.json", "data.phonemizer={kind: characters}",
        f"data.text_only={{path: {folder}/text.txt, samples: 4}}",
        "model.adaptor={kind: ctc, frames: true}", "model.pretrain.head.layers=1",
        "model.pretrain.spec=null", f"stages={json.dumps(STAGES)}",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(launch, tiny, overrides, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    done = launch(TRAIN, "--recipe", tiny, f"run={folder}", *overrides)
    assert done.returncode == 0, done.stdout[-3000:]
    return folder


def builder(run: Path) -> Builder:
    return Builder(config.build(recipe.Recipe, config.read_recipe(str(run / "recipe.yaml"))))


@pytest.mark.launcher
def test_stages_in_order_and_an_encoder_for_speech_alone(trained):
    events = list(read_events(trained))
    ends = [e["name"] for e in events if e["event"] == "stage_end"]
    assert sorted(ends[:3]) == ["head", "read", "tune"] and ends[3:] == ["ia_sft", "joint"]
    # Text alone needs no encoder: none is loaded before the stage with speech.
    swaps = [e for e in events if e["event"] == "swap"]
    assert swaps and swaps[0]["stage"] == "ia_sft"
    lines = [line for line in read_metrics(trained) if line.get("stage") == "read"]
    assert lines and all(line.get("nll", 1) > 0 for line in lines)


@pytest.mark.launcher
def test_the_head_stage_leaves_the_encoder_as_it_was(trained):
    fresh = builder(trained).ctc_model().encoder.state_dict()
    reader = FragmentReader(trained / "checkpoints" / "step-0000000007")
    assert reader.manifest["progress"]["pretrain"] > 1
    assert reader.manifest["branches"]["pretrain"]["stage"] == "head"
    for name, weight in fresh.items():
        assert torch.equal(reader.whole(f"pretrain/encoder.{name}"), weight), name


@pytest.mark.launcher
def test_a_resumed_run_ends_in_the_same_bits(trained, launch, tiny, overrides, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    (folder / "snapshots" / "PUBLISHER").unlink()  # the copied run's
    checkpoints = sorted((folder / "checkpoints").glob("step-*"))
    for path in checkpoints[1:]:
        shutil.rmtree(path)
    done = launch(TRAIN, "--recipe", tiny, f"run={folder}", *overrides)
    assert done.returncode == 0, done.stdout[-3000:]

    def checksums(run: Path) -> dict:
        return json.loads((run / "checkpoints" / LAST / MANIFEST).read_text())["files"]

    assert checksums(folder) == checksums(trained)


@pytest.mark.launcher
def test_the_export_decodes_as_the_run_and_weighs_the_ctc_head(trained, tmp_path):
    model = export.export_run(builder(trained), open_run_checkpoint(trained), tmp_path / "model")
    of_run, of_export = RunModel.from_run(trained).model, export.load_export(model).model
    weights = of_export.state_dict()
    assert any(name.startswith("ctc.layers.0") for name in weights)
    for name, weight in of_run.state_dict().items():
        assert torch.equal(weight, weights[name]), name
    assert of_export.speller("ba do", "en") == of_run.speller("ba do", "en") != []


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.adaptor={kind: mlp}", r"model\.adaptor\.kind=ctc"),
        ("model.adaptor={kind: ctc, merge: false}", "merge=true"),
        ("model.adaptor={kind: ctc, stack: 2}", "has no effect"),
        ("data.text_only=null", r"data\.text_only\.path"),
        ("data.text_only.path=/nowhere", "there is no /nowhere"),
        ("data.phonemizer.kind=stored", "from the shards"),
        ("stages.read.trains={encoder: 1.0e-3}", "text alone cannot train 'encoder'"),
        ("stages.tune.objective=cr_ctc", "one objective"),
        ("stages.head.text_share=0.5", "in branch sft"),
    ],
)
def test_a_mistake_is_one_line(tiny, overrides, override, message):
    with pytest.raises(UserError, match=message) as caught:
        preflight.check(Builder(recipe.load(str(tiny), [*overrides, override])))
    assert "\n" not in str(caught.value)
