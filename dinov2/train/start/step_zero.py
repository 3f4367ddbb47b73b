"""The check of step 0: before training the teacher's features of some images are those of the model it starts from.

The reference is the source model in its own architecture, as `dinov2.hub` builds it, which resamples its own position
table, computed in float32 beside the teacher.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dinov2 import distributed
from dinov2.config import Config
from dinov2.data.datasets.base import ImageDataset
from dinov2.models.backbones import backbone_from_state
from dinov2.models.carry_over import approximations
from dinov2.models.infer_architecture import published_name
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.train.monitor.probe_images import evenly_spread, read_pixels
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.train.start.initial_weights import InitialWeights

logger = logging.getLogger(__name__)

NUM_IMAGES = 8
TOLERANCE = 1e-5  # largest difference of features, relative to the largest of them


def check_step_zero(model: SSLMetaArch, cfg: Config, dataset: ImageDataset, loaded: InitialWeights) -> str:
    """Compare the features of the teacher, not sharded yet, with those of its source; all processes must call it.

    Returns the result as a text, which is logged. A ValueError if they differ although nothing had to be approximated.
    """
    text = distributed.from_main(lambda: _compare(model, cfg, dataset, loaded))
    logger.info("step 0: %s", text)
    return text


def _compare(model: SSLMetaArch, cfg: Config, dataset: ImageDataset, loaded: InitialWeights) -> str:
    teacher = model.teacher["backbone"]
    assert isinstance(teacher, DinoVisionTransformer), "the teacher has the backbone that this package builds"
    source = _source_model(teacher, loaded).to(distributed.device())
    changed = approximations(loaded.backbone, teacher)
    if source.patch_embed.in_chans != teacher.patch_embed.in_chans:
        return f"{loaded.source} takes other images ({', '.join(changed)}): features were not compared"
    positions = evenly_spread(np.arange(len(dataset)), NUM_IMAGES)
    side = cfg.crops.global_crops_size
    pixels = torch.stack([read_pixels(dataset, position, side)[0] for position in positions.tolist()])
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (cfg.augmentation.mean, cfg.augmentation.std))
    images = ((pixels / 255 - mean) / std).to(distributed.device())
    with _exact_products():
        ours = _features(teacher, images)
        side = side // teacher.patch_size * source.patch_size  # the same grid of patches
        theirs = _features(source, images if side == images.shape[-1] else _resized(images, side))
    if changed:
        similar = ", ".join(
            f"{F.cosine_similarity(ours[name], theirs[name], dim=-1).mean():.3f} ({name})" for name in ours
        )
        return f"approximated ({', '.join(changed)}); mean cosine similarity to {loaded.source}: {similar}"
    difference = max(float((ours[name] - theirs[name]).abs().max()) for name in ours)
    scale = max(float(value.abs().max()) for value in theirs.values())
    found = f"features of {len(images)} images differ by up to {difference:.2g} from those of {loaded.source}"
    if not math.isfinite(difference):
        raise ValueError(
            f"{loaded.key}: features of {len(images)} images are NaN or infinite, nothing was trained. Check "
            f"augmentation.mean={list(cfg.augmentation.mean)}, augmentation.std={list(cfg.augmentation.std)}"
        )
    if not difference <= TOLERANCE * scale:
        raise ValueError(
            f"{loaded.key}: {found} (largest {scale:.3g}), nothing was trained. {_advice(teacher, source)}"
        )
    return found


def _source_model(teacher: DinoVisionTransformer, loaded: InitialWeights) -> DinoVisionTransformer:
    """The source in its own architecture; what tensors do not determine is published, or else as in the teacher."""
    settings: dict[str, Any] = {"num_heads": loaded.num_heads}
    if published_name(loaded.backbone) is None:
        settings |= {
            "num_heads": loaded.num_heads or teacher.num_heads,
            "interpolate_offset": teacher.interpolate_offset,
            "interpolate_antialias": teacher.interpolate_antialias,
        }
    return backbone_from_state(loaded.backbone, loaded.source, **settings)


def _features(model: DinoVisionTransformer, images: Tensor) -> dict[str, Tensor]:
    """Class and patch tokens after the last norm, float32."""
    with torch.no_grad():
        features = model(images, is_training=True)
    return {"class tokens": features["x_norm_clstoken"], "patch tokens": features["x_norm_patchtokens"]}


def _resized(images: Tensor, side: int) -> Tensor:
    """Images of another side, (n, 3, side, side)."""
    return F.interpolate(images, size=(side, side), mode="bicubic", antialias=True)


def _advice(teacher: DinoVisionTransformer, source: DinoVisionTransformer) -> str:
    """The settings of the configuration that differ from those of the source."""
    keys = ("num_heads", "interpolate_offset", "interpolate_antialias")
    pairs = {key: (getattr(teacher, key), getattr(source, key)) for key in keys}
    different = [f"student.{key} = {here}, there {there}" for key, (here, there) in pairs.items() if here != there]
    return f"Different settings: {'; '.join(different)}" if different else "Compare student.* with how it was trained"


@contextmanager
def _exact_products() -> Iterator[None]:
    """Multiply float32 matrices in float32, also where a run allows TF32."""
    former = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(former)
