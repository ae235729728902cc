#!/usr/bin/env bash
# Install what the tests need and run all but the slow ones (-m "": these too), two files at a time (much of a launch is waiting).
# Arguments go to pytest: tools/test.sh -k stages; -n 0 runs one after the other.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/install.sh demo,test
ruff check --quiet .
ruff format --check --quiet .
export DS_ACCELERATOR="${DS_ACCELERATOR:-$(python -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")')}"
exec python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
