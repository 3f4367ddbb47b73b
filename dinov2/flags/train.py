"""The flags of the training."""

import argparse

from dinov2.flags import CommandParser


def get_args_parser(add_help: bool = True) -> argparse.ArgumentParser:
    """Build the parser of the published flags and --dry-run."""
    parser = CommandParser("DINOv2 training", add_help=add_help)
    add = parser.add_argument
    add("--config-file", required=True, help="YAML file, or the name of a packaged one such as train/vitl16_short")
    add("--no-resume", action="store_true", help="start anew even if the output folder has checkpoints")
    add("--eval-only", action="store_true", help="write the teacher of the latest checkpoint and exit")
    add("--dry-run", action="store_true", help="check config, data and weights, print the plan, and exit")
    output_help = "where everything is written (default: the current folder)"
    add("--output-dir", "--output_dir", default="", help=output_help)
    add("opts", nargs="*", metavar="key=value", help="config overrides, such as optim.epochs=10")
    return parser
