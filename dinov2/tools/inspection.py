"""The contents of weights or of a checkpoint as text: `python -m dinov2.tools inspect PATH`."""

import os
import re
import sys
from collections.abc import Iterator, Sequence

from torch import Tensor

from dinov2.models.backbones import num_heads_beside
from dinov2.models.infer_architecture import infer_arguments, published_name
from dinov2.models.key_mapping import StateDict
from dinov2.tools.backbone_forms import settings_of_run
from dinov2.tools.contents import OPTIMIZER, Contents, read_contents


def inspect(source: str, checkpoint_key: str | None, num_heads: int | None, names: bool) -> None:
    """Print the contents of weights or of a checkpoint, see `read_contents`; with `names` also every tensor.

    `checkpoint_key` selects the network whose architecture is printed, None the teacher; `num_heads` None means those
    of the run or of 64 channels each.
    """
    contents = read_contents(source)
    num_heads = num_heads or settings_of_run(contents.folder or source).get("num_heads") or num_heads_beside(source)
    titled = [*_contents(contents), *_architecture(contents, checkpoint_key or "teacher", num_heads)]
    lines = [contents.source, *(f"  {title:28} {value}" for title, value in titled)]
    if names:
        lines += ["", *(f"{name}  {_shape(tensor)}  {_dtype(tensor)}" for name, tensor in contents.tensors.items())]
    try:
        sys.stdout.write("\n".join(lines) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:  # the reader (`| head`) has closed it; Python would report that again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _contents(contents: Contents) -> Iterator[tuple[str, str]]:
    """Titles and values: entries, size, networks, optimizer state."""
    yield from _entries(contents.metadata)
    if contents.folder is not None:
        ranks = {match[1] for path in contents.files if (match := re.fullmatch(r"__(\d+)_\d+\.distcp", path.name))}
        yield "written by", f"{len(ranks)} process(es)"
    num_bytes = sum(path.stat().st_size for path in contents.files)
    yield (
        "size on disk",
        f"{num_bytes / 1e6:,.1f} MB in {len(contents.files)} file(s), {len(contents.tensors):,} tensors",
    )

    parts = contents.parts()
    optimizer, others = parts.pop(OPTIMIZER, {}), parts.pop(("", ""), {})
    for (network, module), names in sorted(parts.items()):
        tensors = [contents.tensors[name] for name in names.values()]
        title = f"{network} {module}".strip()
        yield title, f"{sum(tensor.numel() for tensor in tensors):,} parameters, {_dtypes(tensors)}"
    if centers := [name for name in others if name.endswith(".center")]:
        shapes = (f"{name} {_shape(contents.tensors[others.pop(name)])}" for name in centers)
        yield "centers of the losses", ", ".join(shapes)
    if others:
        modules = sorted({name.rpartition(".")[0] or name for name in others})
        yield "other tensors", f"{len(others):,}: {', '.join(modules[:6])}{', ...' * (len(modules) > 6)}"
    yield "optimizer state", _optimizer_state(contents, optimizer) if optimizer else "none"


def _entries(metadata: dict[str, object]) -> Iterator[tuple[str, str]]:
    """Titles and values of entries that are not tensors."""
    for name, value in metadata.items():
        if isinstance(value, str | int | float):
            yield name.replace("_", " "), f"{value:,}" if type(value) is int else str(value)
    match metadata.get("scaler"):
        case {"scale": scale}:  # empty if the run does not use it
            yield "gradient scale", str(scale)
    if losses := _last_losses(metadata.get("metrics")):
        yield "last losses", losses


def _last_losses(meters: object) -> str:
    """The last value of each loss in the state of a `MetricLogger`; empty for anything else."""
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


def _architecture(contents: Contents, checkpoint_key: str, num_heads: int | None) -> Iterator[tuple[str, str]]:
    """Titles and values of the architecture of a backbone, or why there is none."""
    try:
        state: StateDict = contents.backbone(checkpoint_key)
        found = infer_arguments(state, num_heads)
    except ValueError as error:
        yield "network", f"not recognized: {error}"
        return
    side, registers = found["img_size"] // found["patch_size"], found["num_register_tokens"]
    yield "network", published_name(state) or "none of the published ones"
    yield "width", f"{found['embed_dim']}, {found['depth']} blocks, {found['num_heads']} heads"
    yield "feed-forward", f"{found['ffn_layer']}, {found['mlp_ratio']:.4g} times the width"
    yield "patches", f"{found['patch_size']} pixels, {found['in_chans']} channels, {registers} registers"
    yield "positions", f"{side} x {side} patches, images of {found['img_size']} pixels"
    yield "LayerScale", "yes" if found["init_values"] else "no"
    tensors = list(state.values())
    num_parameters = sum(tensor.numel() for tensor in tensors)
    yield "parameters", f"{num_parameters:,} in {len(tensors)} tensors, {_dtypes(tensors)}"


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "scalar"


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _dtypes(tensors: Sequence[Tensor]) -> str:
    return ", ".join(sorted({_dtype(tensor) for tensor in tensors}))
