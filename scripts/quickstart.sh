#!/usr/bin/env bash
# Trains a small DINOv2 on scenes made of images that come with the package, on a GPU or on two CPU cores, and shows what
# it has learned: patch features in color, k-NN accuracy, mIoU, a report of the whole run. Installs what it needs first.
#
#   bash scripts/quickstart.sh [OUT] [key=value ...]
#
# OUT is the output folder (default: quickstart); the rest overrides the recipe, dinov2/configs/train/quickstart.yaml.
# If it was stopped halfway, the same command continues.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_venv.sh"

if [[ ${1:-} == -* ]]; then
    sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
out=$ROOT/quickstart
if [[ $# -gt 0 && $1 != *=* ]]; then
    out=$1
    shift
fi
setup_venv requirements.txt
mkdir -p "$out"
out=$(cd "$out" && pwd)

# The network is so small that further threads make a step slower; processes of their own draw and augment the images.
cores=$(nproc)
workers=$((cores < 4 ? 1 : cores < 32 ? cores / 4 : 8))

trap 'echo "quickstart stopped; the reason is above" >&2' ERR
OMP_NUM_THREADS=1 "$PYTHON" "$ROOT/dinov2/train/train.py" --config-file train/quickstart --output-dir "$out" \
    "train.num_workers=$workers" "$@"
"$PYTHON" "$ROOT/scripts/quickstart_report.py" "$out"
echo "$out"
