import pytest

from dsasr import config, recipe
from dsasr.utils.credentials import resolve, split_user
from dsasr.utils.errors import UserError
from dsasr.utils.masking import mask

SIGNED = (
    "https://b.s3.amazonaws.com/x.tar?X-Amz-Algorithm=AWS4&X-Amz-Credential=AKIA/2026&"
    "X-Amz-Expires=60&X-Amz-Security-Token=T0K&X-Amz-Signature=abc"
)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://user:PASS@host/x.tar", "http://user:***@host/x.tar"),
        ("https://TOKEN@host/x", "https://***@host/x"),
        ("http://user:p:a@host:80/x?y=1", "http://user:p:***@host:80/x?y=1"),
        ("http://user:p@ss@host/x", "http://user:***@host/x"),
        ("https://h/x?sv=1&sig=S3CRET&se=2", "https://h/x?sv=1&sig=***&se=2"),
        ("https://h/x?access_token=S3CRET", "https://h/x?access_token=***"),
        (
            "https://h/x?AWSAccessKeyId=A&Signature=B",
            "https://h/x?AWSAccessKeyId=***&Signature=***",
        ),
        ("cannot read 'http://a:b@h/x': why", "cannot read 'http://a:***@h/x': why"),
        ("pipe:curl http://a:b@h/x | cat", "pipe:curl http://a:***@h/x | cat"),
        ("http://user:${PASS}@h/x?sig=${SIG}", "http://user:${PASS}@h/x?sig=${SIG}"),
        ("https://h/x?monkey=1&design=2", "https://h/x?monkey=1&design=2"),
        ("/plain/path@x?sig=1", "/plain/path@x?sig=1"),
        ("me@host.org", "me@host.org"),
    ],
)
def test_what_is_secret_is_masked(text, shown):
    assert mask(text) == shown and mask(shown) == shown


def test_a_signed_url():
    shown = mask(SIGNED)
    assert "AKIA" not in shown and "T0K" not in shown and "abc" not in shown
    assert "X-Amz-Algorithm=AWS4" in shown and "X-Amz-Expires=60" in shown


def test_references_are_resolved(monkeypatch, tmp_path):
    monkeypatch.setenv("PASSWORD", "s@cret")
    monkeypatch.delenv("SIGNATURE", raising=False)
    (tmp_path / "signature").write_text("signed\n")
    monkeypatch.setenv("SIGNATURE_FILE", str(tmp_path / "signature"))
    url = "https://me:${PASSWORD}@host/{a,b}.tar?sig=${SIGNATURE}"
    assert resolve(url) == "https://me:s%40cret@host/{a,b}.tar?sig=signed"
    assert resolve("/local/${PASSWORD}") == "/local/${PASSWORD}"
    monkeypatch.setenv("SIGNATURE_FILE", str(tmp_path / "none"))
    with pytest.raises(UserError, match="SIGNATURE_FILE="):
        resolve(url)
    for masked in ("http://me:***@host/x", "https://h/x?sig=***"):
        with pytest.raises(UserError, match=r"was not stored; give it again, best as \$\{NAME\}"):
            resolve(masked)


def test_the_header_of_a_user():
    assert split_user("http://me:p%40ss@h/x") == (
        "http://h/x", {"Authorization": "Basic bWU6cEBzcw=="}
    )  # fmt: skip
    assert split_user("http://me:p@ss@h/x")[0] == "http://h/x"
    assert split_user("http://h/x@y") == ("http://h/x@y", {})


def test_what_a_run_stores_is_masked_and_the_same_at_a_resume():
    one, two = (
        recipe.load("demo", [f"data.train.0.shards='https://me:{word}@h/x.tar?sig={word}'"])
        for word in ("S3CRET", "OTHER")
    )
    stored = config.dump(one)
    assert "S3CRET" not in stored and "https://me:***@h/x.tar?sig=***" in stored
    assert recipe.changed_settings(config.to_plain(one), two) == []
    assert one.encoder_fingerprint() == two.encoder_fingerprint()
    reference = "https://me:${PASSWORD}@h/x.tar"
    cfg = recipe.load("demo", [f"data.train.0.shards='{reference}'"])
    assert reference in config.dump(cfg)
