"""Shards: the same bytes again, indexes that are right, and tars that are not."""

import contextlib
import io
import json
import tarfile
import time

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from dsasr.data.shards.index import (
    BadSample,
    Entry,
    ShardIndex,
    build_index,
    index_path,
    load_index,
    parse_sample,
    read_sample,
)
from dsasr.data.shards.verify import check_dataset, verify_shard
from dsasr.data.shards.writer import PackedSample, sample_key, write_shard
from dsasr.utils.errors import UserError

RATE = 16_000


def flac(seconds: float = 0.5, seed: int = 0, rate: int = RATE) -> bytes:
    wave = np.random.default_rng(seed).standard_normal(int(seconds * rate)) * 0.1
    buffer = io.BytesIO()
    soundfile.write(buffer, wave.astype(np.float32), rate, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def packed(key: str, text: str = "hello", seconds: float = 0.5, **more) -> PackedSample:
    values = {"text": text, "lang": "en", "speaker": "s1", "duration": seconds} | more
    return PackedSample(key, "flac", flac(seconds, len(key)), values)


def tar_of(*members) -> bytes:
    """A tar of (name, bytes) and of ready `TarInfo`."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return buffer.getvalue()


def meta(text: str = "hello", **more) -> bytes:
    return json.dumps({"text": text, "lang": "en", "speaker": "s", "duration": 0.5} | more).encode()


def causes(index: ShardIndex) -> dict[str, str]:
    return {bad.key: bad.cause for bad in index.bad}


def test_the_same_samples_give_the_same_bytes(tmp_path):
    samples = [packed("a"), packed("b/c", "你好"), packed("长" * 120)]
    write_shard(tmp_path / "x.tar", samples)
    first = (tmp_path / "x.tar").read_bytes(), index_path(tmp_path / "x.tar").read_bytes()
    time.sleep(1.1)  # a tar's times are whole seconds
    write_shard(tmp_path / "x.tar", samples)
    assert ((tmp_path / "x.tar").read_bytes(), index_path(tmp_path / "x.tar").read_bytes()) == first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.index.json", "x.tar"]


def test_what_is_written_is_read(tmp_path):
    tar = tmp_path / "x.tar"
    more = {"phonemes": ["h", "ə"], "alignment": {"words": [[0, 1]]}, "gender": "f"}
    samples = [packed("a", "héllo", 0.25, **more), packed("b", "你好", 0.5, lang="zh")]
    index = write_shard(tar, samples)
    assert load_index(index_path(tar)).dump() == index.dump() == build_index(tar).dump()
    assert index.keys == ["a", "b"]
    assert index.durations.tolist() == [0.25, 0.5]
    assert index.chars.tolist() == [5, 2]
    assert index.hours == pytest.approx(0.75 / 3600)
    assert index.lang_mask("zh").tolist() == [False, True]
    assert not index.lang_mask("de").any()
    data = tar.read_bytes()
    for entry, sample in zip(index, samples, strict=True):
        for source in (tar, lambda offset, size: data[offset : offset + size]):
            read = read_sample(source, entry, str(tar))
            assert (read.audio, read.extension) == (sample.audio, "flac")
            assert (read.text, read.lang) == (sample.values["text"], sample.values["lang"])
            assert (read.speaker, read.duration) == ("s1", sample.values["duration"])
    first = read_sample(tar, index.entry(0))
    assert first.phonemes == ("h", "ə")
    assert first.alignment == {"words": [[0, 1]]}
    assert first.meta == {"gender": "f"}
    assert read_sample(tar, index.entry(1)).phonemes is None


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.text("ab你/_- ", min_size=1, max_size=8), st.text(max_size=20)),
        unique_by=lambda pair: pair[0].lstrip("/"),
        max_size=6,
    )
)
def test_any_key_and_text_come_back(tmp_path_factory, pairs):
    pairs = [(k.lstrip("/"), t) for k, t in pairs if k.strip("/ ")]
    pairs = [(k, t) for k, t in pairs if not k.endswith("/")]
    tar = tmp_path_factory.mktemp("any") / "x.tar"
    values = {"lang": "", "speaker": "", "duration": 0.1}
    audio = flac(0.1)
    index = write_shard(
        tar, [PackedSample(k, "flac", audio, {"text": t} | values) for k, t in pairs]
    )
    assert [(e.key, read_sample(tar, e).text) for e in index] == pairs


def test_a_shard_without_samples(tmp_path):
    index = write_shard(tmp_path / "x.tar", [])
    assert len(index) == len(load_index(index_path(tmp_path / "x.tar"))) == 0
    assert index.hours == 0 and not index.bad


@pytest.mark.parametrize("key", ["a.b", "/a", "", "a\nb", "\ud800"])
def test_keys_that_no_reader_could_use_are_refused(tmp_path, key):
    with pytest.raises(UserError):
        write_shard(
            tmp_path / "x.tar", [packed("ok"), PackedSample(key, "flac", b"", {"text": ""})]
        )
    assert not list(tmp_path.iterdir())  # whole or not at all


def test_a_repeated_key_is_refused(tmp_path):
    with pytest.raises(UserError, match="duplicate_key"):
        write_shard(tmp_path / "x.tar", [packed("a"), packed("a")])
    assert not list(tmp_path.iterdir())


def test_keys_of_ids():
    assert sample_key("LJ001-0001.v2") == "LJ001-0001_v2"
    assert sample_key("../../etc/passwd") == "__/__/etc/passwd"
    with pytest.raises(UserError):
        sample_key("//")


@pytest.mark.parametrize("step", [1, 100, 511, 512, 513, 1024, 1025])
def test_a_tar_cut_anywhere_gives_what_is_whole_and_says_so(tmp_path, step):
    write_shard(tmp_path / "x.tar", [packed(f"k{i}") for i in range(3)])
    data = (tmp_path / "x.tar").read_bytes()
    whole = list(build_index(data))
    end = max(max(e.audio_offset + e.audio_size, e.json_offset + e.json_size) for e in whole)
    for length in range(0, end, step * 997 if step < 512 else step * 13):
        index = build_index(data[:length], "s")
        there = [
            e
            for e in whole
            if max(e.audio_offset + e.audio_size, e.json_offset + e.json_size) <= length
        ]
        assert list(index) == there
        assert "truncated_tar" in [b.cause for b in index.bad]


def test_a_cut_at_a_members_edge_is_seen(tmp_path):
    """A bare end of file where a header could stand is what tarfile takes for a good end."""
    write_shard(tmp_path / "x.tar", [packed("a"), packed("b")])
    data = (tmp_path / "x.tar").read_bytes()
    second = list(build_index(data))[1]
    edge = min(second.audio_offset, second.json_offset) - 512
    index = build_index(data[:edge])
    assert index.keys == ["a"]
    assert [b.cause for b in index.bad] == ["truncated_tar"]


def test_a_damaged_header_in_the_middle_is_not_the_end(tmp_path):
    write_shard(tmp_path / "x.tar", [packed("a"), packed("b"), packed("c")])
    data = bytearray((tmp_path / "x.tar").read_bytes())
    second = list(build_index(bytes(data)))[1]
    header = min(second.audio_offset, second.json_offset) - 512
    data[header + 3] ^= 0x55
    index = build_index(bytes(data), "s")
    assert index.keys == ["a"]
    assert [(b.cause, str(header) in b.detail) for b in index.bad] == [("truncated_tar", True)]


@pytest.mark.parametrize("data", [b"", b"no tar at all", b"x" * 5000])
def test_what_is_no_tar_says_so(data):
    index = build_index(data, "s")
    assert len(index) == 0
    assert [b.cause for b in index.bad] == ["truncated_tar"]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damage_never_raises_and_never_goes_unnoticed_in_the_count(data):
    whole = tar_of(
        *((f"{k}.{e}", b) for k in "abc" for e, b in (("flac", flac(0.05)), ("json", meta())))
    )
    tar = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        tar[data.draw(st.integers(0, len(tar) - 1))] = data.draw(st.integers(0, 255))
    index = build_index(bytes(tar), "s")
    if bytes(tar) == whole:
        assert not index.bad
    keys = {*index.keys, *(b.key for b in index.bad)}
    assert len(keys) >= 3 or index.bad
    for entry in index:
        with contextlib.suppress(BadSample):
            read_sample(lambda offset, size: bytes(tar[offset : offset + size]), entry, "s")


def test_links_devices_and_odd_names_are_never_followed(tmp_path):
    secret = tmp_path / "secret.json"
    secret.write_text('{"text": "secret"}')
    link = tarfile.TarInfo("a.json")
    link.type, link.linkname = tarfile.SYMTYPE, str(secret)
    hard = tarfile.TarInfo("b.flac")
    hard.type, hard.linkname = tarfile.LNKTYPE, "../c.flac"
    device = tarfile.TarInfo("d.flac")
    device.type = tarfile.CHRTYPE
    sparse = tarfile.TarInfo("e.flac")  # its bytes are not in one piece
    sparse.type = tarfile.GNUTYPE_SPARSE
    tar = tar_of(
        link, ("a.flac", flac()), hard, ("b.json", meta()), device, sparse,
        ("../../up.flac", flac()), ("../../up.json", meta("up")),
        ("/root.flac", flac()), ("/root.json", meta("root")),
    )  # fmt: skip
    index = build_index(tar, "s")
    assert index.keys == ["../../up", "/root"]  # names are keys: nothing is opened by them
    assert causes(index) == {
        "a.json": "not_a_file", "b.flac": "not_a_file", "d.flac": "not_a_file",
        "e.flac": "not_a_file",
        "a": "missing_json", "b": "missing_audio",
    }  # fmt: skip
    read = read_sample(lambda offset, size: tar[offset : offset + size], index.entry(0), "s")
    assert read.text == "up"
    assert not (tmp_path.parent.parent / "up.flac").exists()


def test_bad_members_are_named_and_the_rest_is_kept():
    name = tarfile.TarInfo("\udcff.flac")
    tar = tar_of(
        ("good.flac", flac()), ("good.json", meta()),
        ("alone.flac", flac()),
        ("silent.json", meta()),
        ("utf8.flac", flac()), ("utf8.json", b'{"text": "\xff"}'),
        ("half.flac", flac()), ("half.json", b'{"text": "x'),
        ("list.flac", flac()), ("list.json", b"[1]"),
        ("deep.flac", flac()), ("deep.json", b"[" * 100_000),
        ("mute.flac", flac()), ("mute.json", b'{"text": null}'),
        ("surrogate.flac", flac()), ("surrogate.json", b'{"text": "\\ud800"}'),
        ("big.flac", flac()), ("big.json", b'{"text": "' + b"x" * (5 << 20) + b'"}'),
        ("two.flac", flac()), ("two.json", meta()), ("two.wav", b"RIFF"),
        ("__readme.txt", b"not ours"), ("good.pkl", b"cos\nsystem\n(S'false'\ntR."),
        ("good.yaml", b"!!python/object/apply:os.system [false]"), ("good.pth", b"PK"), name,
    )  # fmt: skip
    index = build_index(tar, "s")
    assert index.keys == ["good", "two"]
    assert causes(index) == {
        "alone": "missing_json", "silent": "missing_audio", "utf8": "bad_utf8",
        "half": "bad_json", "list": "bad_json", "deep": "bad_json", "mute": "bad_json",
        "surrogate": "bad_utf8", "big": "bad_json", "two": "duplicate_key",
        "\\udcff.flac": "bad_utf8",
    }  # fmt: skip
    assert load_index(index.dump().encode(), "s").dump() == index.dump()


def test_keys_may_hold_dots_in_others_tars():
    tar = tar_of(("a.b.flac", flac()), ("a.b.json", meta("dots")), ("A.FLAC", b"x"))
    index = build_index(tar, "s")
    assert index.keys == ["a.b"] and causes(index) == {"A": "missing_json"}


def test_a_header_that_claims_terabytes_costs_nothing():
    big = tarfile.TarInfo("big.flac")
    big.size = 1 << 42
    header = big.tobuf(tarfile.GNU_FORMAT)
    tar = tar_of(("a.flac", flac()), ("a.json", meta()))
    end = build_index(tar).entry(0).json_offset + tarfile.BLOCKSIZE
    index = build_index(tar[:end] + header + bytes(1024), "s")
    assert index.keys == ["a"]
    assert [b.cause for b in index.bad] == ["truncated_tar"]
    pax = tarfile.TarInfo("././@PaxHeader")
    pax.type, pax.size = tarfile.XHDTYPE, 1 << 42
    index = build_index(pax.tobuf(tarfile.GNU_FORMAT) + b"9" * 5000, "s")
    assert [b.cause for b in index.bad] == ["truncated_tar"]
    digits = build_index(tar_of(("a.json", b'{"text": "x", "duration": ' + b"9" * 10_000 + b"}")))
    assert causes(digits) == {"a": "bad_json"}


def test_a_missing_duration_is_read_from_the_audio():
    tar = tar_of(("a.flac", flac(0.75)), ("a.json", b'{"text": "x"}'))
    entry = build_index(tar, "s").entry(0)
    assert entry.duration == pytest.approx(0.75)
    sample = read_sample(lambda offset, size: tar[offset : offset + size], entry, "s")
    assert sample.duration == pytest.approx(0.75)


def test_a_byte_order_mark_before_the_json_is_dropped():
    tar = tar_of(("a.flac", flac()), ("a.json", b"\xef\xbb\xbf" + meta("one two")))
    entry = build_index(tar, "s").entry(0)
    assert entry.chars == len("one two")
    assert read_sample(lambda offset, size: tar[offset:][:size], entry, "s").text == "one two"


@pytest.mark.parametrize("value", [-1, "1.0", None, float("nan"), float("inf"), 1e300])
def test_an_impossible_duration_is_not_believed(value):
    tar = tar_of(("a.flac", flac(0.25)), ("a.json", meta(duration=value)))
    assert build_index(tar, "s").entry(0).duration == pytest.approx(0.25)


@pytest.mark.parametrize("phonemes", ["h ə", [1, 2], {"a": 1}])
def test_phonemes_must_be_strings(phonemes):
    entry = Entry("a", "flac", 0, 1, 0, 1, 1.0, 1, "en")
    with pytest.raises(BadSample, match="bad_json"):
        parse_sample(entry, "s", b"x", meta(phonemes=phonemes))


def test_an_entry_beyond_the_tar_is_a_bad_sample(tmp_path):
    index = write_shard(tmp_path / "x.tar", [packed("a")])
    data = (tmp_path / "x.tar").read_bytes()
    (tmp_path / "x.tar").write_bytes(data[: index.entry(0).audio_offset + 10])
    with pytest.raises(BadSample) as caught:
        read_sample(tmp_path / "x.tar", index.entry(0))
    assert (caught.value.cause, caught.value.key) == ("truncated_tar", "a")


def _change(**columns):
    index = ShardIndex("s", [Entry("a", "flac", 512, 9, 1536, 9, 1.0, 3, "en")])
    return json.dumps(json.loads(index.dump()) | columns).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"", b"[]", b"null", b"{}", b'{"version": 99}', b"[" * 100_000, _change()[:-5],
        _change(keys=["a", "b"]), _change(keys="a"), _change(keys=[3]), _change(audio=["exe"]),
        _change(audio_offset=[-1]), _change(audio_size=[1 << 40]), _change(json_size=[1 << 30]),
        _change(json_offset=[1 << 70]), _change(duration=[float("nan")]), _change(duration=[-1]),
        _change(chars=["x"]), _change(lang=[None]), _change(bad=[1]), _change(audio=[["flac"]]),
    ],
)  # fmt: skip
def test_a_damaged_index_raises_value_error(data):
    with pytest.raises(ValueError):
        load_index(data, "s")


def test_loading_a_thousand_samples_takes_milliseconds():
    rows = [Entry(f"key-{i}", "flac", i, 9, i, 9, 1.5, 3, "en") for i in range(1000)]
    data = ShardIndex("s", rows).dump().encode()
    load_index(data, "s")
    best = min(_seconds(lambda: load_index(data, "s")) for _ in range(5))
    assert list(load_index(data, "s")) == rows
    assert best < 0.02  # 2 ms on an idle core


def _seconds(work) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def test_bad_samples_travel_between_processes():
    import pickle

    error = pickle.loads(pickle.dumps(BadSample("nan_audio", "s", "k", "d")))
    assert (error.cause, error.shard, error.key, error.detail) == ("nan_audio", "s", "k", "d")


def test_the_verifier_names_each_bad_sample(tmp_path):
    rate8 = io.BytesIO()
    soundfile.write(rate8, np.zeros((4000, 2), np.int16), 8000, format="WAV")
    nan = io.BytesIO()
    soundfile.write(nan, np.full(8000, np.nan, np.float32), RATE, format="WAV", subtype="FLOAT")
    empty = io.BytesIO()
    soundfile.write(empty, np.zeros(0, np.int16), RATE, format="WAV")
    broken = bytearray(flac(2.0))
    broken[len(broken) // 2] ^= 0xFF
    tar = tmp_path / "x.tar"
    tar.write_bytes(
        tar_of(
            ("good.flac", flac()), ("good.json", meta()),
            ("stereo8.wav", rate8.getvalue()), ("stereo8.json", meta()),
            ("nan.wav", nan.getvalue()), ("nan.json", meta()),
            ("empty.wav", empty.getvalue()), ("empty.json", meta()),
            ("broken.flac", bytes(broken)), ("broken.json", meta(duration=2.0)),
            ("noise.mp3", b"\0" * 999), ("noise.json", meta()),
            ("liar.flac", flac(0.5)), ("liar.json", meta(duration=3.0)),
            ("mute.flac", flac()), ("mute.json", meta(" ")),
            ("book.flac", flac()), ("book.json", meta("word " * 20)),
            ("alone.flac", flac()),
        )
    )  # fmt: skip
    report = verify_shard(tar)
    assert {key: cause for cause, _, key, _ in report.bad} == {
        "nan": "nan_audio", "empty": "empty_audio", "broken": "decode_error",
        "noise": "decode_error", "liar": "wrong_duration", "mute": "empty_text",
        "alone": "missing_json", "": "missing_index", "book": "too_much_text",
    }  # fmt: skip
    assert {shard for _, shard, _, _ in report.bad} == {"x.tar"}
    assert (report.samples, report.seconds) == (2, 1.0)
    assert verify_shard(tar, allow_empty_text=True).samples == 3
    assert ("too_long", "x.tar", "good") in [b[:3] for b in verify_shard(tar, 0.4).bad]


def test_the_verifier_checks_the_index(tmp_path):
    tar = tmp_path / "x.tar"
    index = write_shard(tar, [packed("a"), packed("b")])
    assert verify_shard(tar).bad == ()
    index_path(tar).write_text(ShardIndex("s", list(index)[:1]).dump())
    assert [b[0] for b in verify_shard(tar).bad] == ["bad_index"]
    index_path(tar).write_text("{")
    assert [b[0] for b in verify_shard(tar).bad] == ["bad_index"]
    index_path(tar).unlink()
    assert [b[0] for b in verify_shard(tar).bad] == ["missing_index"]
    assert [b[0] for b in verify_shard(tmp_path / "none.tar").bad] == ["unreadable"]


def test_the_verifier_checks_dataset_json(tmp_path):
    for name, keys in (("a", "xy"), ("b", "z")):
        write_shard(tmp_path / f"{name}.tar", [packed(k) for k in keys])
    rows = [{"name": n, "samples": s} for n, s in (("a.tar", 3), ("c.tar", 1))]
    (tmp_path / "dataset.json").write_text(json.dumps({"version": 1, "shards": rows}))
    reports = {f"{n}.tar": verify_shard(tmp_path / f"{n}.tar") for n in "ab"}
    contradictions = {(cause, shard) for cause, shard, _, _ in check_dataset(tmp_path, reports)}
    assert contradictions == {
        ("missing_samples", "a.tar"), ("missing_shard", "c.tar"), ("unlisted_shard", "b.tar")
    }  # fmt: skip
    (tmp_path / "dataset.json").write_text("[]")
    assert [b[0] for b in check_dataset(tmp_path, reports)] == ["bad_dataset"]
