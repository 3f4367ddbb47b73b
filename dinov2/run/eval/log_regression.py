"""Launch a logistic regression evaluation: on SLURM if available, else on this machine.

    python dinov2/run/eval/log_regression.py --config-file OUT/config.yaml \\
        --output-dir OUT/eval/training_24999/log_regression \\
        --pretrained-weights OUT/eval/training_24999/teacher_checkpoint.pth \\
        --train-dataset ImageNet:split=TRAIN:root=ROOT:extra=EXTRA \\
        --val-dataset ImageNet:split=VAL:root=ROOT:extra=EXTRA
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run by path from a clone: make the package importable
    sys.path[0] = str(Path(__file__).resolve().parents[3])

from dinov2.flags.evaluation import log_regression_parser as get_args_parser
from dinov2.run.submission import parse

if __name__ == "__main__":
    parse(get_args_parser)  # for --help and wrong flags, before the imports that take seconds

from dinov2.run.launch import launch


def main(argv: Sequence[str] | None = None) -> int:
    return launch("dinov2.eval.log_regression:main", get_args_parser, "dinov2:logreg", argv)


if __name__ == "__main__":
    sys.exit(main())
