"""The flags of the tool for weights and checkpoints."""

import argparse
from pathlib import Path

from dinov2.flags import CommandParser

CHECKPOINT_FORMS = ("full", "teacher", "student", "backbone")
BACKBONE_FORMS = ("hf", "timm", "safetensors", "torch", "onnx", "torch.export")

_TO = (
    "full: student, teacher, centers of the losses and optimizer state; teacher, student: one network with its heads; "
    "backbone: the teacher's backbone without heads; hf: a folder for transformers; timm: the key names of timm; "
    "safetensors, torch: a backbone with the published key names; onnx, torch.export: a program for any batch and "
    "image size. All forms from hf on hold one backbone, and are compared with the source before they are kept"
)


def get_args_parser() -> argparse.ArgumentParser:
    """Build the parser of `python -m dinov2.tools`."""
    parser = CommandParser("python -m dinov2.tools", description="Inspect and convert weights, checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="inspect|convert")

    inspecting = commands.add_parser("inspect", help="print the contents of weights or of a checkpoint")
    inspecting.add_argument("--names", action="store_true", help="list every tensor with its shape and dtype")

    converting = commands.add_parser("convert", help="write weights or a checkpoint in another form")
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
    converting.add_argument("--model", metavar="NAME", help="published model that it is; default: inferred")
    converting.add_argument("output", type=Path, metavar="OUTPUT", help="the file to write, with --to hf the folder")
    converting.add_argument("--to", required=True, choices=[*CHECKPOINT_FORMS, *BACKBONE_FORMS], help=_TO)
    converting.add_argument(
        "--format",
        choices=("torch", "safetensors"),
        help=f"file format for --to {', '.join(CHECKPOINT_FORMS)}; default: by the suffix of OUTPUT",
    )
    converting.add_argument("--force", action="store_true", help="replace OUTPUT if it exists")
    return parser
