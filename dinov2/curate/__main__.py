"""Select images by features of `python -m dinov2.eval.extract` (examples: docs/curation.md).

    python -m dinov2.curate duplicates --features FEATURES --threshold 0.95 --output CURATED

The commands are duplicates, decontaminate, balance and retrieve. They write a list of images to train on, what was
dropped and why, and a page of examples.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run by path from a clone: make the package importable
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from dinov2.flags.curate import parse

if __name__ == "__main__":
    parse()  # for --help and wrong flags, before the imports that take seconds

from dinov2.curate.balance import sample_balanced
from dinov2.curate.clusters import ClusterOptions
from dinov2.curate.decontaminate import drop_test_images
from dinov2.curate.duplicates import drop_duplicates
from dinov2.curate.feature_table import FeatureTable
from dinov2.curate.images import Images
from dinov2.curate.outputs import Selection, check_output, write_selection
from dinov2.curate.retrieve import retrieve_nearest
from dinov2.curate.search import SearchOptions, import_faiss
from dinov2.log import run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (None: that of the process). Returns the exit status."""
    args = parse(argv)
    import_faiss()
    check_output(args.output, overwrite=args.overwrite)
    args.output.mkdir(parents=True, exist_ok=True)  # where the search has its temporary file
    images = Images(FeatureTable(args.features, args.tokens), args.root)
    settings = json.loads(json.dumps(vars(args), default=str))
    write_selection(args.output, select(args, images), images, settings)
    return 0


def select(args: argparse.Namespace, images: Images) -> Selection:
    """Select images as a command line says."""
    if args.command == "balance":
        resampling = args.resampling, args.resampling_steps, args.resampling_points
        options = ClusterOptions(*resampling, args.memory, args.seed)
        return sample_balanced(images, clusters=args.clusters, size=args.size, options=options)
    search = SearchOptions(args.probes, args.output, args.seed)
    if args.command == "duplicates":
        return drop_duplicates(images, threshold=args.threshold, k=args.k, keep=args.keep, options=search)
    flag, folders = ("--against", args.against) if args.command == "decontaminate" else ("--queries", args.queries)
    if args.command == "decontaminate" and (same := _places(folders) & _places(args.features)):
        raise ValueError(f"{flag} and --features both name {min(same)}: all of its images would be dropped")
    others = Images(FeatureTable(folders, args.tokens), args.root)
    if args.command == "decontaminate":
        return drop_test_images(images, others, threshold=args.threshold, k=args.k, options=search)
    return retrieve_nearest(images, others, k=args.k, options=search)


def _places(folders: Sequence[Path]) -> set[str]:
    return {*map(os.path.realpath, folders)}


if __name__ == "__main__":
    sys.exit(run_command(main))
