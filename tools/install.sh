# Sourced by the other scripts: a virtual environment (.venv, or the active one) with dsasr in it.
# usage: source tools/install.sh EXTRAS; with DSASR_INSTALL=no what is on the PATH is used as it is
# EXTRAS must be given: without an argument, $1 here would be the first one of the calling script.
[ "${DSASR_INSTALL:-}" != no ] || return 0
if [ -z "${VIRTUAL_ENV:-}" ]; then
    if [ ! -x .venv/bin/python ]; then
        echo "== making a virtual environment in .venv"
        "${PYTHON:-python3}" -m venv .venv
    fi
    # shellcheck disable=SC1091
    source .venv/bin/activate
fi
stamp="$VIRTUAL_ENV/.dsasr-$(echo "$1" | tr ',' '-')-$( (pwd; cat pyproject.toml) | cksum | cut -d' ' -f1)"
if [ ! -f "$stamp" ]; then
    echo "== installing dsasr and what it needs into $VIRTUAL_ENV (a few minutes, about 6 GB)"
    python -m pip install --quiet --disable-pip-version-check --editable ".[$1]"
    touch "$stamp"
fi
