"""Libraries' warnings that a user can do nothing about."""

from __future__ import annotations

import warnings


def silence_library_warnings() -> None:
    """Filter warnings of libraries that a user can do nothing about."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch|deepspeed")
