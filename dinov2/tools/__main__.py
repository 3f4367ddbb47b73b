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
from pathlib import Path

from dinov2.log import run_command
from dinov2.models.export import FORMS as BACKBONE_FORMS
from dinov2.models.published import PUBLISHED
from dinov2.tools.backbone_forms import convert_backbone
from dinov2.tools.checkpoint_forms import FORMS as CHECKPOINT_FORMS
from dinov2.tools.checkpoint_forms import convert_checkpoint
from dinov2.tools.inspection import inspect

_TO = (
    "full: student, teacher, centers of the losses and optimizer state; teacher, student: one network with its heads; "
    "backbone: the teacher's backbone without heads; hf: a folder for transformers; timm: the key names of timm; "
    "safetensors, torch: a backbone with the published key names; onnx, torch.export: a program for any batch and "
    "image size. All forms from hf on hold one backbone, and are compared with the source before they are kept"
)


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m dinov2.tools", description="Inspect and convert weights, checkpoints.")
    commands = parser.add_subparsers(required=True, metavar="inspect|convert")

    inspecting = commands.add_parser("inspect", help="print the contents of weights or of a checkpoint")
    inspecting.add_argument("--names", action="store_true", help="list every tensor with its shape and dtype")
    inspecting.set_defaults(command=lambda args: inspect(args.path, args.checkpoint_key, args.num_heads, args.names))

    converting = commands.add_parser("convert", help="write weights or a checkpoint in another form")
    converting.set_defaults(command=convert)
    for command in (inspecting, converting):
        command.add_argument(
            "path",
            metavar="PATH",
            help="a run's output folder (newest checkpoint), a checkpoint folder model_<iteration>, a file (.pth, "
            ".safetensors), a URL, a folder of transformers, or the name of a published model",
        )
        command.add_argument("--num-heads", type=int, help="attention heads; default: 64 channels per head")
        command.add_argument(
            "--checkpoint-key", metavar="NAME", help="the network to use if PATH holds several; default: teacher"
        )
    converting.add_argument("--model", choices=PUBLISHED, metavar="NAME", help="architecture; default: inferred")
    converting.add_argument("output", type=Path, metavar="OUTPUT", help="the file to write, with --to hf the folder")
    converting.add_argument("--to", required=True, choices=[*CHECKPOINT_FORMS, *BACKBONE_FORMS], help=_TO)
    converting.add_argument(
        "--format",
        choices=("torch", "safetensors"),
        help=f"file format for --to {', '.join(CHECKPOINT_FORMS)}; default: by the suffix of OUTPUT",
    )
    converting.add_argument("--force", action="store_true", help="replace OUTPUT if it exists")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (None: that of the process); returns the exit status."""
    args = get_args_parser().parse_args(argv)
    return run_command(lambda: args.command(args))


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
