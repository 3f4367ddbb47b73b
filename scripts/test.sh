#!/usr/bin/env bash
# Runs the tests, installing what they need first.
#
#   bash scripts/test.sh                       lint, and the fast tests
#   bash scripts/test.sh slurm                 also those that submit jobs to a SLURM of their own on this machine, and
#                                              those that open pages in a browser
#   bash scripts/test.sh cuda                  CUDA's host code on a stub of its libraries; needs gcc and no GPU
#   bash scripts/test.sh all                   also the slow ones, and those that need a GPU
#   bash scripts/test.sh oldest                a selection, with the lowest versions that the requirements allow
#   bash scripts/test.sh [all] tests/hub -x    further words go to pytest
#
# The files of tests are shared out over the processors, at most four; `-n 0` as a further word runs one after the other.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_venv.sh"
cd "$ROOT"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # tests are small: more threads make them slower

# The programs of SLURM, which need no configuration of this machine. Without them these tests are skipped with the reason.
install_slurm() {
    local program packages=(slurmctld slurmd slurm-client munge)
    for program in slurmctld slurmd sbatch munged; do
        PATH=$PATH:/usr/sbin:/sbin type -P "$program" >/dev/null && continue
        if [ "$(id -u)" = 0 ] && type -P apt-get >/dev/null; then
            echo "installing ${packages[*]}" >&2
            apt-get update -qq && apt-get install -qq --yes --no-install-recommends "${packages[@]}" >/dev/null || true
        else
            echo "the tests with SLURM are left out: they need the packages ${packages[*]}, or root to install them" >&2
        fi
        return
    done
}

# A browser without a window, to open pages as users do. Without one these tests are skipped with the reason.
install_browser() {
    local program
    for program in chromium chromium-browser google-chrome chrome; do
        type -P "$program" >/dev/null && return
    done
    if [ "$(id -u)" = 0 ] && type -P apt-get >/dev/null; then
        echo "installing chromium" >&2
        apt-get update -qq && apt-get install -qq --yes --no-install-recommends chromium >/dev/null || true
    else
        echo "the tests with a browser are left out: they need the package chromium, or root to install it" >&2
    fi
}

# What a run with the lowest versions must do: train, compile, write checkpoints, resume, attend with every backend,
# reproduce the recordings, be loaded and converted, evaluate, draw, read images.
oldest=(
    tests/cuda/test_cuda_step.py tests/test_config.py tests/test_golden.py tests/test_packaging.py tests/layers tests/loss
    tests/tools/test_checkpoints.py tests/train/test_{checkpoint_folder,compile,dry_run,resume}.py
    tests/train/test_processes.py::test_a_run_continues_on_another_number_of_processes
    tests/hub/test_hub.py tests/models/test_{intermediate_layers,peers,weights}.py
    "tests/models/test_export.py::test_onnx_with_any_batch_and_size[dinov2_vits14]"
    tests/eval/test_{features,knn,linear,log_regression}.py tests/eval/dense/test_segmentation_evaluation.py tests/visualization/test_visualization_command.py
    tests/data/test_{bands,images,loader,device_augment}.py tests/test_trackers.py
    tests/train/stages/test_{distillation,gram_anchoring,high_resolution}.py
    tests/train/stages/test_several_students.py::test_a_student_is_the_run_that_it_would_be_alone
)

shared_out=(-n auto --maxprocesses=4 --dist loadfile --no-loadscope-reorder)
selection=(-m "not slow and not slurm and not cuda and not gpu")
case ${1:-} in
    slurm)
        install_slurm
        install_browser
        selection=(-m "not slow and not gpu")
        # One process more, as those that submit jobs wait for minutes.
        export PYTEST_XDIST_AUTO_NUM_WORKERS=${PYTEST_XDIST_AUTO_NUM_WORKERS:-$(($(nproc --all) + 1))}
        shift
        ;;
    all)
        install_slurm
        install_browser
        selection=()
        shift
        ;;
    cuda)
        selection=(-m cuda)
        shift
        ;;
    oldest)
        setup_venv --oldest requirements.txt requirements-dev.txt
        shift
        [ $# -gt 0 ] || set -- "${oldest[@]}"
        exec "$PYTHON" -m pytest "${shared_out[@]}" -m "not slurm and not gpu" "$@"
        ;;
esac

setup_venv requirements.txt requirements-dev.txt
status=0
bash scripts/lint.sh || status=1
"$PYTHON" -m pytest "${shared_out[@]}" "${selection[@]}" "$@" || status=1
exit $status
