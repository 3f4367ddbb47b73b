"""Inspect and convert weights and checkpoints: `python -m dinov2.tools inspect|convert ...`.

PATH is a file (`.pth`, `.safetensors`), a URL, the name of a published model, a folder of transformers, a run's output
folder (its newest checkpoint is used), or a checkpoint folder `model_<iteration>`.

inspect OUT                                     # iteration, size, networks, architecture
convert OUT weights.pth --to teacher            # the teacher as a run exports it: for evaluation or a new run
convert OUT FOLDER --to hf                      # the backbone of a run's teacher for transformers
convert dinov2_vits14_reg OUT.onnx --to onnx    # a published model, downloaded
"""

import argparse
import sys
from collections.abc import Iterable, Sequence

from dinov2.flags.tools import BACKBONE_FORMS, CHECKPOINT_FORMS, get_args_parser

if __name__ == "__main__":
    get_args_parser().parse_args()  # for --help and wrong flags, before the imports that take seconds

from dinov2.log import run_command
from dinov2.tools.backbone_forms import convert_backbone
from dinov2.tools.checkpoint_forms import convert_checkpoint
from dinov2.tools.inspection import inspect


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (None: that of the process); returns the exit status."""
    args = get_args_parser().parse_args(argv)

    def command() -> None:
        if args.command == "inspect":
            inspect(args.path, args.checkpoint_key, args.num_heads, args.names)
        else:
            convert(args)

    return run_command(command)


def convert(args: argparse.Namespace) -> None:
    """Write weights or a checkpoint in another form; a ValueError if a flag does not apply to it."""
    if args.to in CHECKPOINT_FORMS:
        _reject_flags(args, ("model", "num_heads", "checkpoint_key"), BACKBONE_FORMS)
        convert_checkpoint(args.path, args.output, args.to, file_format=args.format, force=args.force)
    else:
        _reject_flags(args, ("format",), CHECKPOINT_FORMS)
        convert_backbone(
            args.path,
            args.output,
            args.to,
            model_name=args.model,
            num_heads=args.num_heads,
            checkpoint_key=args.checkpoint_key or "teacher",
            force=args.force,
        )


def _reject_flags(args: argparse.Namespace, names: Sequence[str], forms: Iterable[str]) -> None:
    for name in names:
        if getattr(args, name) is not None:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag} does not apply to --to {args.to}, only to --to {', '.join(forms)}")


if __name__ == "__main__":
    sys.exit(main())
