"""Links of messages to the page of symptoms, causes and fixes."""

from __future__ import annotations

PAGE = "dsasr/recipes/TROUBLESHOOTING.md"


def see(anchor: str) -> str:
    """The end of a message that names the page's section ``anchor``, a literal at each call.

    tests/utils/test_troubleshooting.py holds that the section is there, and each one named.
    """
    return f"; see {PAGE}#{anchor}"
