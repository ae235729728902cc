"""Each form of corpus that people have: recognized, and read as this project's own entries."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

from dsasr.data.manifests.registry import FORMS, read_manifest, recognize
from dsasr.utils.errors import UserError

RATE = 16_000


def wav(path: Path, seconds: float = 0.2) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    wave = (np.random.default_rng(1).standard_normal(int(seconds * RATE)) * 3000).astype(np.int16)
    soundfile.write(path, wave, RATE, format=path.suffix[1:].upper())
    return path


def write(path: Path, *rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    data = ("\n".join(lines) + "\n").encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def read(path: Path, form: str, **options):
    assert recognize(path).name == form
    return read_manifest(path, **options)


def fields(entry) -> tuple:
    return entry.id, entry.text, entry.speaker, entry.lang, entry.start, entry.end


def refusal(path: Path, **options) -> str:
    with pytest.raises(UserError) as error:
        read_manifest(path, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_our_own_lines_with_an_offset(tmp_path):
    wav(tmp_path / "long.wav", 3.0)
    rows = [
        {"id": "a", "audio": "long.wav", "text": "x", "offset": 0, "duration": 1.5},
        {"id": "b", "audio": "long.wav", "text": "y", "offset": 1.5, "duration": 1.25},
    ]
    entries = read(write(tmp_path / "m.jsonl", *rows), "jsonl").utterances
    assert [(e.start, e.end) for e in entries] == [(0.0, 1.5), (1.5, 2.75)]
    assert not any(e.extra for e in entries)
    assert "--split" in refusal(tmp_path / "m.jsonl", split="train")
    both = write(tmp_path / "n.jsonl", rows[0] | {"start": 0.0})
    assert "line 1: 'offset' and 'start'" in refusal(both)


def test_nemo(tmp_path):
    wav(tmp_path / "audio" / "long.wav", 3.0)
    path = write(
        tmp_path / "train.json",
        {"audio_filepath": "audio/long.wav", "duration": 1.0, "text": "one", "lang": "en"},
        {"audio_filepath": "audio/long.wav", "offset": 1.0, "duration": 2.0, "text": "two"},
        {"audio_filepath": "audio/long.wav", "duration": 1.0},
    )
    manifest = read(path, "nemo", lang="de")
    assert list(map(fields, manifest.utterances)) == [
        ("long", "one", "", "en", None, None),
        ("long-0001000", "two", "", "de", 1.0, 3.0),
    ]
    assert [row[0] for row in manifest.left_out] == ["missing_text"]


def test_funasr(tmp_path):
    wav(tmp_path / "a.wav")
    row = {"key": "k1", "source": "a.wav", "target": "你好", "text_language": "<|zh|>"}
    (entry,) = read(write(tmp_path / "train.jsonl", row), "funasr").utterances
    assert fields(entry) == ("k1", "你好", "", "zh", None, None)
    archived = write(tmp_path / "b.jsonl", row | {"source": "x.ark:123"})
    assert "wav-copy" in refusal(archived)


def test_ms_swift(tmp_path):
    wav(tmp_path / "a.wav")
    question = {"role": "user", "content": "<audio>Transcribe."}
    typed = [{"type": "text", "text": "HELLO"}]
    manifest = read(
        write(
            tmp_path / "train.jsonl",
            {"messages": [question, {"role": "assistant", "content": "hi"}], "audios": ["a.wav"]},
            {"messages": [question, {"role": "assistant", "content": typed}], "audios": ["a.wav"]},
            {"messages": [question, {"role": "assistant", "content": "x"}], "audios": []},
        ),
        "swift",
    )
    assert [(e.id, e.text) for e in manifest.utterances] == [
        ("a", "hi"),
        (f"{tmp_path.name}-a", "HELLO"),
    ]
    assert [row[0] for row in manifest.left_out] == ["not_asr"]


def test_wenet_lists(tmp_path):
    wav(tmp_path / "a.wav")
    row = {"key": "k", "wav": str(tmp_path / "a.wav"), "txt": "甚至"}
    (entry,) = read(write(tmp_path / "data.list", row), "wenet").utterances
    assert fields(entry) == ("k", "甚至", "", "", None, None)
    shards = write(tmp_path / "shards.list", "/data/shards_000.tar", "/data/shards_001.tar")
    assert "dsasr data index" in refusal(shards) and "text=.txt" in refusal(shards)


def cut(number: int, start: float = 0.0, **change) -> dict:
    recording = {
        "id": "r", "sampling_rate": RATE, "num_samples": 48_000, "duration": 3.0,
        "sources": [{"type": "file", "channels": [0], "source": "r.wav"}],
    }  # fmt: skip
    said = {
        "id": f"s{number}", "recording_id": "r", "start": 0.0, "duration": 1.0, "channel": 0,
        "text": "hello", "language": "English", "speaker": "bob",
    }  # fmt: skip
    return {
        "id": f"c{number}", "start": start, "duration": 1.0, "channel": 0, "type": "MonoCut",
        "supervisions": [said], "recording": recording,
    } | change  # fmt: skip


@pytest.mark.parametrize("name", ["cuts.jsonl", "cuts.jsonl.gz"])
def test_lhotse_cuts(tmp_path, name):
    wav(tmp_path / "r.wav", 3.0)
    two = [cut(3)["supervisions"][0] | {"id": f"t{i}", "start": float(i)} for i in range(2)]
    silent = [cut(4)["supervisions"][0] | {"text": None}]
    path = write(
        tmp_path / name,
        cut(0, duration=3.0),
        cut(1, 1.5),
        cut(2, 1.0, duration=2.0, supervisions=two),
        cut(4, supervisions=silent),
        cut(5, recording=cut(0)["recording"] | {"transforms": [{"name": "Speed"}]}),
        cut(6, type="MixedCut"),
    )
    manifest = read(path, "lhotse")
    assert [(e.id, e.start, e.end) for e in manifest.utterances] == [
        ("c0", None, None), ("c1", 1.5, 2.5), ("c2-t0", 1.0, 2.0), ("c2-t1", 2.0, 3.0)
    ]  # fmt: skip
    assert manifest.utterances[0].lang == "English" and manifest.utterances[0].speaker == "bob"
    causes = [(row[0], row[2]) for row in manifest.left_out]
    assert causes == [("missing_text", "c4"), ("unusable_cut", "c5"), ("unusable_cut", "c6")]


def test_other_parts_of_lhotse_name_their_converter(tmp_path):
    recordings = write(tmp_path / "recordings.jsonl.gz", cut(0)["recording"])
    supervisions = write(tmp_path / "supervisions.jsonl.gz", cut(0)["supervisions"][0])
    for path in (recordings, supervisions):
        assert recognize(path).name == "lhotse-parts" and "lhotse cut simple" in refusal(path)
    shar = tmp_path / "shar"
    write(shar / "cuts.000000.jsonl.gz", cut(0))
    (shar / "recording.000000.tar").write_bytes(bytes(1024))
    assert recognize(shar).name == "lhotse-shar" and "CutSet.from_shar" in refusal(shar)


def test_common_voice(tmp_path):
    wav(tmp_path / "clips" / "cv_1.mp3")
    wav(tmp_path / "clips" / "cv_2.mp3")
    path = write(
        tmp_path / "train.tsv",
        "client_id\tpath\tsentence\tup_votes\tlocale",
        'c1\tcv_1.mp3\tEr sagte: "Ja"\t2\tde',
        "c2\tcv_2\tBonjour\t2\t",
        "c3\tcv_3.mp3\t\t2\tde",
    )
    manifest = read(path, "common-voice", lang="fr")
    assert list(map(fields, manifest.utterances)) == [
        ("cv_1", 'Er sagte: "Ja"', "c1", "de", None, None),
        ("cv_2", "Bonjour", "c2", "fr", None, None),
    ]
    assert [row[2] for row in manifest.left_out] == ["cv_3.mp3"]
    assert recognize(tmp_path).name == "common-voice-folder" and "train.tsv" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_audio_folders(tmp_path, name):
    for split in ("train", "test"):
        wav(tmp_path / split / "sub" / "a.wav")
        rows = [{"file_name": "sub/a.wav", "transcription": 'He said, "no"', "language": "en"}]
        if name.endswith(".csv"):
            rows = ["file_name,transcription,language", 'sub/a.wav,"He said, ""no""",en']
        write(tmp_path / split / name, *rows)
    (entry,) = read(tmp_path / "train", "audiofolder").utterances
    assert fields(entry) == ("a", 'He said, "no"', "", "en", None, None)
    assert "--split" in refusal(tmp_path)
    (entry,) = read(tmp_path, "audiofolder", split="test").utterances
    assert entry.audio == tmp_path / "test" / "sub" / "a.wav"
    (entry,) = read(tmp_path / "train" / name, "audiofolder").utterances
    assert entry.audio == tmp_path / "train" / "sub" / "a.wav"


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    data = wav(tmp_path / "x.flac").read_bytes()
    for split in ("train", "test"):
        audio = [{"bytes": data, "path": f"{split}_{i}.flac"} for i in range(3)]
        table = pyarrow.table({
            "audio": audio, "text": ["one", "two", ""], "speaker_id": [7, 8, 9],
            "scores": [[1.0], [2.0], [3.0]],
        })  # fmt: skip
        path = tmp_path / "data" / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(exist_ok=True)
        parquet.write_table(table, path)
    assert "--split" in refusal(tmp_path / "data", scratch=tmp_path / "s")
    assert "in archives" in refusal(tmp_path / "data", split="train")
    manifest = read(tmp_path / "data", "parquet", split="train", scratch=tmp_path / "s", lang="en")
    assert list(map(fields, manifest.utterances)) == [
        ("train_0", "one", "7", "en", None, None), ("train_1", "two", "8", "en", None, None)
    ]  # fmt: skip
    assert manifest.utterances[1].audio.read_bytes() == data
    assert manifest.utterances[1].audio.suffix == ".flac"
    assert [row[2] for row in manifest.left_out] == ["train_2"]
    (tmp_path / "torn.parquet").write_bytes(path.read_bytes()[:300])
    assert "cannot be read" in refusal(tmp_path / "torn.parquet", scratch=tmp_path / "s")


def archive(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def aishell_archives(folder: Path) -> dict[str, bytes]:
    """The members of AISHELL-1 as it is downloaded: an archive of each speaker."""
    audio = wav(folder / "x.wav").read_bytes()
    members = {}
    for split, speaker, key in (("train", "S0002", "W0122"), ("test", "S0764", "W0121")):
        inner = {f"{split}/{speaker}/BAC009{speaker}{key}.wav": audio, f"{split}/._x.wav": b"mac"}
        path = archive(folder / f"{speaker}.tar.gz", inner)
        members[f"data_aishell/wav/{speaker}.tar.gz"] = path.read_bytes()
    text = "BAC009S0002W0122 而 对 楼市\nBAC009S0764W0121 甚至 出现\n".encode()
    return members | {"data_aishell/transcript/aishell_transcript_v0.8.txt": text}


def test_aishell_as_it_is_downloaded(tmp_path):
    members = aishell_archives(tmp_path / "made")
    whole = archive(tmp_path / "data_aishell.tgz", members)
    assert "--split" in refusal(whole, scratch=tmp_path / "s")
    (entry,) = read(whole, "aishell", scratch=tmp_path / "s", split="train").utterances
    assert fields(entry) == ("BAC009S0002W0122", "而对楼市", "S0002", "zh", None, None)
    assert entry.audio.parent == tmp_path / "s"
    # Unpacked once: the speakers' archives are still there, one of them unpacked beside.
    for name, data in members.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    wav(tmp_path / "data_aishell" / "wav" / "test" / "S0764" / "BAC009S0764W0121.wav")
    folder, options = tmp_path / "data_aishell", {"scratch": tmp_path / "t"}
    assert len(read(folder, "aishell", split="train", **options).utterances) == 1
    (entry,) = read(folder, "aishell", split="test", **options).utterances
    assert entry.audio.parent.name == "S0764"


def test_librispeech_as_it_is_downloaded(tmp_path):
    audio = wav(tmp_path / "x.flac").read_bytes()
    base = "LibriSpeech/dev-clean/84/121123/84-121123"
    whole = archive(
        tmp_path / "dev-clean.tar.gz",
        {
            "../../evil.txt": b"out", f"{base}.trans.txt": b"84-121123-0000 GO ON\n",
            f"{base}-0000.flac": audio,
            "LibriSpeech/dev-clean/84/121123/._84-121123-0000.flac": b"mac",
        },
    )  # fmt: skip
    manifest = read(whole, "librispeech", scratch=tmp_path / "s")
    assert list(map(fields, manifest.utterances)) == [
        ("84-121123-0000", "GO ON", "84", "en", None, None)
    ]
    assert manifest.utterances[0].audio.read_bytes() == audio and not manifest.left_out
    assert not (tmp_path.parent / "evil.txt").exists()


def test_what_macos_adds_is_no_audio(tmp_path):
    folder = tmp_path / "dev-clean" / "84" / "1"
    wav(folder / "84-1-0000.flac")
    (folder / "84-1.trans.txt").write_text("84-1-0000 GO ON\n")
    (folder / "._84-1-0000.flac").write_bytes(b"mac")
    (folder / "._84-1.trans.txt").write_bytes(b"\x00\x05\x16\x07")
    manifest = read(tmp_path, "librispeech")
    assert len(manifest.utterances) == 1 and not manifest.left_out


def test_forms_have_names_of_their_own():
    names = [form.name for form in FORMS]
    assert len(set(names)) == len(names)
