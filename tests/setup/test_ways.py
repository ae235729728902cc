"""Data, machine and models decide about base, stages and lengths; each recipe that comes loads."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from dsasr import config
from dsasr.setup import parts, recipes, ways
from dsasr.setup.facts import Facts, ReadySet
from dsasr.setup.lengths import Lengths
from dsasr.setup.parts import Device, LanguageModel, SpeechEncoder
from dsasr.setup.recipes import load_text, main_recipe, try_recipe
from dsasr.setup.text_survey import TextSurvey
from dsasr.utils.errors import UserError

CPU, GPU = Device(0, 64.0, 0.05, 2), Device(8, 80.0, 300.0, 64)
WHISPER = SpeechEncoder("openai/whisper-base", 30.0, 80, 0.02)
WAVES = SpeechEncoder("facebook/wav2vec2-base", float("inf"), 1, 0.02)
QWEN = LanguageModel("Qwen/Qwen3-0.6B", 600_000_000, "qwen3", True, False, False)
TINY = LanguageModel("Qwen/Qwen3-0.6B", 45_000_000, "whisper", False, True, True)


def facts(hours: float, seconds: float = 5.0, text: str = "HELLO YOU", lang: str = "en") -> Facts:
    survey = TextSurvey()
    for _ in range(10):
        survey.add(text, lang)
    sets = []
    for name, role, share in (
        ("train", "train", 1.0),
        ("dev", "valid", 0.05),
        ("test", "test", 0.05),
    ):
        count = max(2, int(share * hours * 3600 / seconds))
        lengths = Lengths(np.full(count, seconds, np.float32), np.full(count, 60, np.int32))
        sets.append(ReadySet(name, role, f"/x y/{name}", (), lengths))
    return Facts(tuple(sets), survey, "characters", "/x/units.json", "/x/cmvn.json", "/x/text.txt")


@pytest.fixture(autouse=True)
def with_peft(monkeypatch):
    monkeypatch.setattr(ways, "is_installed", lambda module: True)


@pytest.mark.parametrize(
    ("hours", "encoder", "way"),
    [(0.75, WHISPER, "read"), (11, WHISPER, "adapt"), (1000, WAVES, "adapt"),
     (1000, SpeechEncoder(), "scratch")],
)  # fmt: skip
def test_the_way_goes_by_hours_and_encoder(hours, encoder, way):
    assert ways.choose_way(facts(hours), encoder) == way


@pytest.mark.parametrize("device", [CPU, GPU], ids=["cpu", "gpu"])
@pytest.mark.parametrize("llm", [QWEN, TINY], ids=["qwen", "tiny"])
@pytest.mark.parametrize(
    "encoder", [WHISPER, WAVES, SpeechEncoder()], ids=["whisper", "waves", "own"]
)
@pytest.mark.parametrize("hours", [0.75, 11, 960])
def test_every_recipe_loads_with_its_reasons(tmp_path, hours, encoder, llm, device):
    main, way = main_recipe(facts(hours), encoder, llm, device, "runs/mine", "title")
    assert main.total > 0 and way.expect
    assert [stage.name for stage in main.recipe.stages] == [stage["name"] for stage in way.stages]
    assert main.recipe.data.text.case == "lower"
    assert main.recipe.data.dataloader.batch.max_seconds == 30
    # Each line that sets a value has its reason beside or above it.
    lines = main.text.splitlines()
    for above, line in itertools.pairwise(lines):
        value = line.strip().partition(": ")[2]
        if value and not line.startswith(("#", "base:")) and not line.strip().startswith("#"):
            assert "# " in line or above.strip().startswith("#"), line
    path = tmp_path / "main.yaml"
    path.write_text(main.text)
    short = try_recipe(main, path, facts(hours), device, "runs/mine-try")
    (tmp_path / "try.yaml").write_text(short.text)
    loaded = load_text(short.text)
    assert loaded == short.recipe and loaded.run == "runs/mine-try"
    assert max(stage.steps for stage in loaded.stages) <= 20
    assert loaded.model == main.recipe.model and loaded.data.train == main.recipe.data.train


def test_only_what_differs_from_the_base_is_written():
    main, way = main_recipe(facts(11), WHISPER, QWEN, GPU, "runs/mine", "title")
    values = config.parse_yaml(main.text)
    base = config.read_recipe(values.pop("base"))
    assert way.base == "whisper-qwen3"
    assert "lora" not in values["model"] and "stack" not in values["model"].get("adaptor", {})
    assert values["model"]["encoder"] == {"path": "openai/whisper-base"}
    assert config.merge(base, values)["model"]["lora"] == base["model"]["lora"]


def test_more_hours_are_more_steps_and_more_gpus_fewer():
    def steps(hours, device):
        return main_recipe(facts(hours), WHISPER, QWEN, device, "r", "t")[0].recipe.stages[-1].steps

    assert steps(150, GPU) > steps(20, GPU)
    assert steps(150, Device(1, 80.0, 300.0, 16)) > 6 * steps(150, GPU)


def test_batches_go_by_the_memory():
    def frames(memory):
        recipe = main_recipe(facts(150), WHISPER, QWEN, Device(1, memory, 300.0, 16), "r", "t")[0]
        return recipe.recipe.data.dataloader.batch.frames

    assert frames(80.0) > frames(9.5)
    with pytest.raises(UserError, match="give a smaller --llm"):
        frames(4.0)


def test_the_memory_that_is_missing_is_told_without_contradiction(monkeypatch):
    monkeypatch.setattr(recipes, "step_memory", lambda *arguments: {"weights": 3.41, "head": 0.02})
    # 85% of 4.03 GB are 3.4255 GB; 3.43 GB are needed.
    words = r"need 3\.5 GB of a rank .* and 3\.4 GB may be taken \(85% of 4\.0 GB free\)"
    with pytest.raises(UserError, match=words):
        main_recipe(facts(0.75), WHISPER, TINY, Device(0, 4.03, 0.05, 2), "r", "t")


def test_the_result_is_told_with_its_language_model():
    _, way = main_recipe(facts(0.75), WHISPER, QWEN, CPU, "r", "t")
    said = " ".join(way.expect)
    assert "34.1 to 35.8% WER (three seeds)" in said and "decoder of 45 M parameters" in said
    assert "tools/whisper_decoder_lm.py" in said


def test_waves_have_no_spectrogram_to_mask():
    main, _ = main_recipe(facts(11), WAVES, QWEN, GPU, "r", "t")
    assert main.recipe.model.pretrain.spec is None


def test_whispers_decoder_gets_its_own_prompt():
    main, _ = main_recipe(facts(0.75, lang="de-DE"), WHISPER, TINY, CPU, "r", "t")
    assert "<|de|>" in main.recipe.model.prompt and main.recipe.data.text.leading_space
    main, _ = main_recipe(facts(11), WHISPER, QWEN, GPU, "r", "t")
    assert not main.recipe.model.prompt and not main.recipe.data.text.leading_space


def test_long_utterances_stay_where_the_encoder_takes_them():
    def longest(encoder):
        recipe = main_recipe(facts(11, seconds=45.0), encoder, QWEN, GPU, "r", "t")[0]
        return recipe.recipe.data.dataloader.batch.max_seconds, "are longer" in recipe.text

    assert longest(WAVES) == (45, False) and longest(WHISPER) == (30, True)


def test_lora_without_peft(monkeypatch):
    monkeypatch.setattr(ways, "is_installed", lambda module: False)
    with pytest.raises(UserError, match=r"pip install 'dsasr\[lora\]'"):
        main_recipe(facts(11), WHISPER, QWEN, GPU, "r", "t")
    assert main_recipe(facts(11), WHISPER, TINY, GPU, "r", "t")


def test_an_export_is_no_language_model(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "is_export", lambda folder: True)
    with pytest.raises(UserError, match="finetune"):
        parts.look_at_llm(str(tmp_path), fetch=False)


@pytest.mark.parametrize(
    ("llm", "texts", "prompt"),
    [
        (QWEN, {"en": "English", "zh": "Chinese"}, ""),
        (TINY, {"en": "<|en|>", "zh": "<|zh|>"},
         "<|startofprev|><speech><|startoftranscript|>{lang}<|transcribe|><|notimestamps|>"),
    ],
    ids=["qwen", "tiny"],
)  # fmt: skip
def test_data_in_two_languages_names_them_in_prompts(llm, texts, prompt):
    found = facts(11)
    for lang in ["zh-CN"] * 5 + ["en-GB", "zh-en", ""]:
        found.text.add("abc", lang)
    model = main_recipe(found, WHISPER, llm, GPU, "runs/mine", "title")[0].recipe.model
    assert (model.languages, model.prompt) == (texts, prompt)
    alone = main_recipe(facts(11), WHISPER, llm, GPU, "runs/mine", "title")[0].recipe.model
    assert alone.languages == {} and "{lang}" not in alone.prompt
