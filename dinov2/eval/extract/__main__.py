"""Extract features of any images by any weights, into files (examples: docs/features.md).

    python -m dinov2.eval.extract --model dinov2_vits14 --images FOLDER --output FEATURES

The same command continues after an interruption. `torchrun --nproc-per-node 8 -m dinov2.eval.extract ...` shares the
images out over processes.
"""

import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

if __package__ in (None, ""):  # run by path from a clone: make the package importable
    sys.path[0] = str(Path(__file__).resolve().parents[3])

from dinov2.flags.extract import parse

if __name__ == "__main__":
    parse()  # for --help and wrong flags, before the imports that take seconds

from dinov2 import distributed
from dinov2.eval.extract.api import extract_features
from dinov2.log import run_command

PATIENCE = timedelta(days=7)  # for which a process that has computed its shards waits for the others


def main(argv: Sequence[str] | None = None) -> int:
    """Extract what a command line (None: that of the process) selects. Returns the exit status."""
    options = vars(parse(argv))
    with distributed.session(PATIENCE):
        extract_features(options.pop("images"), **options)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, after_interrupt="the same command continues"))
