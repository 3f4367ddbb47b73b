"""What is in a checkpoint, and the same in other forms: `python -m dinov2.train.checkpoint inspect|convert ...`.

inspect OUT                              # the newest checkpoint of a run; also a folder model_<iteration>, or a file
convert OUT weights.pth --to teacher     # as the run itself dumps it: to evaluate, or to start from
convert OUT weights.safetensors --to backbone
"""

import argparse
import json
import logging
import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov2.files import atomic_write
from dinov2.log import run_command
from dinov2.models.checksums import CHECKSUM_KEY, NO_CHECKSUM, with_checksum
from dinov2.models.weights import flatten_block_names, import_safetensors
from dinov2.tools.checkpoint_contents import NETWORKS, OPTIMIZER, Contents, read_contents
from dinov2.train.checkpoint_folder import read_tensors

logger = logging.getLogger(__name__)

# Content of the file -> where it is in a checkpoint folder.
FORMS = {"full": "", "teacher": "model.teacher.", "student": "model.student.", "backbone": "model.teacher.backbone."}
_SUFFIXES = {".pth": "torch", ".pt": "torch", ".safetensors": "safetensors"}


def get_args_parser() -> argparse.ArgumentParser:
    """The flags of both commands."""
    parser = argparse.ArgumentParser("python -m dinov2.train.checkpoint", description="Look into checkpoints.")
    commands = parser.add_subparsers(required=True, metavar="inspect|convert")
    what = "a run's output folder (its newest checkpoint is taken), a folder model_<iteration>, or a file"

    look = commands.add_parser("inspect", help="say what is in a checkpoint")
    look.add_argument("path", type=Path, metavar="PATH", help=f"{what}: .pth, .safetensors")
    look.add_argument("--names", action="store_true", help="list every tensor with its shape and dtype")
    look.set_defaults(command=inspect)

    turn = commands.add_parser("convert", help="write a checkpoint, or a part of it, as one file")
    turn.add_argument("path", type=Path, metavar="PATH", help=what)
    turn.add_argument("output", type=Path, metavar="OUTPUT", help="the file to write: .pth, .pt or .safetensors")
    turn.add_argument(
        "--to",
        required=True,
        choices=FORMS,
        help="full: both networks, centers of the losses and optimizer; teacher, student: one network with its heads; "
        "backbone: that of the teacher, without heads",
    )
    turn.add_argument("--format", choices=("torch", "safetensors"), help="default: what the suffix of OUTPUT says")
    turn.add_argument("--force", action="store_true", help="replace OUTPUT if it exists")
    turn.set_defaults(command=convert)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (None: that of the process); the exit status."""
    args = get_args_parser().parse_args(argv)
    return run_command(lambda: args.command(args))


# --- inspect ---------------------------------------------------------------------------------------------------------


def inspect(args: argparse.Namespace) -> None:
    """Say what is in a checkpoint."""
    contents = read_contents(args.path)
    lines = [str(contents.source), *(f"  {title:28} {value}" for title, value in _description(contents))]
    if args.names:
        lines += ["", *(f"{name}  {_shape(tensor)}  {_dtype(tensor)}" for name, tensor in contents.tensors.items())]
    try:
        sys.stdout.write("\n".join(lines) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:  # the reader (`| head`) has seen enough; nor is there anyone to tell at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _description(contents: Contents) -> Iterator[tuple[str, str]]:
    """What a person wants to know, by title."""
    for name, value in contents.facts.items():
        if isinstance(value, str | int | float):
            yield name.replace("_", " "), f"{value:,}" if type(value) is int else str(value)
    match contents.facts.get("scaler"):
        case {"scale": scale}:  # missing if the run does not use it
            yield "gradient scale", str(scale)
    if losses := _last_losses(contents.facts.get("metrics")):
        yield "last losses", losses
    files = [path for path in contents.source.iterdir() if path.is_file()] if contents.source.is_dir() else []
    if files:
        ranks = {match[1] for path in files if (match := re.fullmatch(r"__(\d+)_\d+\.distcp", path.name))}
        yield "written by", f"{len(ranks)} process(es)"
    num_bytes = sum(path.stat().st_size for path in files or [contents.source])
    yield "size on disk", f"{num_bytes / 1e6:,.1f} MB in {len(files) or 1} file(s), {len(contents.tensors):,} tensors"

    parts = contents.parts()
    optimizer, others = parts.pop(OPTIMIZER, {}), parts.pop(("", ""), {})
    for (network, module), names in sorted(parts.items()):
        tensors = [contents.tensors[name] for name in names.values()]
        title = f"{network} {module}".strip()
        yield title, f"{sum(tensor.numel() for tensor in tensors):,} parameters, {_dtypes(tensors)}"
    centers = [name for name in others if name.endswith(".center")]
    if centers:
        shapes = (f"{name} {_shape(contents.tensors[others[name]])}" for name in centers)
        yield "centers of the losses", ", ".join(shapes)
    if len(others) > len(centers):
        yield "other tensors", f"{len(others) - len(centers):,}"
    yield "optimizer state", _optimizer_state(contents, optimizer) if optimizer else "none"


def _last_losses(meters: object) -> str:
    """The last value of each loss, from the state of the run's meters; empty if that is not what is given."""
    last = {}
    for name, meter in meters.items() if isinstance(meters, dict) else ():
        match meter:
            case {"window": [*_, float(value)]} if str(name).endswith("loss"):
                last[name] = value
    return ", ".join(f"{name} {value:.4g}" for name, value in last.items())


def _optimizer_state(contents: Contents, names: dict[str, str]) -> str:
    moments = sorted({name.rpartition(".")[2] for name in names})
    parameters = {name.rpartition(".")[0] for name in names}
    dtypes = _dtypes([contents.tensors[name] for name in names.values()])
    return f"{', '.join(moments)} of {len(parameters):,} tensors, {dtypes}"


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "scalar"


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _dtypes(tensors: Sequence[Tensor]) -> str:
    return ", ".join(sorted({_dtype(tensor) for tensor in tensors}))


# --- convert ---------------------------------------------------------------------------------------------------------


def convert(args: argparse.Namespace) -> None:
    """Write a checkpoint, or a part of it, as one file."""
    output: Path = args.output
    kind = _output_format(output, args.format)
    if output.is_dir():
        raise IsADirectoryError(f"{output} is a folder: give the name of a file in it")
    if output.exists() and not args.force:
        raise FileExistsError(f"{output} exists already: give another name, or --force to replace it")
    if kind == "safetensors":
        import_safetensors()  # if it is missing, that is known before everything is read
    contents = read_contents(args.path, verified=True)
    tensors = _selected_tensors(contents, args.to)
    write = _write_safetensors if kind == "safetensors" else _write_torch
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        write(output, args.to, tensors, contents.facts)
    except RuntimeError as error:  # what torch makes of a full disk
        raise OSError(f"could not write {output}: {error}") from error
    logger.info("%s: %s of %s, %d tensors", output, args.to, contents.source, len(tensors))
    logger.info("to evaluate it: %s", _evaluation(contents.source, output))


def _output_format(output: Path, asked: str | None) -> str:
    """How to write a file whose suffix is to tell readers what it is."""
    kind = _SUFFIXES.get(output.suffix)
    if kind is None and asked != "torch":
        raise ValueError(f"the suffix of {output} says no format; known: {', '.join(_SUFFIXES)}")
    if kind and asked and kind != asked:
        raise ValueError(f"--format {asked} but the suffix of {output} says {kind}, which readers go by")
    return kind or "torch"


def _selected_tensors(contents: Contents, form: str) -> dict[str, Tensor]:
    """What belongs into the file, by the names in it, on the CPU."""
    names = _selected_names(contents, form)
    if contents.source.is_dir():
        stored = read_tensors(contents.source, FORMS[form])
        tensors = {name: stored[origin] for name, origin in names.items()}
    else:  # copies, as tensors in a file may be views of larger ones or share their memory
        contiguous = torch.contiguous_format
        tensors = {name: contents.tensors[origin].clone(memory_format=contiguous) for name, origin in names.items()}
    return flatten_block_names(tensors)


def _selected_names(contents: Contents, form: str) -> dict[str, str]:
    """Name in the file -> name in the checkpoint.

    Raises:
        ValueError: if the checkpoint does not hold that.
    """
    parts = contents.parts()
    held = ", ".join(" ".join(filter(None, part)) or "other tensors" for part in sorted(parts))
    missing = ValueError(f"{contents.source} does not hold what --to {form} asks for; it holds: {held}")
    if form == "backbone":
        found = [parts[network, "backbone"] for network in ("teacher", "", "student") if (network, "backbone") in parts]
        if not found:
            raise missing
        return found[0]
    networks = NETWORKS if form == "full" else (form,)
    if any((network, "backbone") not in parts for network in networks):
        raise missing
    if form == "full":
        return {".".join(filter(None, (*part, name))): origin for part in parts for name, origin in parts[part].items()}
    own = {module: names for (network, module), names in parts.items() if network == form}
    return {f"{module}.{name}": origin for module, names in own.items() for name, origin in names.items()}


def _write_torch(output: Path, form: str, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Published layouts: a backbone flat, a network under its name, all of them under "model"."""
    content: dict[str, Any] = tensors if form == "backbone" else {form: tensors}
    if form == "full":
        moments: dict[str, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                parameter, _, moment = name.removeprefix("optimizer.").rpartition(".")
                moments.setdefault(parameter, {})[moment] = value
        model = {name: value for name, value in tensors.items() if not name.startswith("optimizer.")}
        content = {"model": model, "optimizer": {"state": moments}, **facts}
    with atomic_write(output) as file:
        torch.save(content, file)


def _write_safetensors(output: Path, form: str, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Flat names; what is no tensor goes as JSON into the metadata, all of it or, with a part, the iteration."""
    kept = {name: value for name, value in facts.items() if form == "full" or name == "iteration"}
    metadata = {name: json.dumps(value, default=str) for name, value in kept.items()} | {
        "format": "pt",
        "contents": form,
        CHECKSUM_KEY: NO_CHECKSUM,
    }
    content = import_safetensors().save(tensors, metadata)
    with atomic_write(output) as file:
        file.writelines(with_checksum(content))


def _evaluation(source: Path, output: Path) -> str:
    """The command that evaluates a converted file, with the config of its run if that is where a run has it."""
    configs = [folder / "config.yaml" for folder in source.absolute().parents[:3]]
    config_file = next((str(path) for path in configs if path.is_file()), "CONFIG")
    words = ["python", "dinov2/run/eval/knn.py", "--config-file", config_file, "--pretrained-weights", str(output)]
    return f"{shlex.join(words)} --train-dataset TRAIN --val-dataset VAL"


if __name__ == "__main__":
    sys.exit(main())
