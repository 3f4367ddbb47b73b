"""Launch an evaluation of tracking: on SLURM if available, else on this machine.

    python dinov2/run/eval/tracking.py --config-file OUT/config.yaml \\
        --output-dir OUT/eval/training_24999/davis \\
        --pretrained-weights OUT/eval/training_24999/teacher_checkpoint.pth \\
        --dataset DAVIS2017:split=VAL:root=ROOT
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run by path from a clone: make the package importable
    sys.path[0] = str(Path(__file__).resolve().parents[3])

from dinov2.flags.tracking import get_args_parser
from dinov2.run.submission import parse

if __name__ == "__main__":
    parse(get_args_parser)  # for --help and wrong flags, before the imports that take seconds

from dinov2.run.launch import launch


def main(argv: Sequence[str] | None = None) -> int:
    return launch("dinov2.eval.tracking.evaluation:main", get_args_parser, "dinov2:tracking", argv)


if __name__ == "__main__":
    sys.exit(main())
