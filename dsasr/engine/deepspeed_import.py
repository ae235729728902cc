"""The import of DeepSpeed, without the compiler that one of its modules would load.

Its first engine imports its Muon optimizer, whose Newton-Schulz step is under ``@torch.compile``:
that loads all of inductor, 2.3 s of a core at each start of a rank (DeepSpeed 0.19.8, torch 2.14).
With dynamo off meanwhile the decorator does nothing, and Muon would run without being compiled.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator
from types import ModuleType

_COMPILED = "deepspeed.runtime.zero.muon.muon_optimizer"
_SWITCH = "TORCHDYNAMO_DISABLE"


def import_deepspeed() -> ModuleType:
    """The module ``deepspeed``."""
    deepspeed = importlib.import_module("deepspeed")
    with _dynamo_off(), contextlib.suppress(ImportError):  # another version may not have it
        importlib.import_module(_COMPILED)
    return deepspeed


@contextlib.contextmanager
def _dynamo_off() -> Iterator[None]:
    before = os.environ.get(_SWITCH)
    os.environ[_SWITCH] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_SWITCH]
        else:
            os.environ[_SWITCH] = before
