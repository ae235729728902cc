"""Manifests, Kaldi folders and corpus trees: what is read, what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

from dsasr.data.manifests.entry import ManifestEntry
from dsasr.data.manifests.registry import read_manifest
from dsasr.utils.errors import UserError

RATE = 16_000


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


def test_jsonl(tmp_path):
    write(tmp_path / "a.wav")
    row = {"id": 7, "audio": "a.wav", "text": "hi\u2028there", "speaker": None, "gender": "f"}
    path = jsonl(tmp_path, "\ufeff" + json.dumps(row, ensure_ascii=False), "")
    (entry,) = read_manifest(path, lang="en").utterances
    assert entry == ManifestEntry(
        "7", tmp_path / "a.wav", "hi\u2028there", "", "en", extra={"gender": "f"}
    )


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("{", "line 2"),
        ("[]", "line 2"),
        ({"id": "x", "audio": "a.wav"}, "'text' is missing"),
        ({"audio": "a.wav", "text": "x"}, "'id' is missing"),
        ({"id": "x", "audio": "a.wav", "text": None}, "not a text"),
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
    manifest = read_manifest(folder, lang="en")
    assert [(u.id, u.text, u.speaker, u.lang) for u in manifest.utterances] == [
        ("a", "hello  world", "alice", "en"), ("b", "你好", "bob", "zh")
    ]  # fmt: skip
    assert [(cause, key) for cause, _, key, _ in manifest.left_out] == [("missing_text", "c")]


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
    manifest = read_manifest(tmp_path)
    assert [(u.id, u.text, u.speaker, u.lang) for u in manifest.utterances] == [
        ("84-121123-0000", "GO ON", "84", "en"), ("84-121123-0001", "HE SAID", "84", "en")
    ]  # fmt: skip
    assert [key for _, _, key, _ in manifest.left_out] == ["84-121123-0002"]
    (folder / "84-121123-0001.flac").unlink()
    with pytest.raises(UserError, match="missing"):
        read_manifest(tmp_path)


def test_librispeechs_splits_stay_apart(tmp_path):
    for split in ("train-clean-100", "train-clean-360", "dev-clean"):
        folder = tmp_path / "LibriSpeech" / split / "84" / "121123"
        write(folder / f"84-{split}-0000.flac")
        (folder / "84-121123.trans.txt").write_text(f"84-{split}-0000 GO ON\n")
    with pytest.raises(UserError, match=r"holds dev, train data.*such as .*/dev-clean"):
        read_manifest(tmp_path)
    assert len(read_manifest(tmp_path / "LibriSpeech" / "dev-clean").utterances) == 1
    shutil.rmtree(tmp_path / "LibriSpeech" / "dev-clean")  # two of one kind may be packed together
    assert len(read_manifest(tmp_path).utterances) == 2


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
    with pytest.raises(UserError, match=r"holds test, train data.*such as .*wav/t"):
        read_manifest(tmp_path)
    test = read_manifest(tmp_path / "wav" / "test")
    assert [(u.text, u.speaker, u.lang) for u in test.utterances] == [("甚至出现", "S0764", "zh")]
    assert [key for _, _, key, _ in test.left_out] == ["BAC009S0764W0999"]
    split = read_manifest(tmp_path / "wav" / "train").utterances
    assert [u.id for u in split] == ["BAC009S0002W0122"]
