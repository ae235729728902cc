"""Which encoders are opened, and what audio they read."""

from __future__ import annotations

import json

import pytest
import torch

from dsasr import config, recipe
from dsasr.analysis import probed_encoders
from dsasr.analysis.measure_allocation import llm_allocation
from dsasr.analysis.probed_encoders import MAX_SECONDS, max_seconds, open_encoder, random_baseline
from dsasr.build import Builder
from dsasr.checkpoint import stored_recipe, tensor_fragments
from dsasr.checkpoint.locate import checkpoint_name, list_checkpoints
from dsasr.checkpoint.manifest import manifest_of, write_manifest
from dsasr.checkpoint.merge import average
from dsasr.checkpoint.tensor_fragments import Fragment, FragmentReader
from dsasr.evaluation.eval_sets import read_recordings
from dsasr.inference.export import export_run


def test_the_longest_recording_is_one_that_all_encoders_can_read(tmp_path):
    folders = [tmp_path / name for name in ("whisper", "hubert")]
    for folder in folders:
        folder.mkdir()
    whisper = {"model_type": "whisper", "max_source_positions": 50}
    (folders[0] / "config.json").write_text(json.dumps(whisper))
    (folders[1] / "config.json").write_text('{"model_type": "hubert"}')
    assert probed_encoders.max_seconds(folders) == pytest.approx(1.0)
    assert probed_encoders.max_seconds(folders[1:]) == probed_encoders.MAX_SECONDS


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """A run with two checkpoints of its sft branch, their average elsewhere, and an export."""
    folder = tmp_path_factory.mktemp("probed") / "run"
    cfg = recipe.load(str(tiny), [f"run={folder}"])
    build = Builder(cfg)
    model = build.speech_llm()
    for number in (1, 2):
        checkpoint = folder / "checkpoints" / checkpoint_name(number)
        checkpoint.mkdir(parents=True)
        fragments = {
            f"sft/{name}": Fragment(tuple(weight.shape), 0, number * weight.detach().reshape(-1))
            for name, weight in model.named_parameters()
        }
        name = tensor_fragments.rank_file(0)
        digest = tensor_fragments.write_file(checkpoint / name, fragments)
        manifest = {"steps": number, "recipe": config.to_plain(cfg)}
        write_manifest(checkpoint, manifest_of(manifest, {name: digest}))
    stored_recipe.write(folder, cfg)
    readers = [FragmentReader(path) for path in list_checkpoints(folder / "checkpoints")]
    average(readers, folder.parent / "mean")
    export_run(build, readers[-1], folder.parent / "model")
    return folder


def test_averages_and_exports_are_probed_with_their_language_model(run, tiny):
    recordings, _ = read_recordings(str(tiny.parent / "valid"), limit=2)
    mean, export = open_encoder(run.parent / "mean"), open_encoder(run.parent / "model")
    assert (mean.source.kind, mean.source.name, mean.source.steps) == ("average", "mean", 2)
    assert (export.source.kind, export.source.name, export.source.steps) == ("export", "model", 2)
    weights = [next(encoder.encoder.parameters()) for encoder in (mean, export)]
    torch.testing.assert_close(weights[0] / 1.5, weights[1] / 2)
    assert mean.frame_seconds == export.frame_seconds == 0.04
    assert max_seconds([run.parent / "mean", run.parent / "model"]) == MAX_SECONDS
    for encoder in (mean, export, random_baseline(export), random_baseline(mean)):
        features = encoder.encode(recordings)
        assert features.keys() == {r.key for r in recordings}
    for encoder in (mean, export):
        row = llm_allocation(encoder.llm, encoder.front_end, encoder.tokenizer, recordings)
        assert row.nll_with_audio > 0
