"""Passwords and signatures of URLs, given by reference: what a recipe names, and no run stores.

``https://user:${NAME}@host/x.tar`` takes the environment variable NAME, or else what the file that
NAME_FILE names holds. Only the reference is written into run folders; a credential that stands in
a URL itself is masked there (`dsasr.utils.masking`).
"""

from __future__ import annotations

import base64
import os
import urllib.parse
from pathlib import Path

from dsasr.utils.errors import UserError
from dsasr.utils.masking import MASK, REFERENCE, USER


def resolve(url: str) -> str:
    """``url`` with each ``${NAME}`` replaced by its value.

    Raises `UserError` for a name without a value, and for a credential that was masked.
    """
    if "://" not in url:
        return url
    if f"={MASK}" in url or f"{MASK}@" in url:
        raise UserError(
            f"{url}: its credential was not stored; give it again, best as ${{NAME}}: of an "
            "environment variable NAME, or of a file that NAME_FILE names"
        )
    user = USER.match(url)
    head = user[0] if user else ""
    # A password may hold an @ or a slash; a query's part is as its server gave it.
    quoted = REFERENCE.sub(lambda match: urllib.parse.quote(_value(match[1]), safe=""), head)
    return quoted + REFERENCE.sub(lambda match: _value(match[1]), url[len(head) :])


def _value(name: str) -> str:
    if name in os.environ:
        return os.environ[name]
    if path := os.environ.get(f"{name}_FILE"):
        try:
            return Path(path).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{name}_FILE={path} cannot be read: {error}") from None
    raise UserError(f"${{{name}}}: there is neither a variable {name} nor {name}_FILE")


def split_user(url: str) -> tuple[str, dict[str, str]]:
    """An http(s) URL without ``user:password@``, and the header that carries them instead."""
    user = USER.match(url)
    if user is None:
        return url, {}
    name, _, password = (urllib.parse.unquote(part) for part in user[2].partition(":"))
    basic = base64.b64encode(f"{name}:{password}".encode()).decode("ascii")
    return f"{user[1]}{url[user.end() :]}", {"Authorization": f"Basic {basic}"}
