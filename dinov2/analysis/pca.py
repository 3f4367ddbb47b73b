"""Principal components of patch features as colours (DINOv2 paper, section 7.5).

One basis for all images: parts with like features have like colours wherever they are. Colours of two models have
nothing to do with one another.

Shapes: n images, h x w patches of an image, D feature width, m feature vectors.
"""

from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor


class PrincipalComponents(NamedTuple):
    """Where feature vectors vary most."""

    mean: Tensor  # (D,) float64
    axes: Tensor  # (count, D) float64, orthonormal, by falling variance
    variances: Tensor  # (count,) float64

    def project(self, features: Tensor) -> Tensor:
        """Coordinates along the axes: (..., D) -> (..., count) float64."""
        return (features.double() - self.mean) @ self.axes.T


def principal_components(features: Tensor, count: int) -> PrincipalComponents:
    """The first principal components of feature vectors (m, D); at least one vector, count <= D.

    The sign of an axis is arbitrary in principle; its entry of largest magnitude is made positive.
    """
    mean = features.double().mean(dim=0)
    centred = features.double() - mean
    covariance = centred.T @ centred / max(len(features) - 1, 1)
    variances, vectors = torch.linalg.eigh(covariance)  # ascending
    axes = vectors.T.flip(0)[:count]
    largest = axes.gather(1, axes.abs().argmax(dim=1, keepdim=True))
    return PrincipalComponents(mean, axes * largest.sign(), variances.flip(0)[:count].clamp_min(0))


def foreground_mask(tokens: Tensor) -> Tensor:
    """Which patches show an object: those on the object's side of the mean along the first component.

    Args:
        tokens: (n, h, w, D).

    Returns:
        (n, h, w) bool.
    """
    return _objects_positive(principal_components(tokens.flatten(0, 2), 1).project(tokens)).squeeze(-1) > 0


def _objects_positive(values: Tensor) -> Tensor:
    """Components (n, h, w, count) with their signs, arbitrary in a PCA, such that objects have the larger values.

    Objects are what the outermost patches show less of.
    """
    inner = torch.zeros(values.shape[1:3], dtype=torch.bool)
    inner[1:-1, 1:-1] = True
    if not inner.any():
        return values
    difference = values[:, inner].mean(dim=(0, 1)) - values[:, ~inner].mean(dim=(0, 1))
    return torch.where(difference < 0, -values, values)


def pca_colours(tokens: Tensor, foreground: Tensor | None = None) -> Tensor:
    """The first three principal components as red, green and blue, each stretched over its range.

    Args:
        tokens: (n, h, w, D), of all images that are to share one basis.
        foreground: (n, h, w) bool, the patches to colour; the others neither count nor show. None: all.

    Returns:
        (n, h, w, 3) float32 in [0, 1]; black outside the foreground, and all black if the features do not vary.
    """
    shown = torch.ones(tokens.shape[:3], dtype=torch.bool) if foreground is None else foreground
    colours = torch.zeros(*tokens.shape[:3], 3)
    if not shown.any():
        return colours
    values = _objects_positive(principal_components(tokens[shown], 3).project(tokens))[shown]
    low, high = values.aminmax(dim=0)
    rounding = 1e-6 * tokens.abs().max().clamp_min(1e-6)  # a smaller range is no variation
    colours[shown] = ((values - low) / (high - low).clamp_min(rounding)).float()
    return colours


def to_pictures(colours: Tensor) -> list[Image.Image]:
    """Colours (n, h, w, 3) in [0, 1] -> n pictures of w x h pixels."""
    return [Image.fromarray(pixels) for pixels in (colours * 255).round().to(torch.uint8).numpy()]
