"""Launch an evaluation of image retrieval: on SLURM if available, else on this machine.

    python dinov2/run/eval/retrieval.py --config-file OUT/config.yaml \\
        --output-dir OUT/eval/training_24999/oxford \\
        --pretrained-weights OUT/eval/training_24999/teacher_checkpoint.pth \\
        --dataset RevisitedOxford:root=ROOT
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run by path from a clone: make the package importable
    sys.path[0] = str(Path(__file__).resolve().parents[3])

from dinov2.flags.retrieval import get_args_parser
from dinov2.run.submission import parse

if __name__ == "__main__":
    parse(get_args_parser)  # for --help and wrong flags, before the imports that take seconds

from dinov2.run.launch import launch


def main(argv: Sequence[str] | None = None) -> int:
    return launch("dinov2.eval.retrieval.evaluation:main", get_args_parser, "dinov2:retrieval", argv)


if __name__ == "__main__":
    sys.exit(main())
