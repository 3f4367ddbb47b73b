"""Principal components of patch features as colors (DINOv2 paper, section 7.5).

One basis for all images: parts with like features have like colors wherever they are. Colors of two models have
nothing to do with one another.

Features come in batches, which may be more than fit in memory: what is known of them is their number, mean and
scatter, so that the result is the PCA of all of them, exact up to rounding.

Shapes: n images, h x w patches of an image, D feature width, m feature vectors.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

# --- Principal components --------------------------------------------------------------------------------------------


class PrincipalComponents(NamedTuple):
    """Where feature vectors vary most."""

    mean: Tensor  # (D,) float64
    axes: Tensor  # (count, D) float64, orthonormal, by falling variance
    variances: Tensor  # (count,) float64

    def project(self, features: Tensor) -> Tensor:
        """Coordinates along the axes: (..., D) -> (..., count) float64, on the device of the features."""
        return (features.double() - self.mean.to(features.device)) @ self.axes.T.to(features.device)


class Moments:
    """Number, mean and scatter matrix of feature vectors that come in batches, in float64.

    Batches are merged around their own means (Chan, Golub and LeVeque 1979): no large numbers cancel.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros(0, dtype=torch.float64)  # (D,)
        self.scatter = torch.zeros(0, 0, dtype=torch.float64)  # (D, D), sum of (x - mean) (x - mean)^T

    def add(self, features: Tensor) -> None:
        """Take in feature vectors (m, D), possibly none, all batches on one device."""
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
        """The first principal components, on the CPU; at least one vector was added, count <= D.

        The sign of an axis is arbitrary in principle; its entry of largest magnitude is made positive.
        """
        covariance = self.scatter.cpu() / max(self.count - 1, 1)
        variances, vectors = torch.linalg.eigh(covariance)  # ascending
        axes = vectors.T.flip(0)[:count]
        largest = axes.gather(1, axes.abs().argmax(dim=1, keepdim=True))
        return PrincipalComponents(self.mean.cpu(), axes * largest.sign(), variances.flip(0)[:count].clamp_min(0))

    def magnitude(self) -> float:
        """The root of the mean squared norm of the vectors."""
        return float((self.scatter.trace() / max(self.count, 1) + self.mean.square().sum()).sqrt())


def principal_components(features: Tensor, count: int) -> PrincipalComponents:
    """The first principal components of feature vectors (m, D); see `Moments.components`."""
    moments = Moments()
    moments.add(features)
    return moments.components(count)


# --- Objects ---------------------------------------------------------------------------------------------------------


class _ObjectSide:
    """On which side of an axis objects lie: they are what the outermost patches of an image show less of."""

    def __init__(self) -> None:
        self.difference: Tensor | None = None  # (D,) float64, mean inside minus mean at the border, summed over images

    def add(self, tokens: Tensor) -> None:
        """Take in the tokens (n, h, w, D) of some images; without an inside they say nothing."""
        is_inner = torch.zeros(tokens.shape[1:3], dtype=torch.bool)
        is_inner[1:-1, 1:-1] = True
        if not is_inner.any():
            return
        inner, border = (tokens[:, part].mean(dim=1, dtype=torch.float64).sum(dim=0) for part in (is_inner, ~is_inner))
        self.difference = inner - border if self.difference is None else self.difference + inner - border

    def turned(self, components: PrincipalComponents) -> PrincipalComponents:
        """The same components with the signs for which objects have the larger coordinates."""
        if self.difference is None:
            return components
        away = components.axes @ self.difference.cpu() < 0
        return components._replace(axes=torch.where(away[:, None], -components.axes, components.axes))


@dataclass(frozen=True)
class Foreground:
    """Which patches show an object: those on the object's side of the mean along the first component."""

    component: PrincipalComponents

    def __call__(self, tokens: Tensor) -> Tensor:
        """(n, h, w, D) -> (n, h, w) bool."""
        return self.component.project(tokens).squeeze(-1) > 0


def fit_foreground(batches: Iterable[Tensor]) -> Foreground:
    """What tells objects from background in these tokens, batches of (n, h, w, D)."""
    moments, side = Moments(), _ObjectSide()
    for tokens in batches:
        moments.add(tokens.flatten(0, 2))
        side.add(tokens)
    return Foreground(side.turned(moments.components(1)))


def foreground_mask(tokens: Tensor) -> Tensor:
    """Which patches show an object, (n, h, w, D) -> (n, h, w) bool; see `Foreground`."""
    return fit_foreground([tokens])(tokens)


# --- Colors ---------------------------------------------------------------------------------------------------------


class PCAColormap(NamedTuple):
    """How features become colors: three components as red, green and blue, each stretched over its range."""

    components: PrincipalComponents
    low: Tensor  # (3,) float64, coordinates that become 0
    high: Tensor  # (3,) float64, and 1
    shown: Callable[[Tensor], Tensor] | None  # tokens (n, h, w, D) -> (n, h, w) bool, the patches with a color

    def __call__(self, tokens: Tensor) -> Tensor:
        """(n, h, w, D) -> (n, h, w, 3) float32 in [0, 1] on the CPU; black where nothing is shown."""
        values = self.components.project(tokens).cpu()
        colors = ((values - self.low) / (self.high - self.low)).clamp(0, 1).float()
        return colors if self.shown is None else colors * self.shown(tokens).cpu()[..., None]


def fit_pca_colormap(
    batches: Iterable[Tensor], shown: Callable[[Tensor], Tensor] | None = None, *, clip: float = 0.0
) -> PCAColormap:
    """The colors that show most of the variation in these tokens.

    Args:
        batches: tokens (n, h, w, D) of images that share one basis; h and w may differ. Iterated over twice.
        shown: tokens (n, h, w, D) -> (n, h, w) bool, the patches to color; the others neither count nor show.
        clip: share of the patches of a batch that may fall out of the range at either end; the range is the widest
            of the batches'. With 0 it is that of all patches.

    Returns:
        The colormap, which gives black if features do not vary. Its signs are those for which objects are bright.
    """
    everything, chosen, side = Moments(), Moments(), _ObjectSide()
    for tokens in batches:
        side.add(tokens)
        everything.add(tokens.flatten(0, 2))
        if shown is not None:
            chosen.add(tokens[shown(tokens)])
    components = side.turned((chosen if chosen.count else everything).components(3))
    low, high = torch.full((3,), torch.inf, dtype=torch.float64), torch.full((3,), -torch.inf, dtype=torch.float64)
    for tokens in batches:
        values = components.project(tokens.flatten(0, 2) if shown is None else tokens[shown(tokens)]).sort(dim=0).values
        if len(values):
            cut = int(clip * len(values))
            low, high = low.minimum(values[cut].cpu()), high.maximum(values[len(values) - 1 - cut].cpu())
    if not (high >= low).all():
        low, high = torch.zeros_like(low), torch.zeros_like(high)
    smallest = max(1e-6 * everything.magnitude(), 1e-12)  # a smaller range is no variation but rounding
    high = torch.where(high - low < smallest, torch.inf, high)
    return PCAColormap(components, low, high, shown)


def pca_colors(tokens: Tensor, foreground: Tensor | None = None) -> Tensor:
    """The first three principal components as red, green and blue, each stretched over its range.

    Args:
        tokens: (n, h, w, D), of all images that are to share one basis.
        foreground: (n, h, w) bool, the patches to color; the others neither count nor show. None: all.

    Returns:
        (n, h, w, 3) float32 in [0, 1]; black outside the foreground, and all black if the features do not vary.
    """
    return fit_pca_colormap([tokens], None if foreground is None else lambda _: foreground)(tokens)


def to_images(colors: Tensor) -> list[Image.Image]:
    """Colors (n, h, w, 3) in [0, 1] -> n images of w x h pixels."""
    return [Image.fromarray(pixels) for pixels in (colors * 255).round().to(torch.uint8).numpy()]
