"""`dsasr timeline`: its text and its picture."""

from __future__ import annotations


def test_it_prints_and_draws(command, tiny, tmp_path):
    picture = tmp_path / "plan.png"
    options = "--recipe", tiny, "--ranks", 4, "--plot", picture, "--triggers", 8
    done = command("timeline", *options)
    assert done.returncode == 0, done.stderr
    assert "1 pretrain: 20 steps of cr_ctc" in done.stdout and "not known" not in done.stdout
    assert "the last 3 steps wait" in done.stdout and "CKA every 2 steps" in done.stdout
    assert "starts from the final encoder" in done.stdout
    assert "pretrain steps 8 (--triggers)" in done.stdout
    assert done.stdout.count("a rank on 4 ranks") == 4 and picture.stat().st_size > 10_000
    done = command("timeline", "--recipe", tiny, "--plot", "x.pdf")
    assert done.returncode == 2 and done.stderr.startswith("error: --plot")


def test_unknown_sizes_are_named(command, tiny):
    done = command("timeline", "--recipe", tiny, "model.llm.path=/nowhere")
    assert done.returncode == 0, done.stderr
    expected = "sizes of adaptor, llm, and so the memory, not known: model.llm.path not there"
    assert expected in done.stdout and "memory   not known\n" in done.stdout
