"""Write a report about training runs: a single HTML file that needs no network and no other files.

    python -m dinov2.report OUT [OUT2 ...] [--output FILE] [--title TITLE]

The runs may be finished, stopped or still running. The verdict on each run is at the top.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run by path from a clone: make the package importable
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from dinov2.flags.report import get_args_parser

if __name__ == "__main__":
    get_args_parser().parse_args()  # for --help and wrong flags, before the imports that take seconds

from dinov2.log import run_command
from dinov2.report.page import write_report


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    args = get_args_parser().parse_args(argv)

    def command() -> None:
        write_report(args.folders, args.output, args.title)

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
