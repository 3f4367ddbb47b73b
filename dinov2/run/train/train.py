"""Launch a training: on SLURM if available, else on this machine.

    python dinov2/run/train/train.py --nodes 4 --config-file dinov2/configs/train/vitl16_short.yaml \\
        --output-dir OUT train.dataset_path=ImageNet:split=TRAIN:root=ROOT:extra=EXTRA
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run by path from a clone: make the package importable
    sys.path[0] = str(Path(__file__).resolve().parents[3])

from dinov2.flags.train import get_args_parser
from dinov2.run.submission import parse

if __name__ == "__main__":
    parse(get_args_parser)  # for --help and wrong flags, before the imports that take seconds

from dinov2.run.launch import launch
from dinov2.train.preflight.checks import check_settings
from dinov2.train.stages.several_students import planned_runs


def check(args: argparse.Namespace, num_processes: int) -> list[str]:
    """Warnings of questionable settings of the runs that a command starts; errors as `planned_runs`."""
    return [w for run in planned_runs(args, num_processes) for w in check_settings(run.cfg, run.num_processes)]


def main(argv: Sequence[str] | None = None) -> int:
    return launch("dinov2.train.train:main", get_args_parser, "dinov2:train", argv, check=check)


if __name__ == "__main__":
    sys.exit(main())
