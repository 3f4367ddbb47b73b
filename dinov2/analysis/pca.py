"""Principal components of patch features as colors (DINOv2 paper, section 7.5): one basis for all images.

Features come in batches, which together may exceed memory. Only their number, mean and scatter matrix are kept, so the
result is the exact PCA of all of them, up to rounding.

Shapes: n images, h x w patches of an image, D feature dimension, m feature vectors, c components.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor


class PrincipalComponents(NamedTuple):
    """Directions in which feature vectors vary most."""

    mean: Tensor  # (D,) float64
    axes: Tensor  # (c, D) float64, orthonormal, by decreasing variance
    variances: Tensor  # (c,) float64

    def project(self, features: Tensor) -> Tensor:
        """Coordinates along the axes: (..., D) -> (..., c) float64, on the device of the features."""
        return (features.double() - self.mean.to(features.device)) @ self.axes.T.to(features.device)


class Moments:
    """Number, mean and scatter matrix of feature vectors that come in batches, in float64.

    Batches are centered on their own means before they are merged (Chan, Golub and LeVeque 1979), which avoids
    cancellation.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros(0, dtype=torch.float64)  # (D,)
        self.scatter = torch.zeros(0, 0, dtype=torch.float64)  # (D, D), sum of (x - mean) (x - mean)^T

    def add(self, features: Tensor) -> None:
        """Add feature vectors (m, D), m >= 0. All batches are on one device."""
        count = len(features)
        if count == 0:
            return
        features = features.double()
        mean = features.mean(dim=0)
        centered = features - mean
        scatter = centered.T @ centered
        if self.count == 0:
            self.count, self.mean, self.scatter = count, mean, scatter
            return
        shift, share = mean - self.mean, count / (self.count + count)
        self.scatter += scatter + torch.outer(shift, shift) * (self.count * share)
        self.mean = self.mean + shift * share
        self.count += count

    def components(self, count: int) -> PrincipalComponents:
        """The first `count` <= D principal components, on the CPU; at least one vector was added.

        The sign of an axis is arbitrary; here its entry of largest magnitude is positive.
        """
        covariance = self.scatter.cpu() / max(self.count - 1, 1)
        variances, vectors = torch.linalg.eigh(covariance)  # ascending
        axes = vectors.T.flip(0)[:count]
        largest = axes.gather(1, axes.abs().argmax(dim=1, keepdim=True))
        return PrincipalComponents(self.mean.cpu(), axes * largest.sign(), variances.flip(0)[:count].clamp_min(0))

    def magnitude(self) -> float:
        """Root mean square norm of the vectors."""
        return float((self.scatter.trace() / max(self.count, 1) + self.mean.square().sum()).sqrt())


# --- Foreground ------------------------------------------------------------------------------------------------------


class _CenterContrast:
    """Mean feature of the inner patches minus that of the border patches, summed over images.

    Objects are assumed to cover less of the border, so this vector points from the background to them.
    """

    def __init__(self) -> None:
        self.difference: Tensor | None = None  # (D,) float64

    def add(self, tokens: Tensor) -> None:
        """Add tokens (n, h, w, D). Grids without inner patches are ignored."""
        inner = torch.zeros(tokens.shape[1:3], dtype=torch.bool)
        inner[1:-1, 1:-1] = True
        if inner.any():
            center, border = (tokens[:, part].mean(dim=1, dtype=torch.float64).sum(dim=0) for part in (inner, ~inner))
            self.difference = center - border if self.difference is None else self.difference + center - border

    def orient(self, components: PrincipalComponents) -> PrincipalComponents:
        """The components with signs for which objects have the larger coordinates."""
        if self.difference is None:
            return components
        negative = components.axes @ self.difference.cpu() < 0
        return components._replace(axes=torch.where(negative[:, None], -components.axes, components.axes))


def fit_foreground(batches: Iterable[Tensor]) -> Callable[[Tensor], Tensor]:
    """Fit a foreground classifier to batches of tokens (n, h, w, D), a function (n, h, w, D) -> (n, h, w) bool.

    The foreground is on the objects' side of the mean along the first component.
    """
    moments, contrast = Moments(), _CenterContrast()
    for tokens in batches:
        moments.add(tokens.flatten(0, 2))
        contrast.add(tokens)
    component = contrast.orient(moments.components(1))
    return lambda tokens: component.project(tokens).squeeze(-1) > 0


# --- Colors ----------------------------------------------------------------------------------------------------------


class PCAColormap(NamedTuple):
    """Maps features to colors: three components as red, green and blue, each scaled to its range."""

    components: PrincipalComponents
    low: Tensor  # (3,) float64, coordinates that are mapped to 0
    high: Tensor  # (3,) float64, coordinates that are mapped to 1
    foreground: Callable[[Tensor], Tensor] | None  # tokens (n, h, w, D) -> (n, h, w) bool; None: all patches

    def __call__(self, tokens: Tensor) -> Tensor:
        """(n, h, w, D) -> (n, h, w, 3) float32 in [0, 1] on the CPU; black outside the foreground."""
        values = self.components.project(tokens).cpu()
        colors = ((values - self.low) / (self.high - self.low)).clamp(0, 1).float()
        return colors if self.foreground is None else colors * self.foreground(tokens).cpu()[..., None]


def fit_pca_colormap(
    batches: Iterable[Tensor], foreground: Callable[[Tensor], Tensor] | None = None, *, clip: float = 0.0
) -> PCAColormap:
    """Fit the colormap that shows most of the variation of tokens. It gives black if they do not vary.

    Args:
        batches: Tokens (n, h, w, D) of images that share one basis; h and w may differ. Iterated over twice.
        foreground: Maps tokens (n, h, w, D) to (n, h, w) bool: the patches to fit and to color. None: all patches.
        clip: Share of the patches of a batch, in [0, 0.5), that is clipped at either end of the range. The range is the
            union of the ranges of the batches.
    """
    everything, chosen, contrast = Moments(), Moments(), _CenterContrast()
    for tokens in batches:
        contrast.add(tokens)
        everything.add(tokens.flatten(0, 2))
        if foreground is not None:
            chosen.add(tokens[foreground(tokens)])
    components = contrast.orient((chosen if chosen.count else everything).components(3))
    low = torch.full((3,), torch.inf, dtype=torch.float64)
    high = -low
    for tokens in batches:
        vectors = tokens.flatten(0, 2) if foreground is None else tokens[foreground(tokens)]
        values = components.project(vectors).sort(dim=0).values
        if len(values):
            clipped = int(clip * len(values))
            low, high = low.minimum(values[clipped].cpu()), high.maximum(values[len(values) - 1 - clipped].cpu())
    if not (high >= low).all():
        low, high = torch.zeros_like(low), torch.zeros_like(high)
    smallest = max(1e-6 * everything.magnitude(), 1e-12)  # smaller ranges are rounding errors
    high = torch.where(high - low < smallest, torch.inf, high)
    return PCAColormap(components, low, high, foreground)


def pca_colors(tokens: Tensor) -> Tensor:
    """The `fit_pca_colormap` of tokens (n, h, w, D) applied to them: (n, h, w, 3) float32 in [0, 1]."""
    return fit_pca_colormap([tokens])(tokens)


def to_images(colors: Tensor) -> list[Image.Image]:
    """Convert colors (n, h, w, 3) in [0, 1] to n images of w x h pixels."""
    return [Image.fromarray(pixels) for pixels in (colors * 255).round().to(torch.uint8).numpy()]
