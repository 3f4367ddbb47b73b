# To be sourced: defines setup_venv, which makes or reuses a virtual environment and sets PYTHON to its interpreter.
#
#   setup_venv [--oldest] requirements.txt [MORE FILES...]
#
# The environment is the one that VENV names, else .venv in the repository. With --oldest it is the one that VENV_OLDEST
# names, else .venv-oldest; it gets the lowest version that each requirement allows, and the lowest Python that is there.
# Installing is skipped when the same requirements were installed into the environment before.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${VENV:-$ROOT/.venv}
VENV_OLDEST=${VENV_OLDEST:-$ROOT/.venv-oldest}

# The first of these Pythons on PATH that is new enough.
_find_python() {
    local name
    for name in "$@"; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$name"
            return
        fi
    done
    echo "DINOv2 needs Python 3.11 or newer, and there is none on PATH. On Debian and Ubuntu:" >&2
    echo "    sudo apt-get install python3 python3-venv python3-pip" >&2
    return 1
}

# A virtual environment with pip. Debian keeps the module that puts pip into it in a package of its own,
# python3-venv; where that is missing, the system's pip installs itself into the environment.
_make_venv() {
    local python=$1
    "$python" -m venv "$VENV" >/dev/null 2>&1 && return
    rm -rf "$VENV"
    if "$python" -m venv --without-pip "$VENV" &&
        "$python" -m pip --quiet --python "$VENV/bin/python" install pip; then
        return
    fi
    rm -rf "$VENV"
    echo "Cannot make a virtual environment in $VENV with $python. On Debian and Ubuntu:" >&2
    echo "    sudo apt-get install python3-venv python3-pip" >&2
    return 1
}

# The lower bound of each requirement in the files as a pin: torch==2.11 of `torch>=2.11  # everything`.
lower_bounds() {
    sed -nE 's/^([A-Za-z0-9._-]+)>=([^],;#[:space:]]+).*/\1==\2/p' "$@"
}

setup_venv() {
    local python files stamp wanted oldest='' pythons=(python3 python3.14 python3.13 python3.12 python3.11 python)
    if [ "$1" = --oldest ]; then
        shift
        oldest=oldest-
        pythons=(python3.11 python3.12 "${pythons[@]}")
        VENV=$VENV_OLDEST
    fi
    [[ $VENV = /* ]] || VENV=$PWD/$VENV
    if [ ! -x "$VENV/bin/python" ]; then
        if [ -e "$VENV" ] && [ -n "$(ls -A "$VENV")" ]; then
            echo "$VENV is not empty and not a virtual environment: set VENV to another folder, or remove it" >&2
            return 1
        fi
        python=$(_find_python "${pythons[@]}") || return
        echo "making a virtual environment in $VENV" >&2
        _make_venv "$python" || return
    fi
    PYTHON=$VENV/bin/python
    files=$(printf '%s-' "$@")
    stamp=$VENV/.installed-$oldest${files%-}
    wanted=$(cd "$ROOT" && cat "$@" | sha256sum)
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        echo "installing $* into $VENV (a few minutes the first time)" >&2
        # shellcheck disable=SC2046 -- one -r before each file
        (cd "$ROOT" && "$PYTHON" -m pip install --quiet --disable-pip-version-check $(printf -- '-r %s ' "$@") \
            ${oldest:+-c <(lower_bounds "$@")}) || return
        echo "$wanted" >"$stamp"
    fi
    export VENV PYTHON
}
