"""The dataset of a training run, read in one way from the first step to the last evaluation."""

import logging
from dataclasses import replace
from pathlib import Path

from dinov2 import config, distributed
from dinov2.config import Config, ConfigError
from dinov2.data import make_dataset
from dinov2.data.datasets.base import ImageDataset
from dinov2.data.images import ImageOptions
from dinov2.train.checkpoint_folder import latest_checkpoint

logger = logging.getLogger(__name__)


def open_dataset(cfg: Config, *, resume: bool) -> tuple[Config, ImageDataset]:
    """Makes the dataset that is trained on.

    Args:
        cfg: Configuration of the run, with its output folder.
        resume: Whether the range of pixel values that an earlier run has measured there on the same dataset holds.

    Returns:
        The configuration with the range of pixel values, if there are images of more than 8 bits, and the dataset. All
        processes have the same range.

    Raises:
        OSError, ValueError: The dataset cannot be had.
    """
    options = ImageOptions(**vars(cfg.images))
    if resume and options.value_range is None and (former := _former_range(cfg)):
        logger.info(
            "pixel values from %g to %g are mapped to 0..255, as in the run so far (images.value_range)", *former
        )
        options = options.with_range(former)
    dataset = make_dataset(dataset_str=cfg.train.dataset_path, image_options=options)
    value_range = distributed.all_gather_object(dataset.image_options.value_range)[0]
    dataset.image_options = dataset.image_options.with_range(value_range)
    return replace(cfg, images=replace(cfg.images, value_range=value_range)), dataset


def _former_range(cfg: Config) -> tuple[float, float] | None:
    """The range of pixel values of the run in the output folder, if it has trained, and on the same dataset.

    Raises:
        OSError: It cannot be seen whether there are checkpoints.
    """
    output = Path(cfg.train.output_dir)
    if latest_checkpoint(output / "checkpoints") is None:
        return None
    try:
        former = config.load(output / "config.yaml")
    except (ConfigError, OSError):  # a damaged one is an error of resuming
        return None
    return former.images.value_range if former.train.dataset_path == cfg.train.dataset_path else None
