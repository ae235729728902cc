import io
import sys

import pytest

from dsasr.utils.errors import Failure, UserError, run_tool
from dsasr.utils.terminal import EscapedText, escaped, escaped_output


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain\ttext\n", "plain\ttext\n"),
        ("你好 Ünïcode العربية", "你好 Ünïcode العربية"),
        ("en\x1b]0;title\x07", "en\\x1b]0;title\\x07"),
        ("a\x9b31mb", "a\\x9b31mb"),
        ("hidden\rshown", "hidden\\rshown"),
        ("\x7f\x00\ud800", "\\x7f\\x00\\ud800"),
    ],
)
def test_control_characters_are_shown(text, shown):
    assert escaped(text) == shown


def test_a_stream_keeps_the_returns_of_a_progress_bar():
    out = io.StringIO()
    stream = EscapedText(out)
    for text in ("\r 10%", "\r", "a\r\n", "x\ry", "\x1b[2J"):
        stream.write(text)
    assert out.getvalue() == "\r 10%\ra\r\nx\\ry\\x1b[2J"
    assert stream.getvalue() == out.getvalue()


def test_whatever_a_command_prints_is_escaped(capsys):
    def main():
        print("lang en\x1b[31m")
        print("also \x1b[0m", file=sys.stderr)
        raise UserError("no file \x1b[2J\nsecond line")

    assert run_tool(main) == 2
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err and "en\\x1b[31m" in out
    assert err.splitlines()[-1] == "error: no file \\x1b[2J second line"
    assert not isinstance(sys.stdout, EscapedText)


def test_a_failure_is_one_line_and_no_users_mistake(capsys):
    def main():
        raise Failure("cannot read http://me:secret@host/x")

    assert run_tool(main) == 1
    assert capsys.readouterr().err == "failed: cannot read http://me:***@host/x\n"


def test_output_within_output_is_escaped_once(capsys):
    with escaped_output(), escaped_output():
        print("\x1b")
    assert capsys.readouterr().out == "\\x1b\n"
