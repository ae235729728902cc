"""Passes a training log through without the launcher's and libraries' own chatter.

deepspeed dsasr/train.py … 2>&1 | python tools/filter_log.py

The end of what is hidden is shown after all if the run fails (`FAILED` in the launcher's words).
"""

from __future__ import annotations

import re
import sys
from collections import deque

CHATTER = re.compile(
    r"^\[\d{4}-\d\d-\d\d|^\[W\d|^W\d{4} |Warning: |^\s+return func|^\s+warnings\.warn"
    r"|^DeepSpeed deepspeed\.ops|^ninja:|^Loading extension|^Building extension|^Using .* as Py"
    r"|^Creating extension|^Detected |^Emitting ninja|^Allowing ninja|^Time to load"
    r"|^\[\d+/\d+\] (c\+\+|nvcc)|Loading weights:"
)


def main() -> int:
    hidden: deque[str] = deque(maxlen=40)
    failed = False
    for line in sys.stdin:
        failed |= "exits with return code" in line and not line.rstrip().endswith("= 2")
        if CHATTER.search(line):
            hidden.append(line)
        else:
            print(line, end="", flush=True)
    if failed:
        print("the launcher's last words:", "".join(hidden), sep="\n", end="", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
