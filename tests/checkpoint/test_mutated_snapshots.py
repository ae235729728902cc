"""Whatever happens to a snapshot's folder: it is read as it was published, or refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from dsasr.checkpoint import tensor_fragments, zero_partition
from dsasr.checkpoint.manifest import DIGEST, MANIFEST
from dsasr.checkpoint.snapshot_store import SnapshotStore
from dsasr.checkpoint.tensor_fragments import FragmentError
from dsasr.cli import snapshots as command
from dsasr.schedule import Snapshot

NAME, GOOD, FILE = "encoder-2", "encoder-1", "rank-00000.safetensors"
VALUES = [None, True, -1, 2, 2.5, "x", "", [], ["x"], {}, {"x": 1}, 10**30, float("nan")]


class Module(nn.Module):
    def __init__(self, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.encoder = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    store = SnapshotStore(tmp_path_factory.mktemp("published") / "store")
    for number, name in enumerate((GOOD, NAME), 1):
        module = Module(number)
        masters = {
            f"master/{key}": fragment
            for key, fragment in zero_partition.weight_fragments(module).items()
            if key.endswith("0.weight")
        }
        info = {"reference": None, "config": "c", "cka": 0.9, "encoder": {"width": 5}}
        assert store.publish(module, masters, Snapshot(name, number, "drift"), info)
    return store.folder


def rewrite_tensors(folder: Path, layout: str | None) -> None:
    """Write the file anew with another layout, and a manifest with the right checksums."""
    tensors = load_file(folder / FILE)
    save_file(tensors, folder / FILE, None if layout is None else {"layout": layout})
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest[DIGEST]
    manifest["files"][FILE] = tensor_fragments.file_digest(folder / FILE)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def mutate(folder: Path, data) -> None:
    draw = data.draw
    kind = draw(st.sampled_from(["flip", "cut", "gone", "bytes", "key", "value", "json", "layout"]))
    path = folder / draw(st.sampled_from([FILE, MANIFEST]))
    content = path.read_bytes()
    if kind == "flip":
        at = draw(st.integers(0, len(content) - 1))
        flipped = content[at] ^ (1 << draw(st.integers(0, 7)))
        path.write_bytes(content[:at] + bytes([flipped]) + content[at + 1 :])
    elif kind == "cut":
        path.write_bytes(content[: draw(st.integers(0, len(content) - 1))])
    elif kind == "gone":
        path.unlink()
    elif kind == "bytes":
        path.write_bytes(draw(st.binary(max_size=50)))
    elif kind == "json":
        (folder / MANIFEST).write_text(json.dumps(draw(st.sampled_from(VALUES))))
    elif kind == "layout":
        shape = draw(st.sampled_from(["[5, 3]", "[15]", "5", "[-1]", "[0]", '["5"]', "null"]))
        start = draw(st.sampled_from(["0", "1", "-1", "2.0", "null", "[]"]))
        row = f"[{shape}, {start}]"
        odd = [None, "", "[]", "{}", "{", f'{{"encoder.0.weight": {row}}}', row]
        rewrite_tensors(folder, draw(st.sampled_from(odd)))
    else:
        manifest = json.loads((folder / MANIFEST).read_text())
        if draw(st.booleans()):  # one of an older version, without a checksum of its own
            del manifest[DIGEST]
        key = draw(st.sampled_from(sorted(manifest)))
        if kind == "key":
            del manifest[key]
        else:
            manifest[key] = draw(st.sampled_from(VALUES))
        (folder / MANIFEST).write_text(json.dumps(manifest))


def check(store: SnapshotStore) -> None:
    """The store with whatever NAME has become is used as the jobs and commands use it."""
    manifests, problems = store.listing()
    listed = {m["id"] for m in manifests}
    assert GOOD in listed and GOOD not in problems, "one bad snapshot hides another"
    assert NAME in listed or NAME in problems or not (store.folder / NAME / MANIFEST).exists()
    assert all(reason and "\n" not in reason for reason in problems.values())
    assert {s.id for s in store.snapshots()} <= listed
    command.table(store)
    command.verify(store)
    target, expected = Module(3), Module(2)
    before = {k: t.clone() for k, t in target.state_dict().items()}
    try:
        reader = store.open(NAME)
        zero_partition.replace_weights(target, reader, ("encoder.",))
        master = reader.whole("master/encoder.0.weight") if len(reader.shapes) > 7 else None
    except FragmentError as error:
        assert "\n" not in str(error)
        expected = before
    else:
        expected = expected.state_dict()
        assert master is None or torch.equal(master, expected["encoder.0.weight"])
    for key, tensor in target.state_dict().items():
        assert torch.equal(tensor, expected[key])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_a_mutated_snapshot_is_refused_or_as_it_was(published, tmp_path_factory, data):
    store = SnapshotStore(tmp_path_factory.mktemp("mutated") / "store")
    shutil.copytree(published, store.folder)
    mutate(store.folder / NAME, data)
    check(store)
    shutil.rmtree(store.folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"id": None}, "lacks 'id'"),
        ({"cause": None}, "lacks 'cause'"),
        ({"files": None}, "lacks 'files'"),
        ({"pretrain": "2"}, "'pretrain', which is no int"),
        ({"pretrain": True}, "'pretrain', which is no int"),
        ({"id": "other"}, "is called 'other'"),
        ({"kind": "checkpoint"}, "of kind 'checkpoint', not 'snapshot'"),
        ({"files": {FILE: 3}}, "no file of this folder with a checksum"),
        ({"files": {"../x": "3"}}, "no file of this folder with a checksum"),
    ],
)
def test_why_a_manifest_is_refused(published, tmp_path, change, words):
    store = SnapshotStore(tmp_path / "store")
    shutil.copytree(published, store.folder)
    path = store.folder / NAME / MANIFEST
    manifest = json.loads(path.read_text()) | change
    path.write_text(json.dumps(manifest))
    assert "was altered" in store.listing()[1][NAME]
    del manifest[DIGEST]
    path.write_text(json.dumps(manifest))
    assert words in store.listing()[1][NAME]
    check(store)


def test_a_file_without_a_layout_is_refused(published, tmp_path):
    store = SnapshotStore(tmp_path / "store")
    shutil.copytree(published, store.folder)
    rewrite_tensors(store.folder / NAME, None)
    with pytest.raises(FragmentError, match="no layout"):
        store.open(NAME)
    check(store)
