"""Export and load: bit-equal, from any world size; the LLM loads with transformers alone."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file

from dsasr import Recognizer, config, recipe
from dsasr.build import Builder
from dsasr.checkpoint import tensor_fragments
from dsasr.checkpoint.export_folder import CHECKSUMS, LLM_FILES
from dsasr.checkpoint.locate import open_run_checkpoint
from dsasr.checkpoint.manifest import FORMAT, MANIFEST
from dsasr.checkpoint.safetensors_writer import LazyTensor, write_tensors
from dsasr.checkpoint.tensor_fragments import Fragment
from dsasr.evaluation.eval_sets import Recording
from dsasr.inference import export
from dsasr.inference.evaluated_model import EvaluatedModel
from dsasr.inference.model_from_run import RunModel
from dsasr.utils.errors import UserError

ROOT = Path(__file__).parents[2]


def write_run(tiny: Path, run: Path, world_size: int, *overrides: str) -> Path:
    """A run folder whose only checkpoint was written by ``world_size`` ranks."""
    cfg = recipe.load(str(tiny), [f"run={run}", *overrides])
    build = Builder(cfg)
    model = build.speech_llm()
    folder = run / "checkpoints" / "step-0000000042"
    folder.mkdir(parents=True)
    files = {}
    for rank in range(world_size):
        fragments = {}
        for name, weight in model.named_parameters():
            flat = weight.detach().reshape(-1)
            share = -(-flat.numel() // world_size)
            low = min(rank * share, flat.numel())
            fragments[f"sft/{name}"] = Fragment(tuple(weight.shape), low, flat[low : low + share])
            fragments[f"sft/master/{name}"] = fragments[f"sft/{name}"]
        name = f"rank-{rank:05d}.safetensors"
        files[name] = tensor_fragments.write_file(folder / name, fragments)
    manifest = {"format": FORMAT, "steps": 42, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    (run / "recipe.yaml").write_text(config.dump(cfg))
    return run


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory) -> Path:
    return write_run(tiny, tmp_path_factory.mktemp("export") / "run", 3)


@pytest.fixture(scope="module")
def exported(run) -> Path:
    cfg = config.build(recipe.Recipe, config.read_recipe(str(run / "recipe.yaml")))
    return export.export_run(Builder(cfg), open_run_checkpoint(run), run.parent / "model")


def tone(seconds: float = 1.2, rate: int = 16000) -> np.ndarray:
    time = np.arange(int(seconds * rate)) / rate
    return (0.3 * np.sin(2 * np.pi * 440 * time)).astype(np.float32)


def test_a_loaded_export_is_bit_equal_to_the_run(run, exported, tmp_path):
    of_run = RunModel.from_run(run).model.state_dict()
    of_export = export.load_export(exported).model.state_dict()
    assert of_run.keys() == of_export.keys()
    assert all(torch.equal(of_run[k], of_export[k]) for k in of_run)
    soundfile.write(tmp_path / "a.wav", tone(), 16000)
    by_run = Recognizer.from_pretrained(run).transcribe(tmp_path / "a.wav")
    by_export = Recognizer.from_pretrained(exported).transcribe(tmp_path / "a.wav")
    assert by_run == by_export and by_export.segments[0].tokens
    buffer = io.BytesIO()
    soundfile.write(buffer, tone(), 16000, format="FLAC")
    buffer.seek(0)
    small = Recognizer.from_pretrained(exported, device="cpu", batch_seconds=0.5)
    assert small.batch_seconds == 0.5 and small.transcribe(buffer).segments


def test_the_language_model_is_plain_qwen3_to_transformers(run, exported):
    from transformers import AutoModelForCausalLM, Qwen3ForCausalLM

    llm, report = AutoModelForCausalLM.from_pretrained(
        exported / "llm", trust_remote_code=False, output_loading_info=True, dtype=torch.float32
    )
    assert isinstance(llm, Qwen3ForCausalLM)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ours = RunModel.from_run(run).model.llm
    ids = torch.tensor([[5, 9, 3, 7]])
    with torch.no_grad():
        assert torch.equal(llm(ids).logits, ours.eval()(ids).logits)


def test_the_tokenizer_is_plain_to_transformers_too(run, exported):
    from transformers import AutoTokenizer

    plain, trained = AutoTokenizer.from_pretrained(exported / "llm"), RunModel.from_run(run)
    trained = trained.builder.tokenizer
    for text in ("ba do fi", "gu", "do ba unknown 打 fi"):
        assert plain(text, add_special_tokens=False)["input_ids"] == trained.encode(text)
    assert len(plain) == trained.vocab_size and plain.eos_token_id == trained.end_id


def test_an_export_is_evaluated_like_its_run(run, exported, tiny, tmp_path, monkeypatch):
    from dsasr.cli import evaluate

    data = str(tiny.parent / "valid")
    outs = [tmp_path / "run.jsonl", tmp_path / "export.jsonl"]
    monkeypatch.chdir(tmp_path)
    for folder, out in zip((run, exported), outs, strict=True):
        assert evaluate.main([str(folder), "--data", data, "--out", str(out), "--pairs", "0"]) == 0
    assert outs[0].read_text() == outs[1].read_text() != ""
    wrong = {
        "--checkpoint is for runs": ["--checkpoint", "step-1"],
        "--report is for runs": ["--report"],
        "is there already": ["--out", str(outs[0])],
        "--report` or `--out FILE` writes one": ["--against", str(tmp_path / "none")],
        "--rules must be": ["--rules", "mine"],
        "none.json": ["--rules", "none.json"],
    }
    # Nothing is read or decoded first.
    monkeypatch.setattr("dsasr.evaluation.eval_sets.read_recordings", None)
    for message, options in wrong.items():
        with pytest.raises(UserError, match=message):
            evaluate.main([str(exported), "--data", data, *options])


def test_automodel_loads_it_without_remote_code(exported):
    code = (
        "import sys, torch, dsasr.inference.hf_auto\nfrom transformers import AutoModel\n"
        f"m = AutoModel.from_pretrained({str(exported)!r}, trust_remote_code=False)\n"
        "print(type(m).__name__, m.export.config.steps, 'deepspeed' in sys.modules)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert process.stdout.split() == ["DsasrModel", "42", "False"], process.stderr[-2000:]


def test_nothing_of_the_training_is_exported(run, exported):
    names = {p.name for p in exported.rglob("*") if p.is_file()}
    allowed = {"config.json", "cmvn.json", "model.safetensors", CHECKSUMS, *LLM_FILES}
    assert names <= allowed
    weights = load_file(exported / "model.safetensors")
    assert all(k.startswith(("encoder.", "adaptor.")) for k in weights)
    text = (exported / "config.json").read_text()
    assert str(run.parent) not in text and "shards" not in text


def test_large_models_go_to_several_files(run, exported, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "FILE_BYTES", 20_000)
    build = Builder(config.build(recipe.Recipe, config.read_recipe(str(run / "recipe.yaml"))))
    folder = export.export_run(build, open_run_checkpoint(run), tmp_path / "model")
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 1
    state, expected = (export.load_export(f).model.state_dict() for f in (folder, exported))
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def test_rounded_to_bfloat16(run, tmp_path):
    build = Builder(config.build(recipe.Recipe, config.read_recipe(str(run / "recipe.yaml"))))
    reader = open_run_checkpoint(run)
    folder = export.export_run(build, reader, tmp_path / "model", torch.bfloat16)
    weights = load_file(folder / "llm" / "model.safetensors")
    assert {t.dtype for t in weights.values()} == {torch.bfloat16}
    name = next(iter(weights))
    assert torch.equal(weights[name], reader.whole(f"sft/llm.{name}").to(torch.bfloat16))


def test_errors_name_what_cannot_be_exported_or_loaded(run, exported, tmp_path):
    build = Builder(config.build(recipe.Recipe, config.read_recipe(str(run / "recipe.yaml"))))
    with pytest.raises(UserError, match="exists"):
        export.export_run(build, open_run_checkpoint(run), exported)
    with pytest.raises(UserError, match="no whole checkpoint"):
        open_run_checkpoint(tmp_path)
    with pytest.raises(UserError, match="no exported recognizer"):
        export.load_export(tmp_path)
    with pytest.raises(UserError, match="neither an exported model nor a run"):
        Recognizer.from_pretrained(tmp_path)
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in exported.iterdir():
        (broken / path.name).symlink_to(path)
    (broken / "config.json").unlink()
    (broken / CHECKSUMS).unlink()
    values = json.loads((exported / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**values, "format": 99}))
    with pytest.raises(UserError, match="format 99"):
        export.load_export(broken)
    values["encoder"]["layers"] = 2
    (broken / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="lacks"):
        export.load_export(broken)


def test_every_file_of_an_export_has_a_checksum_that_is_compared(run, exported, tmp_path):
    files = {p.relative_to(exported).as_posix() for p in exported.rglob("*") if p.is_file()}
    lines = (exported / CHECKSUMS).read_text().splitlines()
    assert {line.partition("  ")[2] for line in lines} == files - {CHECKSUMS}
    check = ["sha256sum", "--check", "--quiet", CHECKSUMS]
    assert subprocess.run(check, cwd=exported, capture_output=True).returncode == 0
    for name in ("model.safetensors", "llm/model.safetensors", "cmvn.json"):
        model = tmp_path / name.replace("/", "-")
        shutil.copytree(exported, model)
        content = bytearray((model / name).read_bytes())
        content[-3] ^= 1
        (model / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name} was altered.*export it again"):
            export.load_export(model)
        (model / name).unlink()
        with pytest.raises(UserError, match=f"lacks {name}"):
            export.load_export(model)
        (model / CHECKSUMS).write_text("0  ../secret\n")
        with pytest.raises(UserError, match="no checksum"):
            export.load_export(model)
    # As a hub's cache has it, and as an older version wrote it.
    links = tmp_path / "links"
    (links / "llm").mkdir(parents=True)
    for name in files:
        (links / name).symlink_to(exported / name)
    expected = export.load_export(exported).model.state_dict()
    for _ in range(2):
        state = export.load_export(links).model.state_dict()
        assert all(torch.equal(state[k], t) for k, t in expected.items())
        (links / CHECKSUMS).unlink(missing_ok=True)


def test_a_checkpoint_of_another_architecture_is_not_exported(tiny, run, tmp_path):
    cfg = recipe.load(str(tiny), ["model.encoder.heads=4"])
    reader = open_run_checkpoint(run)
    reader.manifest["recipe"] = config.to_plain(recipe.load(str(tiny)))
    with pytest.raises(UserError, match=r"another architecture.*model\.encoder\.heads=2"):
        export.export_run(Builder(cfg), reader, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_tensors_written_one_by_one_are_safetensors(tmp_path):
    tensors = {
        "b": torch.randn(3, 5).to(torch.bfloat16), "a": torch.randn(7), "s": torch.tensor(2.5),
        "i": torch.arange(9, dtype=torch.int64), "u": torch.ones(3, dtype=torch.bool),
        "empty": torch.zeros(0, 4), "d": torch.randn(2, dtype=torch.float64),
    }  # fmt: skip
    lazy = {**tensors, "a": LazyTensor(torch.float32, (7,), lambda: tensors["a"])}
    digest = write_tensors(tmp_path / "x.safetensors", lazy, {"format": "pt"})
    assert digest == tensor_fragments.file_digest(tmp_path / "x.safetensors")
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype is tensor.dtype and torch.equal(loaded[name], tensor)


def test_an_export_keeps_the_recipes_prompt(tiny, tmp_path):
    run = write_run(tiny, tmp_path / "run", 1, "model.prompt=<|im_start|>do <speech>fi<|im_end|>")
    of_run = RunModel.from_run(run)
    folder = export.export_run(of_run.builder, open_run_checkpoint(run), tmp_path / "model")
    loaded = export.load_export(folder)
    encode, marker = loaded.tokenizer.encode, loaded.tokenizer.special_id
    for model in (of_run.model, loaded.model):
        assert model.plain.prefix == (marker("<|im_start|>"), *encode("do "))
        assert model.plain.suffix == (*encode("fi"), marker("<|im_end|>"))


def test_an_export_keeps_the_prompts_of_its_languages(tiny, tmp_path):
    settings = ["model.prompt=<|im_start|>do {lang} <speech><|im_end|>",
                "model.languages={en: fi, zh: gu}"]  # fmt: skip
    run = write_run(tiny, tmp_path / "run", 1, *settings)
    of_run = RunModel.from_run(run)
    folder = export.export_run(of_run.builder, open_run_checkpoint(run), tmp_path / "model")
    loaded = export.load_export(folder)
    assert loaded.model.hinted == of_run.model.hinted and list(loaded.model.hinted) == ["en", "zh"]
    encode, marker = loaded.tokenizer.encode, loaded.tokenizer.special_id
    assert loaded.model.hinted["zh"].prefix == (marker("<|im_start|>"), *encode("do gu "))
    assert loaded.model.plain.prefix == (marker("<|im_start|>"), *encode("do "))
    recognizers = [Recognizer.from_pretrained(place) for place in (run, folder)]
    for lang in ("", "en", "zh"):
        texts = {r.transcribe(tone(), lang=lang).text for r in recognizers}
        assert len(texts) == 1
    with pytest.raises(UserError, match="give one of en, zh"):
        recognizers[1].transcribe(tone(), lang="de")
    told = EvaluatedModel.open(folder)
    clips = [Recording("a", tone(), "ba do", "", ""), Recording("b", tone(0.9), "fi", "zh", "")]
    expected = {lang: recognizers[1].model.hint(lang) for lang in ("en", "zh")}
    seen = []
    prompt_of = told.model.prompt_of
    told.model.prompt_of = lambda hint: seen.append(hint) or prompt_of(hint)
    rows = told.transcribe(clips, lang="en").rows
    assert set(seen) == {expected["en"]} and {r.key: r.lang for r in rows} == {"a": "en", "b": "zh"}
    seen.clear()
    rows = told.transcribe(clips, hint_langs=True).rows
    assert set(seen) == {"", "zh"} and {r.key: r.lang for r in rows} == {"a": "", "b": "zh"}
    seen.clear()
    told.transcribe(clips)
    assert set(seen) == {""}
    with pytest.raises(UserError, match="give one of en, zh"):
        told.transcribe(clips, lang="de")


def test_the_exported_tokenizer_is_that_of_the_training(tiny, tmp_path):
    """A .model file, beside a language model that has a tokenizer.json of another kind."""
    llm, model = tmp_path / "lm", tmp_path / "own.model"
    shutil.copytree(tiny.parent / "lm", llm)
    shutil.copyfile(llm / "tokenizer.model", model)
    (llm / "tokenizer.json").write_text("{}")
    (tmp_path / "copied").mkdir()
    export._copy_llm(llm, model, tmp_path / "copied", None)
    names = {p.name for p in (tmp_path / "copied").iterdir()}
    assert names == {"config.json", "tokenizer.model"}


def test_the_head_travels_with_a_model_that_does_not_read_it(tiny, tmp_path):
    run = write_run(tiny, tmp_path / "run", 2)
    cfg = config.build(recipe.Recipe, config.read_recipe(str(run / "recipe.yaml")))
    build = Builder(cfg)
    assert RunModel.from_run(run).model.ctc is None  # the checkpoint has no pretrain branch
    head = build.ctc_model().ctc
    folder = run / "checkpoints" / "step-0000000042"
    manifest = json.loads((folder / MANIFEST).read_text())
    fragments = {
        f"pretrain/ctc.{name}": Fragment(tuple(w.shape), 0, w.detach().reshape(-1))
        for name, w in head.named_parameters()
    }
    manifest["files"]["head.safetensors"] = tensor_fragments.write_file(
        folder / "head.safetensors", fragments
    )
    (folder / MANIFEST).write_text(json.dumps(manifest))
    speech = {"utterances": 3, "seconds": [1.0, 1.0, 2.0, 3.0, 3.0, 4.0]}
    (run / "speech.json").write_text(json.dumps(speech))
    (run / "tuned.json").write_text(json.dumps({"ctc_weight": 0.4, "doubt": {"margin": 2.5}}))
    target = export.export_run(build, open_run_checkpoint(run), tmp_path / "model")
    loaded = export.load_export(target)
    for model in (RunModel.from_run(run).model, loaded.model):
        assert torch.equal(model.ctc.project.weight, head.project.weight)
        assert model.speller is not None and not model.adaptor.cfg.reads_ctc
    recognizer = Recognizer.from_pretrained(target)
    assert recognizer.segmentation.max_seconds == 3.0
    assert recognizer.with_beam(3).decode.ctc_weight == 0.4
    assert recognizer.tuned.doubt.margin == 2.5
