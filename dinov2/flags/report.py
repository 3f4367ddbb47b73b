"""The flags of the report."""

import argparse
from pathlib import Path

from dinov2.flags import CommandParser


def get_args_parser() -> argparse.ArgumentParser:
    """Build the parser of `python -m dinov2.report`."""
    description = "Write a report about training runs: a single HTML file that needs no network and no other files."
    parser = CommandParser("python -m dinov2.report", description=description)
    parser.add_argument("folders", nargs="+", type=Path, metavar="OUT", help="output folder of a training")
    parser.add_argument("--output", type=Path, help="file to write (default: report.html in the first OUT)")
    parser.add_argument("--title", help="title of the page (default: the names of the folders)")
    return parser
