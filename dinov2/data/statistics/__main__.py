"""Measure the images of a dataset before a training (examples: docs/datasets.md).

    python -m dinov2.data.statistics DATASET [--output FOLDER] [images.bands=[0,1,2,3] ...]

Writes `statistics.json` and `statistics.html`, and prints the settings to train with.
"""

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from dinov2 import config
from dinov2.data import make_dataset
from dinov2.data.images import ImageOptions
from dinov2.data.statistics.measure import measure
from dinov2.data.statistics.page import write_page
from dinov2.files import atomic_write, read_json
from dinov2.flags.statistics import get_args_parser
from dinov2.log import run_command

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command (None: the one of the process) and return its exit status."""
    args = get_args_parser().parse_intermixed_args(argv)
    cfg = config.load(args.config_file, args.opts)
    _check_output(args.output, args.dataset)
    dataset = make_dataset(dataset_str=args.dataset, image_options=ImageOptions(**vars(cfg.images)))
    found = measure(dataset, max_images=args.max_images, num_workers=args.num_workers)
    args.output.mkdir(parents=True, exist_ok=True)
    with atomic_write(args.output / "statistics.json") as file:
        file.write(json.dumps({"dataset": args.dataset, **found.as_json()}, indent=2).encode())
    with atomic_write(args.output / "statistics.html") as file:
        file.write(write_page(dataset, args.dataset, found).encode())
    for line in found.lines():
        logger.info("%s", line)
    logger.info("settings to train with: %s", " ".join(f"'{each}'" for each in found.overrides()))
    logger.info("page: %s", args.output / "statistics.html")
    return 0


def _check_output(folder: Path, dataset_str: str) -> None:
    """Raise a ValueError if the folder has the statistics of another dataset."""
    path = folder / "statistics.json"
    if path.is_file() and (other := read_json(path).get("dataset")) != dataset_str:
        raise ValueError(f"--output {folder} has the statistics of {other}: give another folder")


if __name__ == "__main__":
    sys.exit(run_command(main))
