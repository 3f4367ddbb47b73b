"""Which backbone a person means, and how it wants to see images: `--model`, `--config-file`, `--pretrained-weights`."""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from dinov2 import config, distributed
from dinov2.data.images import DEFAULT_OPTIONS, ImageOptions
from dinov2.data.transforms import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from dinov2.eval import setup
from dinov2.models.backbones import build_published, load_from_weights
from dinov2.models.published import PUBLISHED
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.models.weights import TEACHER_FILE

logger = logging.getLogger(__name__)

LARGE_SIZE = 448  # pixels; how models trained on images of the published sizes look at images


class FrozenBackbone(NamedTuple):
    """A backbone in evaluation mode on this process's device, and what it expects of images."""

    model: DinoVisionTransformer
    name: str
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN
    std: Sequence[float] = IMAGENET_DEFAULT_STD
    autocast_dtype: torch.dtype = torch.float32
    size: int = LARGE_SIZE  # pixels of the shorter side of images, unless a person says otherwise
    image_options: ImageOptions = DEFAULT_OPTIONS  # how image files are read


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that `load_frozen_backbone` reads."""
    group = parser.add_argument_group("the model: --model, --config-file with weights, or --pretrained-weights alone")
    group.add_argument("--model", metavar="NAME", help=f"a published model: {', '.join(PUBLISHED)}")
    group.add_argument("--config-file", help="config of the model: YAML file or packaged name")
    group.add_argument(
        "--pretrained-weights",
        metavar="WEIGHTS",
        help="file, URL, folder of transformers or of a run's teacher (OUT/eval/best); alone, its tensors tell the "
        "network, and the teacher of a run is read with the config.yaml of the run",
    )
    group.add_argument("--random-init", action="store_true", help="the network as it is before training")
    group.add_argument(
        "--num-heads",
        type=int,
        help="attention heads, where there is no config: the "
        "tensors do not tell (default: 64 channels each, or as a config.json of transformers beside them says)",
    )
    group.add_argument(
        "--opts", nargs="+", action="extend", default=[], metavar="key=value", help="config overrides, a.b=value"
    )


def load_frozen_backbone(args: argparse.Namespace) -> FrozenBackbone:
    """The backbone that the command line asks for.

    Raises:
        ValueError: flags that do not go together, an unknown name, or weights that do not fit.
        FileNotFoundError: no such config or weights.
    """
    _check(args)
    if args.config_file is None and args.model is None and (run := _run_of(args.pretrained_weights)):
        logger.info("%s: the model of the run in %s", args.pretrained_weights, run.parent)
        return _of_config(str(run), args)
    if args.config_file is not None:
        return _of_config(args.config_file, args)
    if args.opts:
        raise ValueError(f"--opts {' '.join(args.opts)} overrides a config: give --config-file, too")
    device = distributed.device()
    if args.random_init:
        torch.manual_seed(0)
        model, name = build_published(args.model).eval().requires_grad_(False), f"{args.model} (untrained)"
    else:
        source = args.pretrained_weights or args.model
        model = load_from_weights(source, name=args.model, num_heads=args.num_heads)
        name = args.model or _name(source)
    trained = model.patch_embed.img_size[0]
    return FrozenBackbone(
        model.to(device),
        name,
        autocast_dtype=torch.float32 if device.type == "cpu" else torch.float16,
        size=trained if trained < setup.SMALLEST_PUBLISHED_SIZE else LARGE_SIZE,
    )


def _check(args: argparse.Namespace) -> None:
    """Raises a `ValueError` if the flags leave open which model, or say it twice."""
    if args.model is not None and args.model not in PUBLISHED:
        raise ValueError(f"unknown --model {args.model!r}; known: {', '.join(PUBLISHED)}")
    if args.model is not None and args.config_file is not None:
        raise ValueError("--model and --config-file both say which network: give one of them")
    if args.num_heads is not None and args.config_file is not None:
        raise ValueError(f"--num-heads {args.num_heads}: a config says that itself, --opts student.num_heads=... too")
    if args.random_init and args.pretrained_weights is not None:
        raise ValueError("--random-init and --pretrained-weights exclude one another")
    if args.pretrained_weights is None and args.model is None and not (args.config_file and args.random_init):
        raise ValueError(
            "which model? Give --model NAME, or --pretrained-weights WEIGHTS (with --config-file if the tensors do not "
            "tell the network), or --config-file CONFIG --random-init"
        )


def _run_of(weights: str) -> Path | None:
    """The config of the training run that left these weights, OUT/eval/training_<it>[/teacher_checkpoint.pth]."""
    folder = _folder_of_teacher(weights)
    run = folder.parent.parent / "config.yaml" if folder else None
    return run if run and run.is_file() else None


def _folder_of_teacher(weights: str) -> Path | None:
    """The folder of a run's teacher, if weights are such a folder or the file in it."""
    path = Path(weights).absolute()
    if path.is_dir() and (path / TEACHER_FILE).is_file():
        return path
    return path.parent if path.name == TEACHER_FILE else None


def _name(weights: str) -> str:
    """What weights are called in an image: a teacher of a run by the run and the iteration, others by their file."""
    run, folder = _run_of(weights), _folder_of_teacher(weights)
    return f"{run.parent.name}/{folder.name}" if run and folder else Path(weights).absolute().name


def _name_untrained(file: str) -> str:
    """What the network of a config is called: of a run by the run, else by its file or packaged name."""
    path = Path(file).absolute()
    name = path.parent.name if path.name == "config.yaml" else path.name if path.is_file() else file
    return f"{name} (untrained)"


def _of_config(file: str, args: argparse.Namespace) -> FrozenBackbone:
    cfg = config.load(file, args.opts)
    trained = cfg.crops.global_crops_size
    name = _name(args.pretrained_weights) if args.pretrained_weights else _name_untrained(file)
    return FrozenBackbone(
        setup.build_model_for_eval(cfg, args.pretrained_weights),
        name,
        cfg.augmentation.mean,
        cfg.augmentation.std,
        setup.get_autocast_dtype(cfg),
        trained if trained < setup.SMALLEST_PUBLISHED_SIZE else LARGE_SIZE,
        setup.image_options(cfg),
    )
