"""`UserError` and `Failure`, and a command's exit code: one line on stderr, and code 2 or 1."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable

from dsasr.utils.masking import mask
from dsasr.utils.terminal import escaped_output


class UserError(Exception):
    """A mistake in a recipe, a path or a command line. One line that names the fix."""


class Failure(Exception):
    """What ends a command through no mistake of its user: a network, a disk, a killed process.

    One line, and exit code 1: a job may be tried again.
    """


def first_line(error: BaseException) -> str:
    """An error in one line: a user's own words, or the type and the first line of another's."""
    text = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, (UserError, Failure)):
        return text
    return f"{type(error).__name__}: {text}".rstrip(": ")


def message_of(error: BaseException) -> str:
    """The first line of what an error says, or the name of its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def run_tool(main: Callable[[], int | None]) -> int:
    """Run a command's ``main`` and return its exit code: 0, what ``main`` returns, 2 on
    `UserError`, 1 on `Failure`.

    A full disk, missing rights and the like are reported in one line, too. An interrupt returns
    130, and a closed pipe 141, as shells expect, without a traceback. What is printed meanwhile is
    escaped (`dsasr.utils.terminal`).
    """
    with escaped_output():
        try:
            return main() or 0
        except UserError as error:
            print(f"error: {_told(error)}", file=sys.stderr, flush=True)
            return 2
        except Failure as failure:
            print(f"failed: {_told(failure)}", file=sys.stderr, flush=True)
            return 1
        except BrokenPipeError:  # as of `dsasr … | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        except OSError as error:
            if error.errno not in _OF_THE_MACHINE:
                raise
            where = f"{error.filename}: " if error.filename else ""
            print(f"failed: {mask(where)}{error.strerror}", file=sys.stderr, flush=True)
            return 1
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr, flush=True)
            return 130


# Errors of disks and rights, which say all there is to know.
_OF_THE_MACHINE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE),
)


def _told(error: Exception) -> str:
    """One line, without a URL's credentials."""
    return mask(" ".join(str(error).split("\n")))
