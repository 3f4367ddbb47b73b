"""The frozen backbone that a command line selects: `--model`, `--config-file` and `--pretrained-weights`."""

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
from dinov2.flags.evaluation import SMALLEST_PUBLISHED_SIZE
from dinov2.flags.visualization import DEFAULT_SIDE
from dinov2.models.backbones import build_published, load_from_weights
from dinov2.models.published import PACKAGED, PUBLISHED
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.models.weight_files import known_names

logger = logging.getLogger(__name__)


class FrozenBackbone(NamedTuple):
    """A backbone in evaluation mode on the device of this process, and its preprocessing."""

    model: DinoVisionTransformer
    name: str
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN
    std: Sequence[float] = IMAGENET_DEFAULT_STD
    autocast_dtype: torch.dtype = torch.float32
    shorter_side: int = DEFAULT_SIDE  # default shorter side of model inputs in pixels
    image_options: ImageOptions = DEFAULT_OPTIONS  # how image files are decoded

    @classmethod
    def of(cls, model: DinoVisionTransformer, name: str = "a backbone in memory") -> "FrozenBackbone":
        """A given backbone with the preprocessing of the published ones, in the default precision of the device."""
        half = distributed.device().type != "cpu"
        side = _default_side(model.patch_embed.img_size[0])
        return cls(model, name, autocast_dtype=torch.float16 if half else torch.float32, shorter_side=side)


def load_frozen_backbone(args: argparse.Namespace) -> FrozenBackbone:
    """Load the backbone that the flags of a command select."""
    _check(args)
    weights, config_file = args.pretrained_weights, args.config_file
    if config_file is None and (name := args.model or weights) in PACKAGED:
        config_file = PACKAGED[name]
        weights = None if args.random_init else weights or name
    elif config_file is None and args.model is None and (found := config.file_of_run(weights)):
        logger.info("%s: the model of the run in %s", weights, found.parent)
        config_file = str(found)
    if config_file is not None:
        cfg = config.load(config_file, args.opts)
        config.require_normalization(cfg)
        return FrozenBackbone(
            setup.build_model_for_eval(cfg, weights),
            _name(weights) if weights else _name_untrained(config_file),
            cfg.augmentation.mean,
            cfg.augmentation.std,
            setup.get_autocast_dtype(cfg),
            _default_side(cfg.crops.global_crops_size),
            setup.image_options(cfg),
        )
    if args.opts:
        raise ValueError(f"--opts {' '.join(args.opts)} overrides a config: give --config-file, too")
    if args.random_init:
        torch.manual_seed(0)
        model, name = build_published(args.model).eval().requires_grad_(False), f"{args.model} (untrained)"
    else:
        model = load_from_weights(weights or args.model, name=args.model, num_heads=args.num_heads)
        name = args.model or _name(weights)
    return FrozenBackbone.of(model.to(distributed.device()), name)


def _check(args: argparse.Namespace) -> None:
    """Raise a `ValueError` if the flags select no model or more than one."""
    has_model, has_config = args.model is not None, args.config_file is not None
    if has_model and args.model not in [*PUBLISHED, *PACKAGED]:
        raise ValueError(f"unknown --model {args.model!r}{known_names(args.model)}")
    if has_model and has_config:
        raise ValueError("--model and --config-file both define the architecture: give one of them")
    if args.num_heads is not None and has_config:
        raise ValueError(
            f"--num-heads {args.num_heads} cannot be used with --config-file, which defines the number of heads: use "
            f"--opts student.num_heads={args.num_heads}"
        )
    if args.random_init and args.pretrained_weights is not None:
        raise ValueError("--random-init and --pretrained-weights exclude one another")
    if args.pretrained_weights is None and not has_model and not (args.config_file and args.random_init):
        raise ValueError(
            "no model selected: give --model NAME, or --pretrained-weights WEIGHTS (with --config-file if the "
            "architecture cannot be inferred from the tensors), or --config-file CONFIG --random-init"
        )


def _default_side(trained_side: int) -> int:
    """Default shorter side of model inputs: `DEFAULT_SIDE`, but for models trained on small images theirs."""
    return trained_side if trained_side < SMALLEST_PUBLISHED_SIZE else DEFAULT_SIDE


def _name(weights: str) -> str:
    """Name of a model in figures: run and iteration of a run's teacher, otherwise the name of the weight file."""
    path, found = Path(weights).absolute(), config.file_of_run(weights)
    if found is None:
        return path.name
    return f"{found.parent.name}/{(path.parent if path.is_file() else path).name}"


def _name_untrained(config_file: str) -> str:
    """Name of an untrained model in figures: that of the run, of the config file or of the packaged config."""
    path = Path(config_file).absolute()
    name = path.parent.name if path.name == "config.yaml" else path.name if path.is_file() else config_file
    return f"{name} (untrained)"
