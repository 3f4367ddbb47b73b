#!/usr/bin/env bash
# Checks the form of the code: ruff format, ruff check, mypy. Runs all three; fails when one of them does.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_venv.sh"
setup_venv requirements.txt requirements-dev.txt
cd "$ROOT"

status=0
"$PYTHON" -m ruff format --check . || status=1
"$PYTHON" -m ruff check . || status=1
"$PYTHON" -m mypy || status=1
exit $status
