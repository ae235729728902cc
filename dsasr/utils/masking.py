"""Credentials in URLs, masked: for whatever is printed or stored."""

from __future__ import annotations

import re
import urllib.parse

MASK = "***"
REFERENCE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")  # of `dsasr.utils.credentials`
# Up to the last @ before the path: a password may have an @ of its own.
USER = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*://)([^/?#]*)@")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>|]+")
# Names of a query's parameters that are secret: of signed URLs of S3, GCS and Azure, and tokens.
_SECRET = re.compile(
    r"^sig$|signature|token|secret|passw|credential|api_?key|access_?key|^key$|^auth", re.I
)


def mask(text: str) -> str:
    """``text`` with `MASK` in place of the credentials of each URL in it; references stay."""
    return _URL.sub(lambda match: _mask_url(match[0]), text) if "://" in text else text


def _mask_url(url: str) -> str:
    user = USER.match(url)
    if user:
        name, colon, password = user[2].rpartition(":")
        if not _is_reference(password):
            url = f"{user[1]}{name}{colon}{MASK}@{url[user.end() :]}"
    head, question, query = url.partition("?")
    return f"{head}?{'&'.join(map(_mask_parameter, query.split('&')))}" if question else url


def _mask_parameter(text: str) -> str:
    name, equals, value = text.partition("=")
    secret = equals and value and _SECRET.search(urllib.parse.unquote(name))
    return f"{name}={MASK}" if secret and not _is_reference(value) else text


def _is_reference(value: str) -> bool:
    return bool(REFERENCE.fullmatch(value))
