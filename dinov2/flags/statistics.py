"""The flags of the statistics of a dataset."""

import argparse
from pathlib import Path

from dinov2.flags import CommandParser, positive_int


def get_args_parser() -> argparse.ArgumentParser:
    """Build the parser of `python -m dinov2.data.statistics`."""
    parser = CommandParser(
        "python -m dinov2.data.statistics",
        description="Statistics of the images of a dataset: values of each band, sizes, bad files, duplicates.",
    )
    add = parser.add_argument
    add("dataset", help="dataset string, such as ImageFolder:root=/my/images")
    config_help = "configuration whose section `images` says how images are read, such as that of a run"
    add("--config-file", help=config_help)
    add("--output", type=Path, default=Path("statistics"), metavar="FOLDER", help="default: ./statistics")
    add("--max-images", type=positive_int, metavar="N", help="inspect so many, evenly spaced (default: all)")
    add("--num-workers", type=int, default=2, metavar="N", help="processes that decode images (default: 2)")
    opts_help = "overrides of the configuration, such as 'images.bands=[0,1,2,3]'"
    add("opts", nargs="*", metavar="key=value", help=opts_help)
    return parser
