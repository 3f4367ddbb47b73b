"""The DPT depth head (Ranftl et al., Vision Transformers for Dense Prediction, arXiv 2103.13413).

Four layers of tokens become maps of four resolutions (4, 2, 1, 1/2 times the grid of tokens), which are fused from the
coarsest to the finest. Module names are those of the released heads.

Legend: B images, (h, w) tokens, D width of the backbone, C channels of the maps.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, relu

from dinov2.models.dense.layers import Layer, resize
from dinov2.models.dense.linear_depth_head import check_depth_range

NUM_LAYERS = 4
READOUTS = ("project", "add", "ignore")
LAST_CHANNELS = 32


class DPTDepthHead(nn.Module):
    """Depth by regression from four layers.

    Args:
        in_channels: Width D of the backbone.
        channels: Number C of channels of the fused maps.
        post_channels: Number of channels of the four maps before that; None for D/8, D/4, D/2, D.
        readout: What becomes of the class token: `project` concatenates it to each patch token and projects both to
            the width D, `add` adds it, `ignore` leaves it out.
        min_depth: Smallest depth in meters, added to the positive output.
        max_depth: Largest depth in meters, at which a `Depther` clamps; the head does not.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        channels: int = 256,
        post_channels: Sequence[int] | None = None,
        readout: str = "project",
        min_depth: float = 0.001,
        max_depth: float = 10.0,
    ) -> None:
        super().__init__()
        check_depth_range(min_depth, max_depth)
        post = tuple(post_channels or (in_channels // 8, in_channels // 4, in_channels // 2, in_channels))
        if len(post) != NUM_LAYERS or min(*post, in_channels) < 1 or channels < 2:
            raise ValueError(
                f"a DPT head needs {NUM_LAYERS} maps, and channels: not {post} from {in_channels} to {channels}"
            )
        self.in_channels, self.channels, self.post_channels, self.readout = in_channels, channels, post, readout
        self.min_depth, self.max_depth = min_depth, max_depth
        self.conv_depth = _Regression(channels)
        self.reassemble_blocks = _Reassemble(in_channels, post, readout)
        self.convs = nn.ModuleList(_Convolution(width, channels, 3, bias=False) for width in post)
        self.fusion_blocks = nn.ModuleList(_Fusion(channels, skip=index > 0) for index in range(NUM_LAYERS))
        self.project = _Convolution(channels, channels, 3)

    def forward(self, layers: Sequence[Layer]) -> Tensor:
        """Four layers by increasing depth -> depth (B, 1, H, W) in meters, at least `min_depth` and not clamped above.

        (H, W) is 32 times the coarsest grid, (h / 2, w / 2) rounded up.
        """
        fused = self.project(self.fuse(self.maps(layers))[-1])
        outputs = self.conv_depth(relu(fused))
        return relu(outputs.to(torch.promote_types(outputs.dtype, torch.float32))) + self.min_depth

    def maps(self, layers: Sequence[Layer]) -> list[Tensor]:
        """Four layers -> maps of C channels and four resolutions, the finest first."""
        return [conv(image) for conv, image in zip(self.convs, self.reassemble_blocks(layers), strict=True)]

    def fuse(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Four maps -> the fused map after each of them, the coarsest first; the last one has all."""
        fused: list[Tensor] = []
        for block, image in zip(self.fusion_blocks, reversed(maps), strict=True):
            fused.append(block(fused[-1], image) if fused else block(image))
        return fused

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments that build this head again."""
        names = ("in_channels", "channels", "readout", "min_depth", "max_depth")
        return {name: getattr(self, name) for name in names} | {"post_channels": list(self.post_channels)}


class _Convolution(nn.Module):
    """A convolution that keeps the size, below the name `conv` as in the released files."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, *, bias: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class _Reassemble(nn.Module):
    """Tokens of four layers -> maps of four resolutions: 4, 2, 1 and 1/2 times (h, w)."""

    def __init__(self, width: int, post_channels: Sequence[int], readout: str) -> None:
        super().__init__()
        if readout not in READOUTS:
            raise ValueError(f"unknown readout {readout!r} of a DPT head; known: {', '.join(READOUTS)}")
        self.width, self.readout = width, readout
        self.projects = nn.ModuleList(_Convolution(width, channels, 1) for channels in post_channels)
        first, second, _, fourth = post_channels
        self.resize_layers = nn.ModuleList(
            [
                nn.ConvTranspose2d(first, first, kernel_size=4, stride=4),
                nn.ConvTranspose2d(second, second, kernel_size=2, stride=2),
                nn.Identity(),
                nn.Conv2d(fourth, fourth, kernel_size=3, stride=2, padding=1),
            ]
        )
        if readout == "project":
            self.readout_projects = nn.ModuleList(
                nn.Sequential(nn.Linear(2 * width, width), nn.GELU()) for _ in post_channels
            )

    def forward(self, layers: Sequence[Layer]) -> list[Tensor]:
        if len(layers) != NUM_LAYERS or any(patches.shape[1] != self.width for patches, _ in layers):
            widths = [patches.shape[1] for patches, _ in layers]
            raise ValueError(f"a DPT head reads {NUM_LAYERS} layers of width {self.width}, not of widths {widths}")
        maps = (self._with_class_token(index, *layer) for index, layer in enumerate(layers))
        stages = zip(self.projects, self.resize_layers, maps, strict=True)
        return [resized(project(image)) for project, resized, image in stages]

    def _with_class_token(self, index: int, patches: Tensor, class_token: Tensor) -> Tensor:
        if self.readout == "ignore":
            return patches
        if self.readout == "add":
            return patches + class_token[:, :, None, None]
        linear: Any = self.readout_projects[index]
        tokens = patches.flatten(2).transpose(1, 2)
        both = torch.cat([tokens, class_token[:, None].expand_as(tokens)], dim=-1)
        return linear(both).transpose(1, 2).unflatten(2, patches.shape[-2:])


class _ResidualUnit(nn.Module):
    """Two convolutions without bias, each after a ReLU, and the input added."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = _Convolution(channels, channels, 3, bias=False)
        self.conv2 = _Convolution(channels, channels, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(relu(self.conv1(relu(x))))


class _Fusion(nn.Module):
    """Add a finer map to the fused coarser ones, and double the resolution."""

    def __init__(self, channels: int, *, skip: bool) -> None:
        super().__init__()
        self.project = _Convolution(channels, channels, 1)
        if skip:
            self.res_conv_unit1 = _ResidualUnit(channels)
        self.res_conv_unit2 = _ResidualUnit(channels)

    def forward(self, x: Tensor, finer: Tensor | None = None) -> Tensor:
        if finer is not None:
            height, width = x.shape[-2:]
            x = x + self.res_conv_unit1(resize(finer, (height, width)).to(x.dtype))
        x = interpolate(self.res_conv_unit2(x), scale_factor=2, mode="bilinear", align_corners=True)
        return self.project(x)


class _Regression(nn.Module):
    """Maps (B, C, H, W) -> (B, 1, 2H, 2W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.head = nn.Sequential(
            nn.Conv2d(channels, channels // 2, kernel_size=3, padding=1),
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
            nn.Conv2d(channels // 2, LAST_CHANNELS, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(LAST_CHANNELS, 1, kernel_size=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)
