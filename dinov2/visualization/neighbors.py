"""Nearest neighbors of images by the cosine similarity of their class tokens.

Shapes: q queries, n images, D feature dimension.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from dinov2.data.transforms import make_classification_eval_transform
from dinov2.data.workers import SupervisedLoader
from dinov2.eval.extract.frozen_backbone import DEFAULT_SIDE, FrozenBackbone
from dinov2.eval.features import autocast, require_finite, run_model
from dinov2.flags.evaluation import PUBLISHED_CROP_SIZE
from dinov2.visualization.inputs import ImageInput, TransformedImages, no_readable_image

BATCH_SIZE = 32


class Neighbors(NamedTuple):
    """A query and its nearest neighbors with their cosine similarities, in decreasing order."""

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
    """Find the nearest neighbors of each query, other than the query itself.

    Args:
        backbone: The model.
        queries: Images that cannot be read are left out, with a warning.
        inputs: Images to search, likewise.
        count: Number of neighbors; fewer if there are fewer images.
        side: Of the center crop in pixels, rounded to a multiple of the patch size; None: as in the k-NN evaluation.
        num_workers: Number of processes that decode images.

    Returns:
        The neighbors of each readable query, and the class tokens (n, D) of the readable inputs.
    """
    queries, query_features = _class_tokens(backbone, queries, side, num_workers)
    inputs, features = _class_tokens(backbone, inputs, side, num_workers)
    paths = [Path(item.path).resolve() for item in inputs]
    is_query = torch.tensor([[Path(query.path).resolve() == path for path in paths] for query in queries])
    cosines, indices = nearest(query_features, features, count, is_query)
    rows = []
    for query, row, values in zip(queries, indices.tolist(), cosines.tolist(), strict=True):
        found = [(inputs[index], cosine) for index, cosine in zip(row, values, strict=True) if cosine > -torch.inf]
        rows.append(Neighbors(query, found))
    return rows, features


def nearest(queries: Tensor, features: Tensor, count: int, excluded: Tensor) -> tuple[Tensor, Tensor]:
    """Find the `count` most similar features (n, D) for each query (q, D), all normalized.

    Returns:
        Cosine similarities (q, k) in decreasing order, -inf for `excluded` pairs (q, n), and indices (q, k) into the
        features, with k = min(count, n).
    """
    similarity = (queries @ features.T).masked_fill(excluded, -torch.inf)
    return similarity.topk(min(count, len(features)), dim=1)


@torch.inference_mode()
def _class_tokens(
    backbone: FrozenBackbone, inputs: Sequence[ImageInput], side: int | None, num_workers: int
) -> tuple[list[ImageInput], Tensor]:
    """The inputs that can be read, and their normalized class tokens (n, D), float32 on the CPU."""
    patch_size, is_small = backbone.model.patch_size, backbone.shorter_side < DEFAULT_SIDE
    side = side or (backbone.shorter_side if is_small else PUBLISHED_CROP_SIZE)
    side = max(round(side / patch_size), 1) * patch_size
    transform = make_classification_eval_transform(
        resize_size=side if is_small else side * 8 // 7, crop_size=side, mean=backbone.mean, std=backbone.std
    )
    dataset = TransformedImages(inputs, transform)
    readable: list[ImageInput] = []
    tokens = []
    for samples in SupervisedLoader(dataset, batch_size=BATCH_SIZE, num_workers=num_workers, collate_fn=list):
        if found := [sample for sample in samples if sample is not None]:
            batch = [inputs[index] for index, _ in found]
            images = torch.stack([image for _, image in found]).to(backbone.model.cls_token.device)
            with autocast(backbone.autocast_dtype):
                features = run_model(backbone.model, images).float().cpu()
            require_finite(features, [item.path for item in batch].__getitem__, backbone.model)
            readable += batch
            tokens.append(functional.normalize(features, dim=-1))
    if not readable:
        raise no_readable_image(inputs)
    return readable, torch.cat(tokens)
