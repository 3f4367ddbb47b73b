"""The images that are most similar to an image, by the cosine of their class tokens.

Shapes: q queries, n images, D feature width.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from dinov2.data.transforms import make_classification_eval_transform
from dinov2.data.workers import SupervisedLoader
from dinov2.eval.features import autocast, require_finite, run_model
from dinov2.eval.setup import PUBLISHED_CROP_SIZE
from dinov2.visualization.frozen_backbone import LARGE_SIZE, FrozenBackbone
from dinov2.visualization.inputs import ImageInput, TransformedImages, no_readable_image

BATCH_SIZE = 32


class Neighbors(NamedTuple):
    """An image and those that are most similar to it, with their cosine similarities, falling."""

    query: ImageInput
    found: list[tuple[ImageInput, float]]


def find_neighbors(
    backbone: FrozenBackbone,
    queries: Sequence[ImageInput],
    inputs: Sequence[ImageInput],
    *,
    count: int = 5,
    side: int | None = None,
    num_workers: int = 0,
) -> tuple[list[Neighbors], Tensor]:
    """The most similar inputs of each query, which is not its own neighbor.

    Args:
        queries, inputs: those that cannot be read are left out, with a warning.
        count: how many; fewer if there are not so many.
        side: of the square in pixels that is cut out, as for the k-NN evaluation, rounded to a multiple of the patch;
            None: as there.
        num_workers: processes that read inputs.

    Returns:
        The neighbors of each query that can be read, and the class tokens (n, D) of the inputs that can be read.

    Raises:
        ValueError: if none of the queries or none of the inputs can be read, or a feature is not finite.
    """
    queries, asked = _class_tokens(backbone, queries, side, num_workers)
    inputs, features = _class_tokens(backbone, inputs, side, num_workers)
    places = [Path(item.path).resolve() for item in inputs]
    own = [Path(query.path).resolve() for query in queries]
    cosines, found = nearest(
        asked, features, count, torch.tensor([[path == place for place in places] for path in own])
    )
    return [
        Neighbors(query, [(inputs[at], value) for at, value in zip(row, values, strict=True) if value > -torch.inf])
        for query, row, values in zip(queries, found.tolist(), cosines.tolist(), strict=True)
    ], features


def nearest(queries: Tensor, features: Tensor, count: int, excluded: Tensor) -> tuple[Tensor, Tensor]:
    """The features that are most similar to queries.

    Args:
        queries: (q, D) of length 1.
        features: (n, D) of length 1.
        count: how many; fewer if there are not so many.
        excluded: (q, n) bool, pairs that do not count.

    Returns:
        Cosine similarities (q, k), falling, and positions in the features (q, k). An excluded pair has -inf.
    """
    similarity = (queries @ features.T).masked_fill(excluded, -torch.inf)
    return similarity.topk(min(count, len(features)), dim=1)


@torch.inference_mode()
def _class_tokens(
    backbone: FrozenBackbone, inputs: Sequence[ImageInput], side: int | None, num_workers: int
) -> tuple[list[ImageInput], Tensor]:
    """The inputs that can be read, and their class tokens (n, D) of length 1, float32 on the CPU."""
    patch_size, small = backbone.model.patch_size, backbone.size < LARGE_SIZE
    side = side or (backbone.size if small else PUBLISHED_CROP_SIZE)
    side = max(round(side / patch_size), 1) * patch_size
    transform = make_classification_eval_transform(
        resize_size=side if small else side * 8 // 7, crop_size=side, mean=backbone.mean, std=backbone.std
    )
    dataset = TransformedImages(inputs, transform)
    readable: list[ImageInput] = []
    tokens = []
    for samples in SupervisedLoader(dataset, batch_size=BATCH_SIZE, num_workers=num_workers, collate_fn=list):
        if found := [sample for sample in samples if sample is not None]:
            sources = [inputs[index] for index, _ in found]
            images = torch.stack([image for _, image in found]).to(backbone.model.cls_token.device)
            with autocast(backbone.autocast_dtype):
                features = run_model(backbone.model, images).float().cpu()
            require_finite(features, [source.path for source in sources].__getitem__, backbone.model)
            readable += sources
            tokens.append(functional.normalize(features, dim=-1))
    if not readable:
        raise no_readable_image(inputs)
    return readable, torch.cat(tokens)
