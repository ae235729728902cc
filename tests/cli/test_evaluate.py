"""`dsasr evaluate` on a trained run."""

from __future__ import annotations

import json

import pytest


@pytest.mark.launcher
def test_evaluation_with_the_whole_suite_and_against_another(trained, tiny, tmp_path, command):
    arguments = [trained, "--data", tiny.parent / "valid", "--suite", "--clips", 1, "--limit", 3]
    done = command("evaluate", *arguments, "--report", "--out", tmp_path / "rows.jsonl")
    assert done.returncode == 0, done.stderr
    report = json.loads((trained / "report.json").read_text())
    channels = ["quiet", "padded", "band", "ulaw", "mp3"]
    assert list(report["conditions"]) == ["clean", "snr20", "snr10", "snr5", "snr0", *channels]
    conditions = {r["condition"] for r in report["hallucination"]["rows"]}
    assert conditions >= {"silence", "cut50", "clean"}
    assert [r["stage"] for r in report["stages"]][-1] == "joint"
    assert (trained / "transcripts.jsonl").read_text() == (tmp_path / "rows.jsonl").read_text()
    sounds = report["hallucination"]["nonspeech"]
    assert sounds["all"]["clips"] == 4 and sounds["silence"]["low"] is None
    # What the report says of the evaluation, and the sounds of the worst transcripts.
    evaluated = report["evaluated"]
    assert evaluated["recordings"] == 3 and evaluated["left_out"] == {}
    assert evaluated["checkpoint"].startswith("step-") and evaluated["versions"]["torch"]
    assert {p.name for p in (trained / "worst_clips").iterdir()} == set(report["clips"].values())
    few = command("evaluate", *arguments, "--suite-utterances", 1)
    assert few.stdout.splitlines()[-1].startswith("17 clips")  # 4 sounds, 3 clean, 10 changed
    alone = command("evaluate", *arguments[:3], "--suite-utterances", 1)
    assert alone.returncode == 2 and "--suite" in alone.stderr
    # The newest checkpoint by its name; only the run's end goes into its report.
    last = sorted(p.name for p in (trained / "checkpoints").glob("step-*"))[-1]
    named = command("evaluate", *arguments, "--checkpoint", last, "--out", tmp_path / "named.jsonl")
    assert named.returncode == 0, named.stderr
    assert (tmp_path / "named.jsonl").read_text() == (tmp_path / "rows.jsonl").read_text()
    refused = command("evaluate", *arguments, "--checkpoint", last, "--report")
    assert refused.returncode == 2 and "--out" in refused.stderr
    missing = command("evaluate", *arguments, "--checkpoint", "step-1")
    assert missing.returncode == 2 and last in missing.stderr
    # Transcripts are scored by other rules where they are given.
    (tmp_path / "normalizer.json").write_text(json.dumps({"ba": "do"}))
    spelled = command("evaluate", *arguments[:3], "--rules", tmp_path / "normalizer.json")
    assert spelled.returncode == 0, spelled.stderr
    wrong = command("evaluate", *arguments[:3], "--rules", "whisper")
    assert wrong.returncode == 2 and "--rules must be one of standard, plain" in wrong.stderr
    again = command("evaluate", *arguments, "--against", trained)
    assert again.returncode == 0, again.stderr
    assert "errors +0.00 (+0.00…+0.00), p 1.000" in again.stdout
    other = command("evaluate", trained, "--data", tiny.parent / "valid", "--against", trained)
    assert other.returncode == 0, other.stderr
    assert f"against {trained}, on the 3 clips that both have:" in other.stdout
    # The CTC head's weight and the threshold of doubt; the run's speech was measured at its start.
    tuned = command("evaluate", *arguments[:3], "--tune", "--beam", 2)
    assert tuned.returncode == 0 and "ctc_weight 0 " in tuned.stdout, tuned.stderr
    assert set(json.loads((trained / "tuned.json").read_text())) == {"ctc_weight", "doubt"}
    speech = json.loads((trained / "speech.json").read_text())
    assert speech["utterances"] == 52 and len(speech["seconds"]) == 6
    (trained / "tuned.json").unlink()
