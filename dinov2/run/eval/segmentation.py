"""Launch a segmentation evaluation: on SLURM if available, else on this machine.

    python dinov2/run/eval/segmentation.py --config-file OUT/config.yaml \\
        --output-dir OUT/eval/training_24999/segmentation \\
        --pretrained-weights OUT/eval/training_24999/teacher_checkpoint.pth \\
        --train-dataset ADE20K:split=TRAIN:root=ROOT \\
        --val-dataset ADE20K:split=VAL:root=ROOT
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run by path from a clone: make the package importable
    sys.path[0] = str(Path(__file__).resolve().parents[3])

from dinov2.flags.dense import segmentation_parser as get_args_parser
from dinov2.run.submission import parse

if __name__ == "__main__":
    parse(get_args_parser)  # for --help and wrong flags, before the imports that take seconds

from dinov2.run.launch import launch


def main(argv: Sequence[str] | None = None) -> int:
    return launch("dinov2.eval.dense.segmentation:main", get_args_parser, "dinov2:segmentation", argv)


if __name__ == "__main__":
    sys.exit(main())
