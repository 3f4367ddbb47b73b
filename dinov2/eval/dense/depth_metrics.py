"""Metrics of depth maps: computed per image on its valid pixels, and averaged over images.

Shapes: B images, (H, W) pixels. Depths are in meters.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

THRESHOLD = 1.25


class DepthMetrics(NamedTuple):
    """The metrics of one image, or their means; p is the prediction, g the true depth."""

    a1: float  # fraction of pixels with max(p/g, g/p) < 1.25
    a2: float  # ... < 1.25^2
    a3: float  # ... < 1.25^3
    abs_rel: float  # mean of |p - g| / g
    sq_rel: float  # mean of (p - g)^2 / g
    rmse: float  # in meters
    rmse_log: float  # of natural logarithms
    log_10: float  # mean of |log10 p - log10 g|
    silog: float  # 100 times the standard deviation of log p - log g
    mae: float  # in meters


class Crop(NamedTuple):
    """A rectangle that is evaluated, as (numerators, denominator) of fractions of the height and of the width."""

    rows: tuple[int, int]
    num_rows: int
    columns: tuple[int, int]
    num_columns: int


# The rectangles of Eigen et al. (2014) and Garg et al. (2016); those of KITTI are published as decimal fractions.
CROPS: dict[str, Crop] = {
    "full": Crop((0, 1), 1, (0, 1), 1),
    "nyu_eigen": Crop((45, 471), 480, (41, 601), 640),
    "kitti_garg": Crop((40810811, 99189189), 10**8, (3594771, 96405229), 10**8),
    "kitti_eigen": Crop((33243240, 91351351), 10**8, (3594771, 96405229), 10**8),
}


def crop_rectangle(crop: str, height: int, width: int) -> tuple[slice, slice]:
    """Rows and columns of a crop in an image of any size, rounded down; an unknown name is a `ValueError`."""
    if crop not in CROPS:
        raise ValueError(f"unknown crop {crop!r}; known: {', '.join(CROPS)}")
    rows, num_rows, columns, num_columns = CROPS[crop]
    return (
        slice(*(height * edge // num_rows for edge in rows)),
        slice(*(width * edge // num_columns for edge in columns)),
    )


def valid_pixels(target: Tensor, *, min_depth: float, max_depth: float, crop: str = "full") -> Tensor:
    """Where a depth map (..., H, W) is evaluated: min_depth < depth < max_depth, within a key of `CROPS`; bool."""
    if not 0 <= min_depth < max_depth:
        raise ValueError(f"expected 0 <= min_depth < max_depth, got {min_depth} and {max_depth}")
    rows, columns = crop_rectangle(crop, *target.shape[-2:])
    inside = torch.zeros(target.shape[-2:], dtype=torch.bool, device=target.device)
    inside[rows, columns] = True
    return (target > min_depth) & (target < max_depth) & inside


def clamp_depth(prediction: Tensor, *, min_depth: float, max_depth: float) -> Tensor:
    """Limit depths to a range; infinite ones become its ends, nan the minimum, as published for KITTI."""
    return prediction.nan_to_num(nan=min_depth, posinf=max_depth, neginf=min_depth).clamp(min_depth, max_depth)


def align_least_squares(prediction: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Map a prediction (B, 1, H, W) by the scale and shift per image that fit the target best on its valid pixels.

    An image with fewer than two valid pixels is left as it is. It is applied after resizing, before clamping.
    """
    aligned = []
    for p, g, v in zip(prediction, target, valid, strict=True):
        if int(v.sum()) < 2:
            aligned.append(p)
            continue
        x, y = p[v].double(), g[v].double()
        x_mean, y_mean = x.mean(), y.mean()
        variance = ((x - x_mean) ** 2).mean()
        scale = ((x - x_mean) * (y - y_mean)).mean() / variance if variance > 0 else torch.zeros_like(variance)
        aligned.append((p.double() * scale + (y_mean - scale * x_mean)).to(p.dtype))
    return torch.stack(aligned)


def depth_metrics(prediction: Tensor, target: Tensor, valid: Tensor, *, published_silog: bool = False) -> DepthMetrics:
    """Compute the metrics of one image, in float64.

    Args:
        prediction: Depths (..., H, W), above 0 on valid pixels: see `clamp_depth`.
        target: True depths of the same shape.
        valid: Mask of the same shape, see `valid_pixels`. Without valid pixels the metrics are nan.
        published_silog: Whether `silog` is then 0, as in DINOv3's evaluation, where it lowers the mean.

    Raises:
        ValueError: The shapes differ, or a depth on a valid pixel is not a positive number.
    """
    if not prediction.shape == target.shape == valid.shape:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (prediction, target, valid))
        raise ValueError(f"prediction, target and mask have different shapes: {shapes}")
    p, g = prediction[valid].double(), target[valid].double()
    for name, depths in (("predicted", p), ("true", g)):
        if not bool(((depths > 0) & depths.isfinite()).all()):
            raise ValueError(f"{name} depths on valid pixels must be positive numbers, got {depths.min().item()}")
    if not len(p):
        nan = float("nan")
        return DepthMetrics(*[nan] * len(DepthMetrics._fields))._replace(silog=0.0 if published_silog else nan)
    ratio, difference, log_difference = torch.maximum(p / g, g / p), p - g, p.log() - g.log()
    a1, a2, a3 = ((ratio < THRESHOLD**power).double().mean().item() for power in (1, 2, 3))
    return DepthMetrics(
        a1=a1,
        a2=a2,
        a3=a3,
        abs_rel=(difference.abs() / g).mean().item(),
        sq_rel=(difference**2 / g).mean().item(),
        rmse=(difference**2).mean().sqrt().item(),
        rmse_log=(log_difference**2).mean().sqrt().item(),
        log_10=(p.log10() - g.log10()).abs().mean().item(),
        silog=100 * log_difference.var(correction=0).sqrt().item(),
        mae=difference.abs().mean().item(),
    )


def mean_over_images(per_image: Sequence[DepthMetrics]) -> DepthMetrics:
    """The mean of each metric over the images where it is not nan (not over pooled pixels, as published).

    Raises:
        ValueError: There is no image, or none has a valid pixel.
    """
    table = torch.tensor(per_image, dtype=torch.float64).view(-1, len(DepthMetrics._fields))
    if table.isnan()[:, 0].all():
        raise ValueError(f"none of {len(table)} images has a pixel with a valid depth: there is nothing to score")
    return DepthMetrics(*table.nanmean(dim=0).tolist())
