"""Labels of a probe set from the shards' own alignments."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dsasr.analysis import measure, probed_encoders
from dsasr.data.audio.features import FbankConfig
from dsasr.data.text.phonemes import PhonemeVocab, PhonemizerConfig
from dsasr.entropy_allocation.v_information import VInformation, VInformationConfig
from dsasr.evaluation.eval_sets import Recording
from dsasr.utils.errors import UserError


@pytest.fixture
def aligner():
    """A run without a CTC head, whose frames are 40 ms."""
    data = SimpleNamespace(phonemizer=PhonemizerConfig(kind="stored"), fbank=FbankConfig())
    build = SimpleNamespace(
        phonemes=PhonemeVocab.build([list("abcd")]), recipe=SimpleNamespace(data=data)
    )
    return probed_encoders.ProbedEncoder("x", {}, 0.04, lambda held: {}, build=build)


def recording(key, text, **alignment):
    wave = np.zeros(6400, np.float32)
    return Recording(key, wave, text, "zh", key, alignment=alignment or None)


PHONEMES = [["a", 0.0, 0.08], ["sil", 0.08, 0.16], ["b", 0.16, 0.24], ["c", 0.24, 0.4]]


def test_stored_alignments_need_no_ctc_head(aligner):
    # The alignment's words have two characters each; of the text alone, each character is a word.
    words = [["今天", 0.0, 0.16], ["天气", 0.16, 0.4]]
    turned = [["天气", 0.0, 0.16], ["今天", 0.16, 0.4]]
    held = [
        recording("u1", "今天天气", phonemes=PHONEMES, words=words),
        recording("u2", "天气今天", phonemes=PHONEMES, words=turned),
        recording("u3", "a bcd", phonemes=PHONEMES),
        recording("u4", "x", phonemes=[["z", 0.0, 0.1]]),
        recording("u5", "x", phonemes=[["a", 0.2, 0.1]]),
    ]
    found = measure.probe_set(aligner, held)
    first, second, third = found.labels
    assert first.positions_S.tolist() == [0, 0, -1, -1, 1, 1, 2, 2, 2, 2]
    assert aligner.build.phonemes.decode(first.phonemes) == ["a", "b", "c"]
    assert first.words_S.tolist() == [0, 0, -1, -1, 1, 1, 1, 1, 1, 1]
    # The same spelling is the same word, in another utterance too.
    assert second.words_S.tolist() == [1, 1, -1, -1, 0, 0, 0, 0, 0, 0]
    # Without stored words, the text's: by their characters.
    assert len(set(third.words_S.tolist())) == 3
    assert found.causes == {"UnknownPhoneme": 1, "not_alignable": 1}


def test_without_a_head_or_an_alignment_it_is_refused(aligner):
    with pytest.raises(UserError, match="no CTC head"):
        measure.probe_set(aligner, [recording(f"u{i}", "今天") for i in range(3)])


def test_what_has_no_text_or_a_key_that_was_there_is_counted(aligner):
    held = [recording(f"u{i % 4}", "今天", phonemes=PHONEMES) for i in range(5)]
    found = measure.probe_set(aligner, [*held, recording("u9", "")])
    assert [r.key for r in found.recordings] == [x.key for x in found.labels]
    assert len(found.labels) == 4 and found.causes == {"same_key": 1, "no_text": 1}
    with pytest.raises(UserError, match=r"only 2 utterances.*same_key.*at least 3"):
        measure.probe_set(aligner, [held[0], held[1], held[0]])


def spoken(aligner, count: int = 12, **given) -> measure.ProbeSet:
    rng = np.random.default_rng(0)
    held = [recording(f"u{i}", "今天", phonemes=PHONEMES) for i in range(count)]
    held = [replace(r, wave=rng.normal(0, 0.1, 6400).astype(np.float32)) for r in held]
    return replace(measure.probe_set(aligner, held), **given)


def subject(aligner, encode, **given) -> probed_encoders.ProbedEncoder:
    about = {"run": "runs/x", "kind": "checkpoint"}
    return probed_encoders.ProbedEncoder(
        "x", about, 0.04, lambda held: {r.key: encode(r.wave) for r in held}, aligner.build, **given
    )


def spread(wave: np.ndarray) -> torch.Tensor:
    """Ten frames of four numbers."""
    return torch.from_numpy(wave[: len(wave) // 40 * 40]).reshape(10, 4, -1).std(-1)


def test_a_row_of_few_speakers_has_folds(aligner):
    config, probes = VInformationConfig(control=False, draws=20), spoken(aligner, 11)
    row, features = measure.measure(subject(aligner, spread), probes, config)
    assert len(features) == row["utterances"] == row["csai"]["utterances"] == 11
    assert (row["pai"]["folds"], row["pai"]["split"]) == (4, "speaker")
    assert row["pai"]["shuffled"] is None and json.loads(json.dumps(row, allow_nan=False)) == row
    again, _ = measure.measure(subject(aligner, spread), probes, config, features)
    assert again["cka_to_first"] == pytest.approx(1)
    # A constant has no direction, and so no CKA.
    flat = subject(aligner, lambda wave: torch.ones(10, 4))
    assert measure.measure(flat, probes, config, features)[0]["cka_to_first"] is None


def test_recordings_reach_an_encoder_at_its_own_rate(aligner):
    config, heard = VInformationConfig(control=False, draws=2), []

    def encode(wave):
        heard.append(len(wave))
        return spread(wave)

    measure.measure(subject(aligner, encode), spoken(aligner), config)
    measure.measure(subject(aligner, encode), spoken(aligner, rate=8000), config)
    measure.measure(subject(aligner, encode, rate=8000), spoken(aligner), config)
    assert heard == [6400] * 12 + [12800] * 12 + [3200] * 12


def test_what_cannot_be_measured_is_refused(aligner):
    config = VInformationConfig(control=False)
    broken = subject(aligner, lambda wave: torch.full((10, 4), math.nan))
    with pytest.raises(UserError, match="not finite"):
        measure.measure(broken, spoken(aligner), config)
    with pytest.raises(UserError, match="more folds; give more utterances"):
        measure.measure(
            subject(aligner, spread), spoken(aligner, 3), VInformationConfig(folds=2, control=False)
        )


def test_the_longest_recording_is_what_all_encoders_read(tmp_path):
    folders = [tmp_path / name for name in ("whisper", "hubert", "run")]
    for folder in folders:
        folder.mkdir()
    whisper = {"model_type": "whisper", "max_source_positions": 50}
    (folders[0] / "config.json").write_text(json.dumps(whisper))
    (folders[1] / "config.json").write_text('{"model_type": "hubert"}')
    assert probed_encoders.longest(folders) == pytest.approx(1.0)
    assert probed_encoders.longest(folders[1:]) == probed_encoders.MOST_SECONDS


def gain(value: float, **given) -> VInformation:
    numbers = {"low": value - 0.1, "high": value + 0.1, "given": 2.0, "left": 2.0 - value}
    numbers |= {"shuffled": 0.004, "frames": 90, "utterances": 9, "split": "speaker", **given}
    return VInformation(value, **numbers)


def row(pai: VInformation, csai: VInformation) -> dict:
    head = {"name": "x", "nse": 0.5, "effective_rank": 3.0}
    return head | {"pai": measure._plain(pai), "csai": measure._plain(csai)}


def test_a_row_is_json_and_says_whether_something_was_found():
    nothing = gain(0.0, low=0.0, high=0.0, shuffled=math.nan, limit=0.0123, folds=4, wins=0)
    held = row(gain(0.5, limit=0.1), nothing)
    again = json.loads(json.dumps(held, allow_nan=False))
    assert again == held
    assert held["csai"]["shuffled"] is None and held["csai"]["limit"] == 0.0123
    assert (held["pai"]["found"], held["csai"]["found"]) == (True, False)
    assert held["csai"]["share"] == 0 and held["pai"]["share"] == 0.25
    # An entropy of zero has no share, and what no probe could use no limit.
    assert measure._plain(gain(0.0, given=0.0, limit=math.nan))["share"] is None


def test_the_table_shows_what_was_not_found_and_rows_without_those_keys():
    nothing = gain(0.0, low=0.0, high=0.0, shuffled=math.nan, limit=0.0123, wins=0)
    new, bad = row(gain(0.5), nothing), row(gain(-0.5), gain(0.0, given=0.0))
    old = row(gain(0.5), gain(0.25))
    for key in ("limit", "folds", "wins", "found"):
        del old["pai"][key], old["csai"][key]
    _, *lines = (" ".join(x.split()) for x in measure.table([new, old, bad]).splitlines())
    assert "0.500 0.40…0.60 [0.00] 25.0% none (<0.012) [–] 0.0%" in lines[0]
    assert "0.500 0.40…0.60 [0.00] 25.0% 0.250 0.15…0.35 [0.00] 12.5%" in lines[1]
    assert "-0.500 -0.60…-0.40 [0.00] underfit -25.0%" in lines[2]
    rough = row(gain(0.0, wins=0, limit=math.nan), gain(0.5))
    assert "none [0.00]" in measure.table([rough])
