"""What the commands' arguments have in common: counts, and results that replace nothing."""

from __future__ import annotations

import argparse

import pytest

from dsasr.cli.arguments import check_new, count, positive
from dsasr.cli.transcribe import targets
from dsasr.utils.errors import UserError


def test_counts_are_not_negative():
    assert count("0") == 0 and positive("3") == 3
    for parse, text in ((count, "-1"), (positive, "0"), (positive, "-2")):
        with pytest.raises(argparse.ArgumentTypeError, match="at least"):
            parse(text)


@pytest.mark.parametrize("option", ["--limit", "--clips", "--pairs", "--beam"])
def test_negative_counts_of_an_evaluation_are_refused(option, capsys):
    from dsasr.cli import evaluate

    with pytest.raises(SystemExit):
        evaluate.parse(["run", "--data", "x", option, "-3"])
    assert "at least 0" in capsys.readouterr().err


def test_results_replace_nothing_unless_they_are_told_to(tmp_path):
    there, new = tmp_path / "there", tmp_path / "sub" / "new"
    there.write_text("x")
    with pytest.raises(UserError, match="is there already"):
        check_new([new, there], overwrite=False)
    check_new([new, there], overwrite=True)
    with pytest.raises(UserError, match="is a folder"):
        check_new([tmp_path], overwrite=True)
    with pytest.raises(UserError, match="cannot be written"):
        check_new([there / "below"], overwrite=False)
    assert not new.parent.exists()


def test_transcripts_lie_as_their_audio_does(tmp_path):
    for name in ("talks/a.wav", "talks/day 2/a.wav", "a.wav", "other/a.mp3"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    talks, out = tmp_path / "talks", tmp_path / "out"
    sources = [talks / "a.wav", talks / "day 2" / "a.wav", tmp_path / "a.wav",
               tmp_path / "other" / "a.mp3", "-"]  # fmt: skip
    found = targets(out, sources, [str(talks), str(sources[2]), str(sources[3]), "-"], "text")
    places = [str(path.relative_to(out)) for path in found.values()]
    assert places == ["a.txt", "day 2/a.txt", "a-2.txt", "a-3.txt", "stdin.txt"]
    assert list(found) == list(map(str, sources))
