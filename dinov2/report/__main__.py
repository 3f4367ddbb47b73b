"""Write a report about training runs: a single HTML file that needs no network and no other files.

    python -m dinov2.report OUT [OUT2 ...] [--output FILE] [--title TITLE]

The runs may be finished, stopped or still running. The verdict on each run is at the top.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run by path from a clone: make the package importable
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from dinov2.log import run_command
from dinov2.report.page import write_report


def get_args_parser() -> argparse.ArgumentParser:
    """The argument parser of the command."""
    parser = argparse.ArgumentParser("python -m dinov2.report", description=__doc__.partition("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="OUT", help="output folder of a training")
    parser.add_argument("--output", type=Path, help="file to write (default: report.html in the first OUT)")
    parser.add_argument("--title", help="title of the page (default: the names of the folders)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    args = get_args_parser().parse_args(argv)

    def command() -> None:
        write_report(args.folders, args.output, args.title)

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
