#!/usr/bin/env bash
# Run the tests with the oldest or the newest transformers that pyproject.toml allows.
# usage: tools/test_transformers.sh oldest|newest [arguments of pytest]
set -euo pipefail
cd "$(dirname "$0")/.."
which=${1:?oldest or newest}
shift
bounds=$(sed -n 's/^ *"transformers\(.*\)",.*/\1/p' pyproject.toml)
case $which in
    oldest) wanted="==$(sed 's/^>=\([0-9.]*\),.*/\1/' <<<"$bounds").*" ;;
    newest) wanted=$bounds ;;
    *) echo "error: '$which' is neither oldest nor newest" >&2; exit 2 ;;
esac
# An environment of its own: the one that people work in stays as it is.
unset VIRTUAL_ENV
environment=.venv-transformers-$which
[ -x "$environment/bin/python" ] || "${PYTHON:-python3}" -m venv "$environment"
# shellcheck disable=SC1091
source "$environment/bin/activate"
source tools/install.sh demo,test
python -m pip install --quiet --disable-pip-version-check --upgrade "transformers$wanted"
python -c 'import transformers; print("transformers", transformers.__version__)'
exec bash tools/test.sh "$@"
