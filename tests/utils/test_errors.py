"""Errors in one line, whatever they say."""

import pytest

from dsasr.utils.errors import UserError, first_line, message_of


@pytest.mark.parametrize(
    ("error", "message", "line"),
    [
        (ValueError("\nno such layer\nin file x"), "no such layer", "ValueError: no such layer"),
        (ValueError(), "ValueError", "ValueError"),
        (ValueError(" \n "), "ValueError", "ValueError"),
        (UserError("give run"), "give run", "give run"),
    ],
)
def test_an_error_in_one_line(error: Exception, message: str, line: str) -> None:
    assert (message_of(error), first_line(error)) == (message, line)
