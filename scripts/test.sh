#!/usr/bin/env bash
# Runs the tests, installing what they need first.
#
#   bash scripts/test.sh                       lint, and the fast tests
#   bash scripts/test.sh all                   also the slow ones, and those that need SLURM or a GPU
#   bash scripts/test.sh [all] tests/hub -x    further words go to pytest
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_venv.sh"
setup_venv requirements.txt requirements-dev.txt
cd "$ROOT"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # tests are small: more threads make them slower

selection=(-m "not slow and not slurm and not gpu")
if [ "${1:-}" = all ]; then
    selection=()
    shift
fi

status=0
bash scripts/lint.sh || status=1
"$PYTHON" -m pytest "${selection[@]}" "$@" || status=1
exit $status
