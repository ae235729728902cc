"""Corpora in, shards out: what is read, what is refused, what a stop leaves behind."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from dsasr.data.checking import verify_shard
from dsasr.data.manifests import Utterance, read_manifest
from dsasr.data.packing import PackConfig, pack, shard_size
from dsasr.data.shards import build_index, read_sample
from dsasr.data.writing import read_dataset
from dsasr.errors import UserError

RATE = 16_000
ROOT = Path(__file__).resolve().parents[2]


def write(path: Path, seconds: float = 0.2, seed: int = 0) -> np.ndarray:
    wave = (np.random.default_rng(seed).standard_normal(int(seconds * RATE)) * 3000).astype(
        np.int16
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wave, RATE)
    return wave


def jsonl(folder: Path, *rows, name: str = "m.jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / name


def corpus(folder: Path, count: int = 7) -> Path:
    rows = []
    for i in range(count):
        write(folder / "audio" / f"{i}.wav", 0.1 + 0.05 * i, i)
        rows.append({"id": f"u{i}", "audio": f"audio/{i}.wav", "text": f"text {i}",
                     "speaker": f"s{i % 2}", "lang": "en" if i % 3 else "zh"})  # fmt: skip
    return jsonl(folder, *rows)


def samples_of(out: Path) -> list:
    return [read_sample(t, e) for t in sorted(out.glob("*.tar")) for e in build_index(t)]


def test_jsonl(tmp_path):
    write(tmp_path / "a.wav")
    row = {"id": 7, "audio": "a.wav", "text": "hi\u2028there", "speaker": None, "gender": "f"}
    path = jsonl(tmp_path, "\ufeff" + json.dumps(row, ensure_ascii=False), "")
    (found,) = read_manifest(path, lang="en").utterances
    assert found == Utterance(
        "7", tmp_path / "a.wav", "hi\u2028there", "", "en", extra={"gender": "f"}
    )


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("{", "line 2"),
        ("[]", "line 2"),
        ({"id": "x", "audio": "a.wav"}, "'text' is missing"),
        ({"audio": "a.wav", "text": "x"}, "'id' is missing"),
        ({"id": "x", "audio": "a.wav", "text": None}, "must be strings"),
        ({"id": "x", "audio": "a.wav", "text": "x", "duration": "long"}, "line 2"),
        ({"id": "x", "audio": "a.wav", "text": "x", "duration": -1}, "duration"),
        ('{"id": "x", "audio": "a.wav", "text": "x", "duration": NaN}', "duration"),
        ({"id": "x", "audio": "a.wav", "text": "x", "start": 2, "end": 1}, "goes from"),
        ({"id": "x", "audio": "a.wav", "text": "x", "start": -2}, "goes from"),
        ({"id": "x", "audio": "a.wav", "text": "x", "phonemes": "h i"}, "list of strings"),
        ({"id": "x", "audio": "gone.wav", "text": "x"}, "1 of 2 audio files are missing"),
        ({"id": "ok", "audio": "a.wav", "text": "x"}, "two utterances"),
        ("[" * 100_000, "line 2"),
    ],
)
def test_bad_manifests_are_named(tmp_path, row, says):
    write(tmp_path / "a.wav")
    path = jsonl(tmp_path, {"id": "ok", "audio": "a.wav", "text": "x"}, row)
    with pytest.raises(UserError, match=says):
        read_manifest(path)


def test_what_is_not_a_corpus_is_refused(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes(b'{"id": "\xff"}')
    (tmp_path / "none.jsonl").write_text("\n")
    for path, says in (
        (tmp_path / "gone", "no "),
        (tmp_path, "say --kind"),
        (tmp_path / "latin.jsonl", "UTF-8"),
        (tmp_path / "none.jsonl", "holds no utterance"),
    ):
        with pytest.raises(UserError, match=says):
            read_manifest(path)
    with pytest.raises(UserError, match="unknown manifest kind"):
        read_manifest(tmp_path / "none.jsonl", "csv")


def kaldi(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("wav_scp", "wav.scp")).write_text(content, encoding="utf-8")
    return folder


def test_a_kaldi_folder(tmp_path):
    write(tmp_path / "wav" / "a.wav")
    write(tmp_path / "k" / "b.wav")
    folder = kaldi(
        tmp_path / "k",
        wav_scp=f"a {tmp_path / 'wav' / 'a.wav'}\nb\tb.wav\nc b.wav\n",
        text="a hello  world\nb 你好\n",
        utt2spk="a alice\nb bob\n",
        utt2lang="b zh\n",
    )
    found = read_manifest(folder, lang="en")
    assert [(u.id, u.text, u.speaker, u.lang) for u in found.utterances] == [
        ("a", "hello  world", "alice", "en"), ("b", "你好", "bob", "zh")
    ]  # fmt: skip
    assert [(cause, key) for cause, _, key, _ in found.left_out] == [("missing_text", "c")]


def test_kaldi_segments_are_cut_exactly(tmp_path):
    wave = write(tmp_path / "long.wav", 2.0)
    folder = kaldi(
        tmp_path, wav_scp="rec long.wav\n", text="u1 one\nu2 two\nu3 three\nu4 four\n",
        segments="u1 rec 0.25 0.75\nu2 rec 1.5 -1\nu3 rec 1.9 2.2\nu4 rec 3 4\nu5 rec 0 1\n",
    )  # fmt: skip
    found = read_manifest(folder)
    assert [key for _, _, key, _ in found.left_out] == ["u5"]
    out = tmp_path / "out"
    made = pack(found.utterances, out, PackConfig(shuffle=False), 1, found.left_out)
    assert (made["samples"], made["bad"]) == (3, 2)
    lines = [json.loads(line) for line in (out / "bad_samples.jsonl").read_text().splitlines()]
    assert [(b["cause"], b["key"]) for b in lines] == [
        ("missing_text", "u5"),
        ("empty_audio", "u4"),
    ]
    cuts = {"u1": wave[4000:12000], "u2": wave[24000:], "u3": wave[30400:]}
    for sample in samples_of(out):
        audio, rate = soundfile.read(io.BytesIO(sample.audio), dtype="int16")
        assert rate == RATE and sample.extension == "flac"
        assert np.array_equal(audio, cuts[sample.key])
        assert sample.duration == pytest.approx(len(audio) / RATE, abs=1e-4)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"wav_scp": "a sox a.wav -t wav - |\n", "text": "a x\n"}, "commands are never run"),
        ({"wav_scp": "a a.wav\n"}, "lacks text"),
        ({"wav_scp": "a a.wav\n", "text": "b x\n"}, "wav.scp lacks"),
        ({"wav_scp": "a a.wav\na a.wav\n", "text": "a x\n"}, "second time"),
        ({"wav_scp": "a a.wav\n", "text": "a x\n", "segments": "b a 0 1\n"}, "lacks 'a'"),
        ({"wav_scp": "a a.wav\n", "text": "a x\n", "segments": "a a zero 1\n"}, "bad line"),
        ({"wav_scp": "a a.wav\n", "text": "a x\n", "segments": "a r 0 1\n"}, "wav.scp lacks"),
        ({"wav_scp": "a gone.wav\n", "text": "a x\n"}, "missing"),
    ],
)
def test_bad_kaldi_folders_are_named(tmp_path, files, says):
    write(tmp_path / "a.wav")
    with pytest.raises(UserError, match=says):
        read_manifest(kaldi(tmp_path, **files), "kaldi")


def test_a_librispeech_tree(tmp_path):
    folder = tmp_path / "dev-clean" / "84" / "121123"
    for i in range(3):
        write(folder / f"84-121123-000{i}.flac", seed=i)
    (folder / "84-121123.trans.txt").write_text("84-121123-0000 GO ON\n84-121123-0001 HE SAID\n")
    found = read_manifest(tmp_path)
    assert [(u.id, u.text, u.speaker, u.lang) for u in found.utterances] == [
        ("84-121123-0000", "GO ON", "84", "en"), ("84-121123-0001", "HE SAID", "84", "en")
    ]  # fmt: skip
    assert [key for _, _, key, _ in found.left_out] == ["84-121123-0002"]
    (folder / "84-121123-0001.flac").unlink()
    with pytest.raises(UserError, match="missing"):
        read_manifest(tmp_path)


def test_an_aishell_tree_and_one_split_of_it(tmp_path):
    for split, speaker, key in (
        ("train", "S0002", "BAC009S0002W0122"), ("test", "S0764", "BAC009S0764W0121"),
        ("test", "S0764", "BAC009S0764W0999"),
    ):  # fmt: skip
        write(tmp_path / "wav" / split / speaker / f"{key}.wav")
    (tmp_path / "transcript").mkdir()
    (tmp_path / "transcript" / "aishell_transcript_v0.8.txt").write_text(
        "BAC009S0002W0122 而 对 楼市\nBAC009S0764W0121 甚至 出现\nBAC009S0900W0001 没有\n",
        encoding="utf-8",
    )
    whole = read_manifest(tmp_path)
    assert [(u.text, u.speaker, u.lang) for u in whole.utterances] == [
        ("甚至出现", "S0764", "zh"), ("而对楼市", "S0002", "zh")
    ]  # fmt: skip
    assert [key for _, _, key, _ in whole.left_out] == ["BAC009S0764W0999"]
    split = read_manifest(tmp_path / "wav" / "train").utterances
    assert [u.id for u in split] == ["BAC009S0002W0122"]


def test_packing_keeps_audio_bytes_text_and_order(tmp_path):
    found = read_manifest(corpus(tmp_path)).utterances
    made = pack(found, tmp_path / "out", PackConfig(3, shuffle=False), 1)
    read = samples_of(tmp_path / "out")
    assert [s.key for s in read] == [u.id for u in found]
    assert [s.audio for s in read] == [u.audio.read_bytes() for u in found]
    assert [s.text for s in read] == [u.text for u in found]
    assert [s["samples"] for s in made["shards"]] == [3, 3, 1]
    assert made["speakers"] == 2 and made["bad"] == made["repaired"] == 0
    seconds = sum(0.1 + 0.05 * i for i in range(7))
    assert made["hours"] == pytest.approx(seconds / 3600, abs=1e-4)
    assert {k: v["samples"] for k, v in made["langs"].items()} == {"en": 4, "zh": 3}
    assert read_dataset(tmp_path / "out")["samples"] == 7
    assert all(verify_shard(t).bad == () for t in (tmp_path / "out").glob("*.tar"))


def test_shuffled_packing_is_the_seeds_for_any_number_of_processes(tmp_path):
    found = read_manifest(corpus(tmp_path)).utterances
    bytes_of = {}
    for name, seed, processes in (("a", 1, 1), ("b", 1, 2), ("c", 2, 1)):
        pack(found, tmp_path / name, PackConfig(3, seed=seed), processes)
        bytes_of[name] = [p.read_bytes() for p in sorted((tmp_path / name).glob("*.tar"))]
    assert bytes_of["a"] == bytes_of["b"] != bytes_of["c"]
    assert sorted(s.key for s in samples_of(tmp_path / "c")) == [f"u{i}" for i in range(7)]


def test_a_second_run_writes_only_what_is_missing(tmp_path):
    found = read_manifest(corpus(tmp_path)).utterances
    found[4].audio.write_bytes(b"no audio")
    out, config = tmp_path / "out", PackConfig(2)
    first = pack(found, out, config, 1)
    assert first["bad"] == 1
    listed = (out / "bad_samples.jsonl").read_text()
    assert json.loads(listed)["key"] == "u4" and json.loads(listed)["cause"] == "decode_error"
    content = {p.name: p.read_bytes() for p in out.iterdir()}
    (out / "000001.index.json").unlink()  # as if stopped between a tar and its index
    (out / "000002.index.json").write_text("{")
    stamps = {p.name: p.stat().st_mtime_ns for p in out.glob("*.tar")}
    time.sleep(0.02)
    assert pack(found, out, config, 1) == first | {"written": 2}
    assert {p.name: p.read_bytes() for p in out.iterdir()} == content
    again = {p.name for p in out.glob("*.tar") if p.stat().st_mtime_ns != stamps[p.name]}
    assert again == {"000001.tar", "000002.tar"}


def test_killed_and_run_again_is_as_never_killed(tmp_path):
    source = corpus(tmp_path, 40)
    tool = [sys.executable, str(ROOT / "tools" / "make_shards.py"), str(source)]
    options = ["--shard-size", "1", "--processes", "1", "--out"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(
        [*tool, *options, str(tmp_path / "out")], env=env, start_new_session=True
    )
    deadline = time.time() + 50
    while len(list((tmp_path / "out").glob("*.index.json"))) < 3 and time.time() < deadline:
        time.sleep(0.002)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    found = read_manifest(source).utterances
    pack(found, tmp_path / "out", PackConfig(1), 1)
    pack(found, tmp_path / "whole", PackConfig(1), 1)
    contents = [
        {p.name: p.read_bytes() for p in (tmp_path / name).iterdir() if not p.name.startswith(".")}
        for name in ("out", "whole")
    ]
    assert contents[0] == contents[1]
    assert len(samples_of(tmp_path / "out")) == 40


def test_other_shards_are_not_overwritten(tmp_path):
    found = read_manifest(corpus(tmp_path)).utterances
    out = tmp_path / "out"
    pack(found, out, PackConfig(3), 1)
    for utterances, config in ((found[1:], PackConfig(3)), (found, PackConfig(4))):
        with pytest.raises(UserError, match="other shards"):
            pack(utterances, out, config, 1)
    (out / "packing.json").unlink()
    with pytest.raises(UserError, match="shards already"):
        pack(found, out, PackConfig(3), 1)


def test_ids_that_give_one_key_and_formats_that_are_not_read_stop_at_once(tmp_path):
    write(tmp_path / "a.wav")
    (tmp_path / "a.amr").write_bytes(b"")
    out = tmp_path / "out"
    pair = [Utterance(k, tmp_path / "a.wav", "x") for k in ("a.b", "a_b")]
    for utterances, says in (
        (pair, "same key"),
        ([Utterance("a", tmp_path / "a.amr", "x")], "must be one of"),
        ([Utterance("\n", tmp_path / "a.wav", "x")], "cannot be a key"),
    ):
        with pytest.raises(UserError, match=says):
            pack(utterances, out, PackConfig(), 1)
    assert not out.exists()
    with pytest.raises(UserError, match="not Unicode"):
        pack([Utterance("a", tmp_path / "a.wav", "\ud800")], out, PackConfig(), 1)


def test_wrong_durations_are_repaired_and_counted(tmp_path):
    write(tmp_path / "a.wav", 0.5)
    claims = [Utterance(f"u{d}", tmp_path / "a.wav", "x", duration=d) for d in (0.0, 0.52, 5.0)]
    made = pack(claims, tmp_path / "out", PackConfig(), 1)
    assert made["repaired"] == 1
    assert [s.duration for s in samples_of(tmp_path / "out")] == [0.5] * 3


@pytest.mark.parametrize("subtype", ["PCM_16", "FLOAT", "DOUBLE", "PCM_24"])
def test_encoding_as_flac_keeps_the_samples(tmp_path, subtype):
    wave = np.arange(-32_768, 32_768, 5).astype(np.int16)
    exact = subtype == "PCM_16"
    soundfile.write(tmp_path / "a.wav", wave if exact else wave / 32_768, RATE, subtype=subtype)
    write(tmp_path / "b.flac", 0.3)
    both = [Utterance(p, tmp_path / p, "x") for p in ("a.wav", "b.flac")]
    pack(both, tmp_path / "out", PackConfig(shuffle=False, encode="flac"), 1)
    a, b = samples_of(tmp_path / "out")
    assert (a.extension, b.audio) == ("flac", (tmp_path / "b.flac").read_bytes())
    assert np.array_equal(soundfile.read(io.BytesIO(a.audio), dtype="int16")[0], wave)


def test_shards_by_bytes(tmp_path):
    found = read_manifest(corpus(tmp_path, 20)).utterances
    size = sum(u.audio.stat().st_size for u in found)
    made = pack(found, tmp_path / "out", PackConfig(shard_bytes=size // 4), 1)
    assert 4 <= len(made["shards"]) <= 5
    assert made["samples"] == 20
    assert shard_size("200MB") == (500, 200_000_000)
    assert shard_size("1.5gb") == (500, 1_500_000_000)
    assert shard_size("64") == (64, 0)
    for text in ("0", "-3", "2.5", "MB", "many", "nanMB", "infGB"):
        with pytest.raises(UserError, match="shard size"):
            shard_size(text)
    for bad in ({"shard_size": 0}, {"encode": "opus"}, {"shard_bytes": -1}):
        with pytest.raises(UserError):
            PackConfig(**bad)


def run_tool(name: str, *args) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tools" / name), *map(str, args)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


def test_the_tools_from_manifest_to_mean(tmp_path):
    out = tmp_path / "out"
    made = run_tool("make_shards.py", corpus(tmp_path), "--out", out, "--shard-size", 3)
    assert made.returncode == 0 and "7 samples in 3 shards" in made.stdout, made.stderr
    good = run_tool("verify_shards.py", out, "--json")
    told = json.loads(good.stdout)
    assert (good.returncode, told["good"], told["bad"]) == (0, 7, [])
    tar = out / "000001.tar"
    tar.write_bytes(tar.read_bytes()[: build_index(tar).entry(2).audio_offset])
    (out / "000002.tar").unlink()
    bad = run_tool("verify_shards.py", out, "--json")
    assert bad.returncode == 1
    found = {(b["cause"], b["shard"]) for b in json.loads(bad.stdout)["bad"]}
    assert {("truncated_tar", "000001.tar"), ("missing_shard", "000002.tar")} <= found
    mean = run_tool("cmvn.py", out, "--out", tmp_path / "cmvn.json", "--processes", 1)
    assert mean.returncode == 0 and "truncated_tar 1" in mean.stdout, mean.stderr
    assert len(json.loads((tmp_path / "cmvn.json").read_text())["mean"]) == 80
    wrong = run_tool("make_shards.py", tmp_path / "gone", "--out", out)
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    assert wrong.stderr.startswith("error: ")


@pytest.mark.parametrize("name", ["en_digits/test", "en_read/valid", "zh_words/valid"])
def test_real_recordings_pack_and_verify_without_a_drop(tmp_path, recordings, name):
    found = read_manifest(recordings / f"{name}.jsonl").utterances
    made = pack(found, tmp_path, PackConfig(200), 2)
    assert (made["samples"], made["bad"], made["repaired"]) == (len(found), 0, 0)
    verdicts = [verify_shard(t) for t in sorted(tmp_path.glob("*.tar"))]
    assert [v.bad for v in verdicts] == [()] * len(verdicts)
    assert sum(v.samples for v in verdicts) == len(found)
    texts = {s.key: s.text for s in samples_of(tmp_path)}
    assert texts == {u.id: u.text for u in found}
