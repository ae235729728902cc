"""`dsasr data inspect`: a page of shards, and mistakes in one line."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 1)


def test_a_page_of_some_of_the_shards(command, tiny, tmp_path):
    page = tmp_path / "new" / "page.html"
    words = "data", "inspect", tiny.parent / "train", "--out", page, "--odd", 4, "--players", 2
    done = command(*words, "--shards", 2)
    assert done.returncode == 0, done.stderr
    assert f"{page}: 32 utterances of 2 shards" in done.stdout  # the first and the last
    text = page.read_text()
    assert "2 of 3" in text and text.count("<article") == 2 + 4 * 4
    done = command(*words)
    assert done.returncode == 2 and "is there already" in done.stderr
    done = command(*words, "--overwrite", "--shards", 0)
    assert done.returncode == 0 and "52 utterances of 3 shards" in done.stdout


def test_mistakes_end_in_one_line(command, tmp_path):
    bad = tmp_path / "bad.tar"
    bad.write_bytes(bytes(1024))
    for paths, says in (((tmp_path / "x",), "there is no"), ((bad,), "no utterance can be read")):
        done = command("data", "inspect", *paths, "--out", tmp_path / "page.html")
        assert done.returncode == 2 and says in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
        assert not (tmp_path / "page.html").exists()
