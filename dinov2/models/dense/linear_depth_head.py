"""The linear depth head: a 1x1 convolution to the probabilities of depth bins, whose expectation is the depth.

Legend: B images, (h, w) tokens, K bins, u upsampling.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dinov2.models.dense.layers import Layer, concatenate, resize

# Not zero for any bin, so that a pixel has a depth even if all its logits are negative.
_PROBABILITY_OFFSET = 0.1

BIN_WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda logits: logits.relu() + _PROBABILITY_OFFSET,
    "softmax": lambda logits: logits.softmax(dim=1),
    "sigmoid": lambda logits: logits.sigmoid(),
}
"""Logits (B, K, ...) -> weights of the bins, which are divided by their sum."""

BIN_SPACINGS = ("uniform", "log")


def depth_bins(
    min_depth: float, max_depth: float, count: int, spacing: str = "uniform", *, like: Tensor | None = None
) -> Tensor:
    """The depths (count,) of the bins in meters: from `min_depth` to `max_depth`, both included.

    Args:
        min_depth, max_depth: Range of depths in meters.
        count: Number K of bins.
        spacing: `uniform`, or `log` for equal ratios instead of equal distances.
        like: A tensor on the device and of the dtype of the result.
    """
    if spacing not in BIN_SPACINGS:
        raise ValueError(f"unknown spacing of bins {spacing!r}; known: {', '.join(BIN_SPACINGS)}")
    dtype, device = (None, None) if like is None else (like.dtype, like.device)
    if spacing == "uniform":
        return torch.linspace(min_depth, max_depth, count, dtype=dtype, device=device)
    return torch.linspace(math.log(min_depth), math.log(max_depth), count, dtype=dtype, device=device).exp()


def expected_depth(logits: Tensor, bins: Tensor, norm: str = "linear") -> Tensor:
    """Depth (B, 1, h, w) in meters from logits (B, K, h, w) of bins (K,).

    Args:
        logits: One logit per bin.
        bins: Depths of the bins in meters.
        norm: How logits become probabilities, a key of `BIN_WEIGHTS`.
    """
    weights = BIN_WEIGHTS[norm](logits)
    return (weights * bins[:, None, None]).sum(dim=1, keepdim=True) / weights.sum(dim=1, keepdim=True)


class LinearDepthHead(nn.Module):
    """Depth from one convolution of the tokens, with the parameter names of the released heads: `conv_depth.`.

    The defaults are those of DINOv2. The linear head of DINOv3 has `use_class_token=False, upsample=1,
    batch_norm=True`, and reads tokens after the final norm, which is a matter of the `Depther`.

    The release upsamples features, then convolves them. Both are linear and the weights of an interpolation sum to one,
    so here logits are upsampled instead, which gives the same numbers with a fraction of the memory.

    Args:
        in_channels: Number of channels of all layers together, class tokens included: L * D, or L * 2D.
        num_bins: Number K of bins.
        min_depth, max_depth: Depths of the first and of the last bin in meters.
        use_class_token: Whether the class token of a layer is concatenated to each of its patch tokens.
        upsample: Factor u of the bilinear upsampling of the tokens.
        norm: How logits become probabilities, a key of `BIN_WEIGHTS`.
        spacing: Spacing of the bins, `uniform` or `log`.
        batch_norm: Whether the features are normalized by `bn`, before upsampling.
        align_corners: Whether upsampling aligns the centers of the outermost pixels.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        num_bins: int = 256,
        min_depth: float = 0.001,
        max_depth: float = 80.0,
        use_class_token: bool = True,
        upsample: int = 4,
        norm: str = "linear",
        spacing: str = "uniform",
        batch_norm: bool = False,
        align_corners: bool = False,
    ) -> None:
        super().__init__()
        check_depth_range(min_depth, max_depth)
        for name, value, known in (("norm", norm, tuple(BIN_WEIGHTS)), ("spacing", spacing, BIN_SPACINGS)):
            if value not in known:
                raise ValueError(f"unknown {name} {value!r} of a linear depth head; known: {', '.join(known)}")
        if in_channels < 1 or num_bins < 2 or upsample < 1:
            raise ValueError(
                f"a linear depth head needs channels, 2 bins and an upsampling of at least 1, not "
                f"in_channels={in_channels}, num_bins={num_bins}, upsample={upsample}"
            )
        self.in_channels, self.num_bins, self.use_class_token = in_channels, num_bins, use_class_token
        self.min_depth, self.max_depth = min_depth, max_depth
        self.upsample, self.norm, self.spacing, self.align_corners = upsample, norm, spacing, align_corners
        self.bn = nn.BatchNorm2d(in_channels) if batch_norm else None
        self.conv_depth = nn.Conv2d(in_channels, num_bins, kernel_size=1)
        if not self.conv_depth.weight.is_meta:
            nn.init.normal_(self.conv_depth.weight, std=0.01)
            nn.init.zeros_(self.conv_depth.bias)  # type: ignore[arg-type]

    def forward(self, layers: Sequence[Layer]) -> Tensor:
        """Layers -> depth (B, 1, u * h, u * w) in meters, within the range of the bins."""
        logits = self.logits(layers)
        return expected_depth(logits, self.bins(logits), self.norm)

    def logits(self, layers: Sequence[Layer]) -> Tensor:
        """Layers -> logits of the bins (B, K, u * h, u * w), in at least single precision."""
        features = concatenate(layers, class_token=self.use_class_token, channels=self.in_channels)
        height, width = (self.upsample * side for side in features.shape[-2:])
        logits = self.conv_depth(features if self.bn is None else self.bn(features))
        return resize(logits, (height, width), align_corners=self.align_corners)

    def bins(self, like: Tensor | None = None) -> Tensor:
        """Depths (K,) of the bins in meters, on the device and of the dtype of `like`."""
        return depth_bins(self.min_depth, self.max_depth, self.num_bins, self.spacing, like=like)

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments that build this head again."""
        names = ("in_channels", "num_bins", "min_depth", "max_depth", "use_class_token", "upsample", "norm", "spacing")
        own = {name: getattr(self, name) for name in (*names, "align_corners")}
        return own | {"batch_norm": self.bn is not None}


def check_depth_range(min_depth: float, max_depth: float) -> None:
    """Raise a ValueError unless 0 < `min_depth` < `max_depth`, in meters and finite."""
    if not 0 < min_depth < max_depth < float("inf"):
        raise ValueError(f"a depth range is 0 < min < max in meters, not {min_depth} to {max_depth}")
