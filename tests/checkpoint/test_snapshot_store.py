"""The snapshot store: whole or not at all, one publisher, nothing in use pruned, no clocks."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import time

import pytest
import torch
from torch import nn

from dsasr.checkpoint import tensor_fragments, zero_partition
from dsasr.checkpoint.snapshot_store import HEARTBEAT, OWNER, SnapshotStore
from dsasr.checkpoint.tensor_fragments import Fragment, FragmentError, FragmentReader, checksum
from dsasr.schedule import Snapshot
from dsasr.utils.errors import UserError


class Both(nn.Module):
    """An encoder with a buffer, and a head."""

    def __init__(self, width: int = 5, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.encoder = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width))
        self.ctc = nn.Linear(width, 2)


def publish(store, number, module=None, cause="drift", **info):
    snapshot = Snapshot(f"encoder-{number:09d}", number, cause)
    info = {"reference": None, "config": "c", **info}
    return store.publish(module or Both(seed=number), {}, snapshot, info)


def test_what_is_published_is_what_is_read(tmp_path):
    store, module = SnapshotStore(tmp_path / "s"), Both(seed=3)
    store.claim("run")
    assert publish(store, 7, module, cka=0.9, parent="p")
    assert store.snapshots() == [Snapshot("encoder-000000007", 7, "drift")]
    manifest = store.manifest("encoder-000000007")
    assert manifest["cka"] == 0.9 and manifest["parent"] == "p" and len(manifest["files"]) == 1
    target = Both(seed=4)
    zero_partition.replace_weights(target, store.open("encoder-000000007"), ("encoder.",))
    for name, value in module.encoder.state_dict().items():
        assert torch.equal(value, target.encoder.state_dict()[name])
    assert checksum(zero_partition.weight_fragments(target, "encoder.")) == manifest["checksum"]
    assert not torch.equal(module.ctc.weight, target.ctc.weight)


def test_checksum_depends_on_positions_and_not_on_the_partition():
    torch.manual_seed(0)
    flat = torch.randn(300_001)
    whole = {"w": Fragment((300_001,), 0, flat)}
    ranges = ((0, 7), (7, 140_000), (140_000, 300_001))
    fragments = [Fragment((300_001,), a, flat[a:b]) for a, b in ranges]
    total = sum(int(checksum({"w": f}), 16) for f in fragments) % 2**64
    assert f"{total:016x}" == checksum(whole)
    swapped = flat.clone()
    swapped[[0, 1]] = flat[[1, 0]]
    assert checksum({"w": Fragment((300_001,), 0, swapped)}) != checksum(whole)
    assert checksum({"v": Fragment((300_001,), 0, flat)}) != checksum(whole)
    flipped = flat.clone()
    flipped.view(torch.int32)[9] ^= 1
    assert checksum({"w": Fragment((300_001,), 0, flipped)}) != checksum(whole)
    for dtype in (torch.bfloat16, torch.float64, torch.bool, torch.int64):
        ones = torch.ones(3).to(dtype)
        assert len(checksum({"w": Fragment((3,), 0, ones)})) == 16
        assert torch.equal(ones, torch.ones(3).to(dtype)), "a checksum must not change its tensors"


def test_an_encoder_that_is_not_finite_is_not_published(tmp_path):
    store, module = SnapshotStore(tmp_path), Both()
    for value in (float("nan"), float("inf"), -float("inf")):
        module.encoder[0].weight.data[1, 1] = value
        assert not publish(store, 1, module)
    assert store.snapshots() == [] and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("damage", ["altered", "gone", "shape", "names", "nan", "architecture"])
def test_a_bad_snapshot_is_refused_and_changes_nothing(tmp_path, damage):
    store, name = SnapshotStore(tmp_path), "encoder-000000001"
    source = Both(width=6) if damage == "shape" else Both(seed=9)
    if damage == "names":
        source.encoder = nn.Sequential(nn.Identity(), nn.Linear(3, 5))
    publish(store, 1, source, architecture="one")
    folder = tmp_path / name
    if damage == "altered":
        path = folder / "rank-00000.safetensors"
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content)
    elif damage == "gone":
        shutil.rmtree(folder)
    elif damage == "nan":  # not written by `publish`, which refuses it
        source.encoder[0].weight.data[0, 0] = float("nan")
        manifest = store.manifest(name)
        tensor_fragments.write_folder(folder, zero_partition.weight_fragments(source), manifest)
    target = Both(seed=2)
    before = {k: v.clone() for k, v in target.state_dict().items()}
    words = {
        "altered": "sha256",
        "gone": "no readable manifest",
        "shape": r"shape \[6, 3\].*another architecture",
        "names": "holds no 'encoder.0.weight': another architecture",
        "nan": "not finite",
        "architecture": "another architecture",
    }[damage]
    with pytest.raises(FragmentError, match=words):
        architecture = "two" if damage == "architecture" else "one"
        zero_partition.replace_weights(target, store.open(name, architecture), ("encoder.",))
    for key, value in target.state_dict().items():
        assert torch.equal(value, before[key])


def test_pruning_spares_what_is_in_use_referenced_newest_or_final(tmp_path):
    store = SnapshotStore(tmp_path, keep=2)
    for number in range(1, 8):
        publish(store, number, reference="encoder-000000003")
    publish(store, 0, cause="final")
    store.use("sft-a", "encoder-000000001")
    store.use("sft-b", "encoder-000000002")
    store.use("sft-b", "encoder-000000004")  # it has moved on
    gone = store.prune(["encoder-000000005"])
    assert [int(name[-1]) for name in gone] == [2]
    left = [m["pretrain"] for m in store.manifests()]
    assert left == [0, 1, 3, 4, 5, 6, 7]
    assert not list(tmp_path.glob(".*"))


def test_a_torn_snapshot_is_never_listed(tmp_path):
    store = SnapshotStore(tmp_path)
    store.claim("run")
    publish(store, 1)
    # A publisher killed at any moment before the rename leaves its staging folder.
    staging = tmp_path / ".encoder-000000002.tmp"
    staging.mkdir()
    (staging / "rank-00000.safetensors").write_bytes(b"half")
    (tmp_path / "encoder-000000003").mkdir()  # without a manifest it is no snapshot
    assert [s.pretrain for s in store.snapshots()] == [1]
    SnapshotStore(tmp_path).claim("run")
    assert not staging.exists()


def test_publishing_again_leaves_the_same_encoder_and_replaces_another(tmp_path):
    store = SnapshotStore(tmp_path)
    publish(store, 1, Both(seed=1))
    path = tmp_path / "encoder-000000001" / "manifest.json"
    written = path.stat().st_mtime_ns, path.stat().st_ino
    publish(store, 1, Both(seed=1))
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == written
    publish(store, 1, Both(seed=2))
    assert path.stat().st_ino != written[1]


def test_one_store_one_publisher(tmp_path):
    first, second = SnapshotStore(tmp_path), SnapshotStore(tmp_path)
    first.claim("run-a")
    with pytest.raises(UserError, match="has a publisher already"):
        second.claim("run-b")
    first.beat()
    # The same run again, as after a resume; its older job, if it is still alive, must stop.
    second.claim("run-a")
    second.beat()
    assert publish(second, 1)
    for attempt in (first.beat, lambda: publish(first, 2)):
        with pytest.raises(UserError, match="claimed by another job"):
            attempt()
    assert [s.pretrain for s in second.snapshots()] == [1]
    # A claim that cannot be read is not replaced, and the message names the fix.
    (tmp_path / OWNER).write_text("")
    with pytest.raises(UserError, match=f"delete {tmp_path / OWNER}"):
        SnapshotStore(tmp_path).claim("run-b")
    assert sorted(p.name for p in tmp_path.iterdir() if p.name[0] == ".") == []


def claiming(folder, run, go, won):
    go.wait()
    with contextlib.suppress(UserError):
        SnapshotStore(folder).claim(run)
        won.put(run)


def test_of_many_that_claim_at_once_one_gets_the_store(tmp_path):
    fork = multiprocessing.get_context("fork")
    for attempt in range(5):
        folder, go, won = tmp_path / str(attempt), fork.Event(), fork.Queue()
        jobs = [fork.Process(target=claiming, args=(folder, f"run-{i}", go, won)) for i in range(6)]
        for job in jobs:
            job.start()
        go.set()
        winner = won.get(timeout=60)
        for job in jobs:
            job.join()
            assert job.exitcode == 0
        assert won.empty()
        assert json.loads((folder / OWNER).read_text())["run"] == winner
        assert [p.name for p in folder.iterdir()] == [OWNER]


def test_a_full_disk_leaves_what_was_there(tmp_path):
    store = SnapshotStore(tmp_path)
    publish(store, 1)
    big = Both(width=60_000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with pytest.raises(OSError, match="could not write"):
            publish(store, 2, big)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [s.pretrain for s in store.snapshots()] == [1] and not list(tmp_path.glob(".*"))
    tensor_fragments.verify(tmp_path / "encoder-000000001")
    assert publish(store, 2, big)


def test_the_heartbeat_is_a_counter_and_no_clock(tmp_path, monkeypatch):
    writer, reader = SnapshotStore(tmp_path), SnapshotStore(tmp_path)
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    writer.beat()
    assert reader.silent_for() == 0
    now = 1030.0
    # Neither side reads the wall clock, which jumps by a year, nor the file's time.
    monkeypatch.setattr(time, "time", lambda: 4e9)
    os.utime(tmp_path / HEARTBEAT, (0, 0))
    assert reader.silent_for() == 30
    writer.beat()
    assert reader.silent_for() == 0
    now = 1031.0
    assert reader.silent_for() == 1


def test_manifests_of_another_format_are_not_read(tmp_path):
    store = SnapshotStore(tmp_path)
    publish(store, 1)
    path = tmp_path / "encoder-000000001" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    assert store.snapshots() == []
    with pytest.raises(FragmentError, match="format 99"):
        FragmentReader(tmp_path / "encoder-000000001")


def publishing(folder, first):
    """Publish one encoder after the other, until killed."""
    torch.set_num_threads(1)
    store = SnapshotStore(folder, keep=3)
    store.claim("run")
    for number in range(first, first + 1000):
        publish(store, number, Both(width=4000, seed=number))
        store.beat()
        store.prune()


def reading(folder, run):
    """Load each newer encoder until killed; exit code 3: it was torn, 4: it was another."""
    torch.set_num_threads(1)
    store, target, loaded = SnapshotStore(folder), Both(width=4000), None
    while True:
        newest = store.snapshots()[-1:]
        if not newest or newest[0].id == loaded:
            continue
        name = newest[0].id
        store.use(run, name)
        try:
            zero_partition.replace_weights(target, store.open(name), ("encoder.",))
        except FragmentError:
            if (folder / name).exists():
                os._exit(3)
            continue  # pruned before it was marked
        expected = Both(width=4000, seed=newest[0].pretrain)
        if not torch.equal(target.encoder[0].weight, expected.encoder[0].weight):
            os._exit(4)
        loaded = name


def test_no_kill_of_publisher_or_readers_tears_a_snapshot(tmp_path):
    fork, rng = multiprocessing.get_context("fork"), random.Random(0)
    store, torn, jobs = SnapshotStore(tmp_path), 0, {}

    def begin(who):
        listed = store.snapshots()
        first = listed[-1].pretrain + 1 if listed else 1
        target, argument = (publishing, first) if who == "publisher" else (reading, who)
        jobs[who] = fork.Process(target=target, args=(tmp_path, argument), daemon=True)
        jobs[who].start()

    def kill(who):
        assert jobs[who].exitcode is None, f"{who} ended with {jobs[who].exitcode}"
        jobs[who].kill()
        jobs[who].join()

    readers = ("reader-a", "reader-b")
    for who in ("publisher", *readers):
        begin(who)
    try:
        for number in range(300):  # more where the machine is busy
            if number >= 24 and torn > 3 and store.snapshots()[-1].pretrain > 10:
                break
            time.sleep(rng.uniform(0.02, 0.25))
            kill("publisher")
            if number % 3 == 0:
                kill(readers[number % 2])
            torn += any("encoder" in path.name for path in tmp_path.glob(".*.tmp"))
            for manifest in store.manifests():
                folder = tmp_path / manifest["id"]
                tensor_fragments.verify(folder)
                expected = Both(width=4000, seed=manifest["pretrain"])
                encoder = zero_partition.weight_fragments(expected, "encoder.")
                assert manifest["checksum"] == checksum(encoder)
            for path in tmp_path.glob("in-use-*.json"):
                assert json.loads(path.read_text())["id"].startswith("encoder-")
            begin("publisher")
            if number % 3 == 0:
                begin(readers[number % 2])
    finally:
        for job in jobs.values():
            with contextlib.suppress(AssertionError):
                job.kill()
                job.join()
    assert torn > 3, "hardly a kill interrupted the writing of a snapshot"
    assert store.snapshots()[-1].pretrain > 10 and set(store.in_use()) == set(readers)
    SnapshotStore(tmp_path).claim("run")
    assert not [p for p in tmp_path.glob(".*.tmp") if "encoder" in p.name]
