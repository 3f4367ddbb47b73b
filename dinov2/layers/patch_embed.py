"""Embedding of image patches."""

from collections.abc import Callable

from torch import Tensor, nn


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


class PatchEmbed(nn.Module):
    """Linear embedding of patches, as a convolution whose stride equals its kernel size.

    Args:
        img_size: Side, or height and width, of images in pixels; determines `num_patches`.
        patch_size: Side, or height and width, of a patch in pixels.
        norm_layer: Normalization of D channels; None: no normalization.
        flatten_embedding: Whether to flatten the grid; otherwise the output is (B, H/p, W/p, D).
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        norm_layer: Callable[[int], nn.Module] | None = None,
        flatten_embedding: bool = True,
    ) -> None:
        super().__init__()
        self.img_size = _pair(img_size)
        self.patch_size = _pair(patch_size)
        self.patches_resolution = (self.img_size[0] // self.patch_size[0], self.img_size[1] // self.patch_size[1])
        self.num_patches = self.patches_resolution[0] * self.patches_resolution[1]
        self.in_chans = in_chans
        self.embed_dim = embed_dim
        self.flatten_embedding = flatten_embedding
        self.proj: nn.Module = nn.Conv2d(in_chans, embed_dim, kernel_size=self.patch_size, stride=self.patch_size)
        self.norm = norm_layer(embed_dim) if norm_layer else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Embed patches in row-major order: (B, C, H, W), sides multiples of the patch size -> (B, H/p * W/p, D)."""
        self._check(x)
        x = self.norm(self.proj(x).permute(0, 2, 3, 1))  # (B, H/p, W/p, D)
        return x.flatten(1, 2) if self.flatten_embedding else x

    def _check(self, images: Tensor) -> None:
        if not isinstance(images, Tensor):
            raise ValueError(f"images are a tensor (B, {self.in_chans}, H, W), not {type(images).__name__}")
        if images.ndim != 4:
            hint = "; one image needs a batch dimension: image.unsqueeze(0)" if images.ndim == 3 else ""
            raise ValueError(f"images are (B, {self.in_chans}, H, W), not {tuple(images.shape)}{hint}")
        # User code may replace the projection by one of other channels, or by a module that takes any.
        channels = self.proj.in_channels if isinstance(self.proj, nn.Conv2d) else images.shape[1]
        if images.shape[1] != channels:
            raise ValueError(
                f"images {tuple(images.shape)} have {images.shape[1]} channels, but this model takes {channels}: "
                f"(B, {channels}, H, W)"
            )
        if not images.is_floating_point():
            raise ValueError(f"images are floating-point numbers after normalization, not {images.dtype}")
        for side, size, patch in zip(("height", "width"), images.shape[-2:], self.patch_size, strict=True):
            if size % patch:
                raise ValueError(f"input image {side} {size} is not a multiple of patch {side} {patch}")
