"""What is in a file of weights, and the same for others: `python -m dinov2.models.weights inspect|convert ...`.

inspect weights.pth                             # names, sizes, what the network is
convert weights.pth OUT --to hf                 # a folder for transformers
convert dinov2_vits14_reg OUT.onnx --to onnx    # a published model by its name, downloaded
"""

import argparse
import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from dinov2.models.backbones import load_from_weights, num_heads_beside, read_weights
from dinov2.models.export import FORMS, Difference, compare, timm_arguments
from dinov2.models.infer_architecture import find_arguments, published_name
from dinov2.models.key_mapping import StateDict
from dinov2.models.published import PUBLISHED
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.models.weights import backbone_state_dict

TOLERANCE = 1e-4
"""Of the largest number; single precision gives some 1e-6."""


def get_args_parser() -> argparse.ArgumentParser:
    """The flags of both commands."""
    parser = argparse.ArgumentParser("python -m dinov2.models.weights", description="Look into weights, convert them.")
    commands = parser.add_subparsers(required=True, metavar="inspect|convert")
    what = (
        "a file (.pth, .safetensors), a URL, a folder of transformers, or the name of a published model; "
        "released weights, dumps of a run, those of transformers or timm"
    )

    look = commands.add_parser("inspect", help="say what is in a file")
    look.add_argument("--names", action="store_true", help="list every tensor with its shape and dtype")
    look.set_defaults(command=inspect)

    turn = commands.add_parser("convert", help="write a backbone in another form, and compare both")
    turn.set_defaults(command=convert)
    for command in (look, turn):
        command.add_argument("source", metavar="SOURCE", help=what)
        command.add_argument("--num-heads", type=int, help="attention heads; default: 64 channels per head")
        command.add_argument(
            "--checkpoint-key", default="teacher", metavar="NAME", help="which network, if SOURCE holds several"
        )
    turn.add_argument("--model", choices=PUBLISHED, metavar="NAME", help="the network; default: found from the tensors")
    turn.add_argument("output", type=Path, metavar="OUTPUT", help="the file to write, with --to hf the folder")
    turn.add_argument(
        "--to",
        required=True,
        choices=FORMS,
        help="hf: for transformers; timm: with the names of timm; safetensors, torch: with the published names; "
        "onnx, torch.export: the network itself, for any number of images of any size",
    )
    turn.add_argument("--force", action="store_true", help="replace OUTPUT if it exists")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (None: that of the process); the exit status."""
    args = get_args_parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # it says what it did not optimize
    try:
        args.command(args)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def _say(*lines: str) -> None:
    try:
        sys.stdout.write("\n".join(lines) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:  # the reader (`| head`) has seen enough; nor is there anyone to tell at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# --- inspect ---------------------------------------------------------------------------------------------------------


def inspect(args: argparse.Namespace) -> None:
    """Say what is in a file of weights."""
    source, tensors = read_weights(args.source, args.checkpoint_key)
    state = backbone_state_dict(tensors, args.checkpoint_key, source)
    num_heads = args.num_heads or num_heads_beside(args.source)
    lines = [source, *(f"  {title:14} {value}" for title, value in _description(state, num_heads))]
    values = {id(value) for value in state.values()}
    if others := [name for name, value in tensors.items() if id(value) not in values]:
        modules = sorted({name.rpartition(".")[0] or name for name in others})
        lines.append(f"  {'other tensors':14} {len(others):,}: {', '.join(modules[:6])}{', ...' * (len(modules) > 6)}")
    if args.names:
        lines += ["", *(f"{name}  {_shape(value)}  {_dtype(value)}" for name, value in tensors.items())]
    _say(*lines)


def _description(state: StateDict, num_heads: int | None) -> Iterator[tuple[str, str]]:
    """What a person wants to know of a backbone, by title."""
    found = find_arguments(state, num_heads)
    side, registers = found["img_size"] // found["patch_size"], found["num_register_tokens"]
    yield "network", published_name(state) or "none of the published ones"
    yield "width", f"{found['embed_dim']}, {found['depth']} blocks, {found['num_heads']} heads"
    yield "feed-forward", f"{found['ffn_layer']}, {found['mlp_ratio']:.4g} times the width"
    yield "patches", f"{found['patch_size']} pixels, {found['in_chans']} channels, {registers} registers"
    yield "positions", f"{side} x {side} patches, images of {found['img_size']} pixels"
    yield "LayerScale", "yes" if found["init_values"] else "no"
    dtypes = ", ".join(sorted({_dtype(value) for value in state.values()}))
    yield "parameters", f"{sum(value.numel() for value in state.values()):,} in {len(state)} tensors, {dtypes}"


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "scalar"


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


# --- convert ---------------------------------------------------------------------------------------------------------


def convert(args: argparse.Namespace) -> None:
    """Write a backbone in another form, compare both, and keep what was written only if they agree."""
    output: Path = args.output
    form = FORMS[args.to]
    if form.suffixes and output.suffix not in form.suffixes:
        raise ValueError(
            f"readers of --to {args.to} expect a name that ends in {' or '.join(form.suffixes)}, not {output}"
        )
    if output.exists() and not args.force:
        raise FileExistsError(f"{output} exists already: give another name, or --force to replace it")
    if output.exists() and output.is_dir() != (args.to == "hf"):
        raise FileExistsError(f"{output} is {'a folder' if output.is_dir() else 'a file'}: give another name")
    model = load_from_weights(
        args.source, name=args.model, num_heads=args.num_heads, checkpoint_key=args.checkpoint_key
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as folder:
        unfinished = Path(folder) / output.name
        try:
            form.write(model, unfinished)
        except RuntimeError as error:  # what torch makes of a full disk, or of a network it cannot export
            raise OSError(f"could not write {output}: {error}") from error
        differences = compare(model, form, unfinished)
        _say(*(_sentence(difference, args.to) for difference in differences))
        if bad := [item for item in differences if not item.largest <= TOLERANCE * max(1.0, item.scale)]:
            raise ValueError(
                f"not written: at {bad[0].height} x {bad[0].width} pixels {args.to} computes something else"
            )
        _move(unfinished, output)
    _say(f"{output}: {_use(model, args.to, output)}")


def _sentence(difference: Difference, form: str) -> str:
    height, width, largest, scale, published = difference
    text = f"{height} x {width} pixels: largest difference {largest:.1e} (largest number {scale:.2g})"
    if published is not None:
        text += f"; {form} resamples positions in its own way, to the published way it is {published:.1e}"
    return text


def _move(unfinished: Path, output: Path) -> None:
    """Put what was written into its place: a folder's files one by one, a file and what belongs to it."""
    files = list((unfinished if unfinished.is_dir() else unfinished.parent).iterdir())
    place = output if unfinished.is_dir() else output.parent
    place.mkdir(exist_ok=True)
    for file in files:
        file.replace(place / file.name)


def _use(model: DinoVisionTransformer, form: str, output: Path) -> str:
    """How to load what was written."""
    if form == "hf":
        return f'transformers.AutoModel.from_pretrained("{output}")'
    if form == "timm":
        name, keywords = timm_arguments(model)
        given = {"num_classes": 0} | ({} if published_name(model.state_dict()) else keywords)
        words = "".join(f", {key}={value!r}" for key, value in given.items())
        return f'timm.create_model("{name}"{words}, checkpoint_path="{output}")'
    if form == "onnx":
        return "images (B, C, H, W) -> class_token (B, D), patch_tokens (B, n, D)"
    if form == "torch.export":
        return f'class_token, patch_tokens = torch.export.load("{output}").module()(images)'
    return f'dinov2.models.weights.load_backbone(model, "{output}")'


if __name__ == "__main__":
    sys.exit(main())
