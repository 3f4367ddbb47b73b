"""Test-time averaging over scales and mirror images.

Legend: B images, C classes, (H, W) the size of the labels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dinov2.models.dense.layers import resize
from dinov2.models.dense.padding import Size
from dinov2.models.dense.sliding_window import MapModel


def predict_probabilities(model: MapModel, images: Sequence[Tensor], size: Size, *, mirror: bool = False) -> Tensor:
    """Probabilities of classes (B, C, H, W): the mean over the scales of an image, and their mirror images.

    As published, logits are resized to the size of the labels before the softmax.

    Args:
        model: Images (B, 3, h, w) -> logits (B, C, h', w'), such as a `Segmenter`, or `slide` with its options.
        images: The same B images at one or several scales, each (B, 3, h, w).
        size: (H, W) of the labels in pixels.
        mirror: Whether each scale is also predicted from the image mirrored left to right.
    """
    if not images:
        raise ValueError("there are no images to predict: give them at one scale at least")
    total: Tensor | None = None
    for scaled in images:
        for mirrored in (False, True) if mirror else (False,):
            logits = model(scaled.flip(-1) if mirrored else scaled)
            probabilities = resize(logits, size).softmax(dim=1)
            probabilities = probabilities.flip(-1) if mirrored else probabilities
            total = probabilities if total is None else total + probabilities
    assert total is not None, "there is at least one scale"
    return total / (len(images) * (2 if mirror else 1))


def predict_depth(model: MapModel, images: Tensor, *, mirror: bool = False) -> Tensor:
    """Depth (B, 1, H, W) of images (B, 3, H, W), with `mirror` the mean with that of the mirror images.

    Args:
        model: Images -> depth, such as a `Depther`, or `slide` with its options.
        images: Images of one size.
        mirror: Whether to average with the prediction from the image mirrored left to right, as published.
    """
    depth = model(images)
    return torch.stack([depth, model(images.flip(-1)).flip(-1)]).mean(0) if mirror else depth
