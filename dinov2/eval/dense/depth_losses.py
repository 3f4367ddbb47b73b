"""Losses of depth maps, as functions of predictions, true depths and masks.

Shapes: B images, (H, W) pixels; predictions, targets and masks are (B, 1, H, W), depths in meters.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

EPSILON = 1e-3  # meters, added before logarithms
VARIANCE_FOCUS = 0.15  # weight of the squared mean in SigLoss
WARM_UP_STEPS = 100
SCALES = (1, 2, 4, 6)  # as published; a fourth step of 8 would continue the sequence
GAP = 2  # pixels of the subsampled map between two neighbors whose difference is a gradient


def labeled_pixels(target: Tensor, max_depth: float | None = None) -> Tensor:
    """Pixels that count in the loss: target > 0, and at most `max_depth` if given (published: no limit); bool."""
    valid = target > 0
    return valid if max_depth is None else valid & (target <= max_depth)


def sig_loss(
    prediction: Tensor, target: Tensor, mask: Tensor, *, step: int, warm_up_steps: int = WARM_UP_STEPS
) -> Tensor:
    """Scale-invariant logarithmic loss (Eigen et al. 2014): sqrt(var(d) + 0.15 mean(d)^2) of the log differences d.

    The variance is that of a sample. In the first `warm_up_steps` steps of a training only the mean counts, so that
    the scale is learned first. It is 0 with fewer than two pixels in the mask, whose variance does not exist.

    Args:
        prediction: Depths above 0.
        target: True depths.
        mask: Pixels that count.
        step: Number of optimizer steps before this one; it is the only state, so that a resumed training is exact.
        warm_up_steps: Number of steps; 0 for none.
    """
    difference = log_depth(prediction[mask]) - log_depth(target[mask])
    if len(difference) < 2:
        return prediction.sum() * 0.0
    squared_mean = VARIANCE_FOCUS * difference.mean() ** 2
    total = squared_mean if step < warm_up_steps else difference.var() + squared_mean
    return total.clamp(min=torch.finfo(total.dtype).tiny).sqrt()  # the root of 0 has no gradient


def log_depth(depth: Tensor) -> Tensor:
    return torch.log(depth + EPSILON)


def gradient_log_loss(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Differences of the log depths' gradients at several scales, over the height and width of each image (DINOv3)."""
    return _gradient_loss(log_depth(prediction), log_depth(target), mask, dims=(-2, -1))


def gradient_loss(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Differences of the depths' gradients at several scales, in meters (DINOv3)."""
    return _gradient_loss(prediction, target, mask, dims=(-2, -1))


def published_gradient_loss(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """The gradient loss of DINOv2's trainings, which differs from `gradient_log_loss` by a slip of its indices.

    It takes the first two dimensions for height and width. Those of a batch are images and channels, so the loss is
    exactly 0 for up to two images, as in the published trainings, and compares different images if there are more.
    """
    return _gradient_loss(log_depth(prediction), log_depth(target), mask, dims=(0, 1))


def _gradient_loss(prediction: Tensor, target: Tensor, mask: Tensor, dims: tuple[int, int]) -> Tensor:
    """Sum over `SCALES` of |gradient of (prediction - target)| over two dimensions, divided by the pixels in the mask.

    Scale s takes every s-th element. A gradient counts if both of its pixels are in the mask.
    """
    difference = torch.where(mask, prediction - target, torch.zeros_like(prediction)).movedim(dims, (0, 1))
    mask = mask.movedim(dims, (0, 1))
    total = prediction.sum() * 0.0
    for scale in SCALES:
        d, m = difference[::scale, ::scale], mask[::scale, ::scale]
        for dim in (0, 1):
            length = d.shape[dim] - GAP
            if length < 1:
                continue
            both = m.narrow(dim, 0, length) & m.narrow(dim, GAP, length)
            change = d.narrow(dim, 0, length) - d.narrow(dim, GAP, length)
            total = total + (change.abs() * both).sum() / m.sum().clamp(min=1)
    return total


def l1_loss(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean absolute difference over the pixels in the mask, in meters; 0 without any."""
    return ((prediction - target).abs() * mask).sum() / mask.sum().clamp(min=1)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "sig": sig_loss,
    "gradient_log": gradient_log_loss,
    "gradient": gradient_loss,
    "published_gradient": published_gradient_loss,
    "l1": l1_loss,
}


def weighted_depth_loss(
    weights: Mapping[str, float],
    prediction: Tensor,
    target: Tensor,
    mask: Tensor,
    *,
    step: int,
    warm_up_steps: int = WARM_UP_STEPS,
) -> Tensor:
    """Sum of losses, keys of `LOSSES`, by weight: {"sig": 1.0, "published_gradient": 0.5} in DINOv2's trainings."""
    if not weights or not set(weights) <= set(LOSSES):
        raise ValueError(f"unknown loss {sorted(set(weights) - set(LOSSES))}; known: {', '.join(LOSSES)}")
    total = prediction.sum() * 0.0
    for name, weight in weights.items():
        warm_up = {"step": step, "warm_up_steps": warm_up_steps} if name == "sig" else {}
        total = total + weight * LOSSES[name](prediction, target, mask, **warm_up)
    return total
