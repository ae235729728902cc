"""The recipe's own rules, and the packaged recipes."""

from __future__ import annotations

import pytest

from dsasr import config, recipe
from dsasr.utils.errors import UserError

PACKAGED = sorted(path.stem for path in config.RECIPES.glob("*.yaml"))


@pytest.mark.parametrize("name", PACKAGED)
def test_packaged_recipes_load_and_say_what_they_are_for(name):
    cfg = recipe.load(name)
    assert cfg.run == f"runs/{name}" and (
        cfg.schedule().pretrain or cfg.model.init_from or cfg.has_initial_encoder
    )
    # Every stage gets data, and the resolved recipe reads back to itself.
    for stage in cfg.stages:
        assert cfg.dataloader(stage)[1]
    assert config.build(recipe.Recipe, config.to_plain(cfg)) == cfg
    head = (config.RECIPES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
    assert head.startswith("# ") and len(head) > 40


def test_a_stage_by_name():
    cfg = recipe.load("demo")
    assert cfg.stage("align") is cfg.stages[1]
    with pytest.raises(UserError, match="did you mean 'align'"):
        cfg.stage("algin")


def test_which_changes_matter_to_a_resumed_run():
    cfg = recipe.load("demo")
    saved = config.to_plain(cfg)
    other = recipe.load("demo", ["run=elsewhere", "monitor.every=5", "checkpoint.keep=9"])
    assert recipe.changed_settings(saved, other) == []
    other = recipe.load("demo", ["seed=2", "stages.align.steps=41"])
    changed = recipe.changed_settings(saved, other)
    assert sorted(changed) == ["seed: 1 → 2", "stages.align.steps: 40 → 41"]


def test_an_encoders_fingerprint_is_of_pretraining_alone():
    fingerprint = recipe.load("demo").encoder_fingerprint()
    assert recipe.load("demo", ["stages.ia_sft.steps=900"]).encoder_fingerprint() == fingerprint
    assert recipe.load("demo", ["run=elsewhere"]).encoder_fingerprint() == fingerprint
    for changed in ("seed=2", "model.encoder.layers=5", "stages.pretrain.steps=1300"):
        assert recipe.load("demo", [changed]).encoder_fingerprint() != fingerprint


VALID = "data.valid=[{name: a, shards: x}, {name: a, shards: y}]"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("run=''", "run is empty"),
        ("run=' '", "run is empty"),
        ("data.valid=[]", "data.valid names no dataset"),
        (VALID, "two datasets of data.valid are called 'a'"),
        ("stages.align.mixture={}", "'align' mixes no dataset"),
        ("stages.align.mixture={demo: 0}", "'align' mixes no dataset"),
        ("data.fbank.mels=40", "data.fbank.mels is 40, model.encoder.mels 80"),
        ("checkpoint.best=weer", "no metric 'weer' .did you mean 'wer'"),
        ("model.pretrain.consistency_warmup=5", "is for CR-CTC"),
        ("evaluation.decode={ctc_weight: 0.3}", "ctc_weight needs a beam above 1"),
        ("data.augment.kinds=[recorded]", "data.dataloader.noise=FOLDER"),
        ("drift.swaps=[{pretrain: 5}]", "no effect with drift.mode=cka"),
        ("stages.align.steps_after_final_swap=2", "give it swaps=true"),
        ("stages.align.trains={layer_sum: 1e-3}", "give model.encoder.layer_sum=true"),
        ("stages.align.name='<script>'", "is called '<script>'"),
    ],
)
def test_settings_that_make_no_run_are_refused(override, says):
    with pytest.raises(UserError, match=says) as error:
        recipe.load("demo", [override])
    assert "\n" not in str(error.value)


def test_a_sum_over_blocks_that_no_stage_learns_is_refused(tmp_path):
    summed = "model.encoder={path: x, layer_sum: true}"
    stages = "stages=[{{name: a, branch: sft, trains: {{{}: 1e-3, adaptor: 1e-3}}, steps: 3}}]"
    base = [summed, "model.llm.path=y", "evaluation.decode.ctc_weight=0", "data.augment=null"]
    for part in ("encoder", "layer_sum"):
        recipe.load("whisper-qwen3", [*base, stages.format(part), "model.lora=null"])
    with pytest.raises(UserError, match="no stage learns its weights: name layer_sum"):
        recipe.load("whisper-qwen3", [*base, stages.format("lora")])


def test_scores_of_a_language_rank_checkpoints():
    assert recipe.load("demo", ["checkpoint.best=wer/en"]).checkpoint.best == "wer/en"


def test_an_adaptor_that_reads_a_head_which_nothing_trains_is_refused():
    sft = "stages=[{name: align, branch: sft, trains: {PARTS}, steps: 3}]"
    reads = ["model.adaptor={kind: ctc}", "model.encoder={path: whisper}",
             "evaluation.decode.ctc_weight=0", "data.phonemizer.kind=characters"]  # fmt: skip
    alone = sft.replace("PARTS", "adaptor: 1.0e-3")
    with pytest.raises(UserError, match=r"a CTC head that nothing trains.*init_from=MODEL"):
        recipe.load("demo", [alone, *reads])
    recipe.load("demo", [sft.replace("PARTS", "adaptor: 1.0e-3, ctc: 1.0e-3"), *reads])
    recipe.load("demo", [alone, *reads, "model.init_from=x"])
    with pytest.raises(UserError, match="a CTC head that nothing trains"):
        recipe.load("demo", [alone, *reads, "model.init_from=x", "model.init_parts=[encoder]"])


def test_a_branch_without_an_encoder_is_refused():
    sft_only = "stages=[{name: align, branch: sft, trains: {adaptor: 1.0e-3}, steps: 3}]"
    without_head = [sft_only, "evaluation.decode.ctc_weight=0"]
    with pytest.raises(UserError, match=r"model\.encoder_from=SNAPSHOT"):
        recipe.load("demo", without_head)
    assert recipe.load("demo", [*without_head, "model.encoder_from=x"]).has_initial_encoder
