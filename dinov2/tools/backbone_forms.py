"""Backbones for other libraries and runtimes: `python -m dinov2.tools convert PATH OUTPUT --to hf|timm|onnx|...`.

What was written is read by its library and compared with the source on random images; it is kept only if they agree.
"""

import logging
import tempfile
from pathlib import Path
from typing import Any

from dinov2 import config
from dinov2.models.backbones import backbone_from_state, load_from_weights, unstored_settings
from dinov2.models.export import FORMS, Difference, compare, timm_arguments
from dinov2.models.infer_architecture import published_name
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.tools.contents import checkpoint_folder
from dinov2.train.checkpoint_files.tensors import read_tensors

logger = logging.getLogger(__name__)

TOLERANCE = 1e-4  # largest accepted difference, relative to the largest output; single precision gives about 1e-6


def convert_backbone(
    source: str,
    output: Path,
    form: str,
    *,
    model_name: str | None,
    num_heads: int | None,
    checkpoint_key: str,
    force: bool,
) -> None:
    """Write a backbone in another form, compare both, and keep the result only if they agree.

    Args:
        source: A run's output folder, a checkpoint folder, or any source of weights.
        output: The file to write, with the form `hf` the folder; an existing one is replaced only with `force`.
        form: A key of `models.export.FORMS`; a ValueError if it cannot represent the backbone.
        model_name, num_heads, checkpoint_key: See `load_from_weights`; heads of a run are those in its config.
    """
    _check_output(output, form, force)
    model = _load(source, model_name, num_heads, checkpoint_key)
    for library in ("onnxscript", "onnx_ir"):  # they log every optimization, and warn of those that they skip
        logging.getLogger(library).setLevel(logging.ERROR)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as folder:
        unfinished = Path(folder) / output.name
        try:
            FORMS[form].write(model, unfinished)
        except RuntimeError as error:  # raised by torch for a full disk, or a network that it cannot export
            raise OSError(f"could not write {output}: {error}") from error
        differences = compare(model, FORMS[form], unfinished)
        for difference in differences:
            logger.info("%s", _describe(difference, form))
        if bad := [item for item in differences if not item.largest <= TOLERANCE * max(1.0, item.scale)]:
            raise ValueError(f"not written: at {bad[0].height} x {bad[0].width} pixels {form} computes something else")
        _move(unfinished, output)
    logger.info("%s: %s", output, _usage(model, form, output))


def _check_output(output: Path, form: str, force: bool) -> None:
    """Refuse an output with a suffix that readers of the form do not accept, or that exists."""
    suffixes = FORMS[form].suffixes
    if suffixes and output.suffix not in suffixes:
        raise ValueError(f"--to {form} needs an OUTPUT that ends in {' or '.join(suffixes)}, not {output}")
    if output.exists() and not force:
        raise FileExistsError(f"{output} exists already: give another name, or --force to replace it")
    if output.exists() and output.is_dir() != (form == "hf"):
        raise FileExistsError(f"{output} is {'a folder' if output.is_dir() else 'a file'}: give another name")


def _load(source: str, name: str | None, num_heads: int | None, checkpoint_key: str) -> DinoVisionTransformer:
    """The backbone of a run's checkpoint, or of weights."""
    folder = checkpoint_folder(source)
    settings = settings_of_run(folder or source) | ({"num_heads": num_heads} if num_heads else {})
    if folder is None:
        return load_from_weights(source, name=name, checkpoint_key=checkpoint_key, **settings)
    prefix = f"model.{checkpoint_key}.backbone."
    state = {key.removeprefix(prefix): value for key, value in read_tensors(folder, prefix).items()}
    return backbone_from_state(state, f"{folder} ({checkpoint_key})", name=name, **settings)


def settings_of_run(weights: str | Path) -> dict[str, Any]:
    """The `unstored_settings` of a checkpoint or an exported teacher, from the config of its run; {} without one."""
    cfg = config.of_run(weights)
    return {} if cfg is None else unstored_settings(**config.backbone_arguments(cfg))


def _describe(difference: Difference, form: str) -> str:
    height, width, largest, scale, published = difference
    text = f"{height} x {width} pixels: largest difference {largest:.1e} (largest output {scale:.2g})"
    if published is not None:
        text += f"; {form} resamples positions in its own way, which differs from the published one by {published:.1e}"
    return text


def _move(unfinished: Path, output: Path) -> None:
    """Move what was written to its final path: the files of a folder one by one, or a file and those beside it."""
    files = list((unfinished if unfinished.is_dir() else unfinished.parent).iterdir())
    target = output if unfinished.is_dir() else output.parent
    target.mkdir(exist_ok=True)
    for file in files:
        file.replace(target / file.name)


def _usage(model: DinoVisionTransformer, form: str, output: Path) -> str:
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
