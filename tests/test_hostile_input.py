"""Files from strangers run no code and write nothing outside; nothing secret leaks."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile
from transformers import AutoConfig

from dsasr import config, recipe
from dsasr.checkpoint import tensor_fragments
from dsasr.checkpoint.manifest import FORMAT, MANIFEST
from dsasr.checkpoint.snapshot_store import SnapshotStore
from dsasr.checkpoint.tensor_fragments import FragmentError, FragmentReader
from dsasr.data.audio.decoding import decode
from dsasr.data.audio.files import AudioError
from dsasr.data.shards.build_index import build_index
from dsasr.data.shards.sample import BadSample, read_sample
from dsasr.data.shards.storage import ShardStorage, StorageConfig
from dsasr.inference import export
from dsasr.inference.recognizer import Recognizer
from dsasr.model.encoders.load import load_encoder
from dsasr.model.encoders.pretrained import PretrainedEncoderConfig
from dsasr.model.hf_weights import TensorFiles
from dsasr.model.llm import load_llm
from dsasr.utils.errors import UserError

ROOT = Path(__file__).parent.parent


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return (os.mkdir, (str(self.target),))


@pytest.fixture
def bomb(tmp_path):
    """(pickle bytes, whether they were ever loaded)"""
    target = tmp_path / "exploded"
    data = pickle.dumps(Bomb(target))
    yield data
    assert not target.exists(), "a stranger's code ran"


def test_a_pickle_in_place_of_weights(tmp_path, bomb):
    folder = tmp_path / "step-0000000001"
    folder.mkdir()
    name = "rank-00000.safetensors"
    for data in (bomb, b"\x80\x04" + bomb, _torch_file(bomb)):
        (folder / name).write_bytes(data)
        files = {name: tensor_fragments.file_digest(folder / name)}  # the checksum is right
        manifest = {"format": FORMAT, "files": files}
        (folder / MANIFEST).write_text(json.dumps(manifest))
        tensor_fragments.verify(folder)
        with pytest.raises(FragmentError, match="cannot be read"):
            FragmentReader(folder)
    (folder / MANIFEST).write_bytes(bomb)
    with pytest.raises(FragmentError, match="no readable manifest"):
        FragmentReader(folder)


def test_a_pickle_in_place_of_a_snapshot_or_an_encoder(tmp_path, bomb):
    store = SnapshotStore(tmp_path / "store")
    folder = tmp_path / "store" / "encoder-000000001"
    folder.mkdir(parents=True)
    (folder / "rank-00000.safetensors").write_bytes(bomb)
    files = {
        "rank-00000.safetensors": tensor_fragments.file_digest(folder / "rank-00000.safetensors")
    }
    for manifest in (
        bomb,
        json.dumps({"format": FORMAT, "files": files}).encode(),
    ):
        (folder / MANIFEST).write_bytes(manifest)
        with pytest.raises((FragmentError, UserError)):
            store.open("encoder-000000001")
    encoder = tmp_path / "wav2vec2"
    AutoConfig.for_model("wav2vec2").save_pretrained(encoder)
    (encoder / "pytorch_model.bin").write_bytes(_torch_file(bomb))
    with pytest.raises(UserError, match="only a pickle, which could run code"):
        load_encoder(encoder, PretrainedEncoderConfig(str(encoder)))
    (encoder / "model.safetensors").write_bytes(bomb)
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read"):
        load_encoder(encoder, PretrainedEncoderConfig(str(encoder)))


@pytest.mark.parametrize("size", [1 << 62, (1 << 64) - 1, 1 << 40])
def test_a_header_that_claims_to_be_huge_costs_nothing(tmp_path, size):
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", size) + b'{"w":{"dtype":"F32"}}')
    tracemalloc.start()
    with pytest.raises(UserError, match="cannot be read"):
        TensorFiles(tmp_path)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 20e6


def _torch_file(data: bytes) -> bytes:
    """A .pt file whose pickle is ``data``."""
    import zipfile

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("archive/data.pkl", data)
        file.writestr("archive/version", "3")
    return buffer.getvalue()


def test_a_language_model_that_is_a_pickle_or_brings_code(tmp_path, bomb):
    values = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 8,
              "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
              "num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 8}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "pytorch_model.bin").write_bytes(_torch_file(bomb))
    with pytest.raises(UserError, match="cannot load the language model"):
        load_llm(tmp_path)
    code = f"import os; os.mkdir({str(tmp_path / 'exploded')!r})"
    (tmp_path / "modeling_evil.py").write_text(code)
    own = {"AutoConfig": "modeling_evil.Config", "AutoModelForCausalLM": "modeling_evil.Model"}
    values |= {"model_type": "evil", "auto_map": own}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="never run"):
        load_llm(tmp_path)


def test_an_export_that_points_elsewhere(tmp_path, bomb):
    chosen = {"model_type": "dsasr", "format": 1, "encoder": {}, "adaptor": {}}
    folder = tmp_path / "model"
    (folder / "llm").mkdir(parents=True)
    chosen["prompt"] = {"prefix": [1], "suffix": [2]}
    (folder / "config.json").write_text(json.dumps(chosen))
    index = {"weight_map": {"encoder.x": "../../etc/passwd", "encoder.y": "/etc/shadow"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert {p.parent for p in export._weight_files(folder)} == {folder}
    (folder / "llm" / "pytorch_model.bin").write_bytes(_torch_file(bomb))
    with pytest.raises(UserError):
        Recognizer.from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({**chosen, "encoder": {"width": "os.system"}}))
    with pytest.raises(UserError, match=r"encoder\.width"):
        Recognizer.from_pretrained(folder)


def test_a_manifest_cannot_name_files_outside_its_folder(tmp_path):
    (tmp_path / "secret").write_text("x")
    folder = tmp_path / "snap"
    folder.mkdir()
    digest = tensor_fragments.file_digest(tmp_path / "secret")
    for name in ("../secret", str(tmp_path / "secret")):
        manifest = {"format": FORMAT, "files": {name: digest}}
        (folder / MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(FragmentError, match="no file of this folder"):
            tensor_fragments.verify(folder)


@pytest.mark.parametrize(
    "text",
    [
        "run: !!python/object/apply:os.mkdir [{0}]",
        "run: !!python/object/new:os.mkdir [{0}]",
        "run: !!python/name:os.system",
        "!!python/object/apply:subprocess.call [[mkdir, {0}]]",
    ],
)
def test_yaml_tags_are_refused(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text.format(tmp_path / "exploded"))
    with pytest.raises(UserError):
        recipe.load(str(path))
    with pytest.raises(UserError):
        value = text.format(tmp_path / "exploded").removeprefix("run: ")
        config.override({}, [f"run={value}"])
    assert not (tmp_path / "exploded").exists()


def test_a_pipe_is_no_shard_unless_the_recipe_says_so(tmp_path):
    with pytest.raises(UserError, match="allow_pipe"):
        ShardStorage(StorageConfig()).resolve(f"pipe:mkdir {tmp_path / 'exploded'}")
    assert not (tmp_path / "exploded").exists()


def _shard(path: Path, members: list[tuple[str, bytes, bytes, str]]) -> Path:
    """(name, type, data, link) each."""
    with tarfile.open(path, "w") as tar:
        for name, kind, data, link in members:
            info = tarfile.TarInfo(name)
            info.type, info.size, info.linkname = kind, len(data), link
            tar.addfile(info, io.BytesIO(data))
    return path


def _flac(seconds: float = 0.5) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros(int(16000 * seconds), np.int16), 16000, format="FLAC")
    return buffer.getvalue()


def test_tars_with_links_and_paths_upwards_read_and_write_nothing_outside(tmp_path):
    inside = tmp_path / "in"
    inside.mkdir()
    secret = tmp_path / "secret.flac"
    secret.write_bytes(_flac(2.0))
    meta = json.dumps({"text": "a", "duration": 0.5}).encode()
    shard = _shard(inside / "s.tar", [
        ("../up.flac", tarfile.REGTYPE, _flac(), ""), ("../up.json", tarfile.REGTYPE, meta, ""),
        ("/abs.flac", tarfile.REGTYPE, _flac(), ""), ("/abs.json", tarfile.REGTYPE, meta, ""),
        ("link.flac", tarfile.SYMTYPE, b"", str(secret)), ("link.json", tarfile.REGTYPE, meta, ""),
        ("hard.flac", tarfile.LNKTYPE, b"", "../secret.flac"),
        ("hard.json", tarfile.REGTYPE, meta, ""),
        ("dev.flac", tarfile.CHRTYPE, b"", ""), ("dev.json", tarfile.REGTYPE, meta, ""),
    ])  # fmt: skip
    before = sorted(p for p in tmp_path.rglob("*"))
    index = build_index(shard)
    for number in range(len(index.keys)):
        try:
            sample = read_sample(shard, index.entry(number), shard.name)
        except BadSample:
            continue
        assert sample.audio == _flac(), "a link was followed"
    assert not {"link", "hard", "dev"} & set(index.keys)
    assert sorted(p for p in tmp_path.rglob("*")) == before


def test_a_decompression_bomb_costs_no_memory():
    data = _flac(3600)  # 115 MB of samples
    assert len(data) < 400_000
    tracemalloc.start()
    with pytest.raises(AudioError, match="too_long"):
        decode(data, max_seconds=30)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 20e6


@pytest.mark.launcher
def test_no_secret_in_logs_run_folders_or_exports(start, tmp_path, monkeypatch, command):
    secrets = {"HF_TOKEN": "hf_s3cr3tvalue", "AWS_SECRET_ACCESS_KEY": "aws-s3cr3tvalue",
               "MY_MARKER": "marker-s3cr3tvalue"}  # fmt: skip
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    folder = tmp_path / "run"
    short = ["stages.pretrain.steps=3", "stages.align.steps=1", "stages.joint.steps=1",
             "stages.ia_sft.steps=3", "stages.ia_sft.steps_after_final_swap=1"]  # fmt: skip
    job = start(f"run={folder}", *short, world=1)
    assert job.wait() == [0], job.output[-3000:]
    done = command("export", folder, "--to", tmp_path / "model")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "model" / "config.json").is_file()
    told = (job.output + done.stdout + done.stderr).encode()
    written = [p for top in (folder, tmp_path / "model") for p in top.rglob("*") if p.is_file()]
    for data in (told, *(p.read_bytes() for p in written)):
        assert b"s3cr3tvalue" not in data and b"MY_MARKER" not in data
    pickles = {".pt", ".pth", ".bin", ".pkl", ".npy", ".npz"}
    assert not pickles & {p.suffix for p in written}
