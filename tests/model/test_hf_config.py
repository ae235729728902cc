import ast
import io
import json
from pathlib import Path

import pytest

from dsasr.data.text.tokenizers import load_tokenizer
from dsasr.model.encoders.pretrained import read_settings
from dsasr.model.hf_config import read_hf_config
from dsasr.model.llm import load_llm
from dsasr.model.llm_hub import llm_config
from dsasr.utils.errors import UserError

ROOT = Path(__file__).parents[2]
SMALL = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 8,
         "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
         "num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 8}  # fmt: skip
CLASSES = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer")
READERS = {
    "config": read_hf_config,
    "encoder": read_settings,
    "weights": load_llm,
    "shape": lambda folder: load_llm(folder, weights=False),
    "plan": lambda folder: llm_config(str(folder)),
    "tokenizer": load_tokenizer,
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """``folder(**values)``: with that config.json and code of its own, and a user who agrees."""
    mark = tmp_path / "ran"
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 20))

    def make(**values):
        code = f"import os\nos.makedirs({str(mark)!r}, exist_ok=True)\n"
        code += "from transformers import PretrainedConfig as C\nclass Own(C): model_type = 'own'\n"
        (tmp_path / "modeling_own.py").write_text(code)
        (tmp_path / "config.json").write_text(json.dumps(values))
        return tmp_path

    yield make
    assert not mark.exists(), "code of the folder ran"


@pytest.mark.parametrize("reader", READERS)
def test_code_of_a_folder_never_runs(folder, reader):
    path = folder(model_type="own", auto_map=dict.fromkeys(CLASSES, "modeling_own.Own"))
    settings = {"auto_map": {"AutoTokenizer": ["modeling_own.Own", None]}}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    said = "tokenizer" if reader == "tokenizer" else r"needs 'modeling_own\.py'.*never run"
    with pytest.raises(UserError, match=said) as error:
        READERS[reader](path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("reader", ["weights", "shape"])
def test_code_for_one_class_alone_never_runs(folder, reader):
    path = folder(model_type="hubert", auto_map={"AutoModelForCausalLM": "modeling_own.Own"})
    with pytest.raises(UserError, match="never run"):
        READERS[reader](path)


def test_a_known_type_is_read_without_the_code_beside_it(folder):
    path = folder(**SMALL, auto_map=dict.fromkeys(CLASSES, "modeling_own.Own"))
    assert read_hf_config(path).hidden_size == 8
    assert load_llm(path, weights=False).num_parameters() > 0


@pytest.mark.parametrize(
    "value",
    ["org/kernel", "org/kernel@v1:flash", {"": "sdpa", "text_config": "org/kernel"}],
)
@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation",
                                 "experts_implementation"])  # fmt: skip
def test_kernels_of_the_hub_are_refused(folder, key, value):
    for values in ({key: value}, {"text_config": {key: value}}, {"x": [{key: value}]}):
        with pytest.raises(UserError, match=f"{key} names the kernel 'org/kernel.*never run"):
            read_hf_config(folder(**SMALL, **values))


def test_implementations_of_transformers_are_read(folder):
    for name in ("sdpa", "eager", "flash_attention_2", None):
        assert read_hf_config(folder(**SMALL, attn_implementation=name)).vocab_size == 8


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 10_000, '{"a":' * 10_000, '"x"', "\xff"])
def test_what_is_no_config_is_one_line(tmp_path, text):
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"config\.json: .") as error:
        read_hf_config(tmp_path)
    assert "\n" not in str(error.value)


def _auto_calls(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = ast.unparse(node.func.value)
            if owner.startswith("Auto") and node.func.attr in ("from_pretrained", "from_config"):
                yield node


def test_every_call_that_could_ask_for_code_says_no():
    calls = 0
    for path in [*(ROOT / "dsasr").rglob("*.py"), *(ROOT / "tools").rglob("*.py")]:
        for call in _auto_calls(ast.parse(path.read_text(encoding="utf-8"))):
            options = {option.arg: ast.unparse(option.value) for option in call.keywords}
            assert options.get("trust_remote_code") == "False", f"{path}:{call.lineno}"
            calls += 1
    assert calls >= 4
