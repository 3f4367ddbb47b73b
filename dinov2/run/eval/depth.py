"""Launch a depth evaluation: on SLURM if available, else on this machine.

    python dinov2/run/eval/depth.py --config-file OUT/config.yaml \\
        --output-dir OUT/eval/training_24999/depth \\
        --pretrained-weights OUT/eval/training_24999/teacher_checkpoint.pth \\
        --train-dataset NYUv2:split=TRAIN:root=ROOT \\
        --val-dataset NYUv2:split=TEST:root=ROOT
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run by path from a clone: make the package importable
    sys.path[0] = str(Path(__file__).resolve().parents[3])

from dinov2.flags.dense import depth_parser as get_args_parser
from dinov2.run.submission import parse

if __name__ == "__main__":
    parse(get_args_parser)  # for --help and wrong flags, before the imports that take seconds

from dinov2.run.launch import launch


def main(argv: Sequence[str] | None = None) -> int:
    return launch("dinov2.eval.dense.depth:main", get_args_parser, "dinov2:depth", argv)


if __name__ == "__main__":
    sys.exit(main())
