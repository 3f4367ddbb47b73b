"""What a segmenter and a depther share: a backbone, a head that reads some of its blocks, and padding to whole patches.

Legend: B images of (H, W) pixels, D width, (h, w) tokens.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from dinov2.models.dense.layers import Layer, resize
from dinov2.models.dense.padding import Size, center_cut, center_pad, padded_size
from dinov2.models.vision_transformer import DinoVisionTransformer


class DenseModel(nn.Module):
    """A backbone (`backbone.`) and a head (`decode_head.`) on the tokens of some of its blocks.

    Images are padded to whole patches by `center_pad`. The release then resizes the map of the padded image to the size
    of the image, so that the map is squeezed by up to a patch instead of cut. Released heads were trained and measured
    like that, hence it is the default.

    A frozen backbone (no parameter requires a gradient) stays in evaluation mode when the model is set to training.

    Args:
        backbone: The backbone.
        decode_head: Maps layers to maps (B, C, h', w').
        blocks: Indices of the blocks whose tokens the head reads, by increasing depth.
        norm: Whether the final norm of the backbone is applied to the tokens of each block.
        cut_padding: Cut the padding off instead, so that every pixel of the map lies on its pixel of the image.
    """

    def __init__(
        self,
        backbone: DinoVisionTransformer,
        decode_head: nn.Module,
        *,
        blocks: Sequence[int],
        norm: bool,
        cut_padding: bool = False,
    ) -> None:
        super().__init__()
        depth = len(backbone.blocks)
        if not blocks or list(blocks) != sorted(set(blocks)) or not 0 <= blocks[0] <= blocks[-1] < depth:
            raise ValueError(f"blocks must be increasing indices from 0 to {depth - 1}, not {list(blocks)}")
        self.backbone, self.decode_head = backbone, decode_head
        self.blocks, self.norm, self.cut_padding = tuple(blocks), norm, cut_padding

    def features(self, images: Tensor) -> list[Layer]:
        """Tokens of the blocks for images (B, 3, H, W) of any size: patch tokens (B, D, h, w), class tokens (B, D)."""
        if images.ndim != 4 or not images.is_floating_point():
            raise ValueError(f"images must be (B, 3, H, W) floats, not {tuple(images.shape)} {images.dtype}")
        padded = center_pad(images, self.backbone.patch_size)
        layers: Any = self.backbone.get_intermediate_layers(
            padded, n=self.blocks, reshape=True, return_class_token=True, norm=self.norm
        )
        return list(layers)

    def to_image(self, maps: Tensor, image_size: Size, size: Size | None = None) -> Tensor:
        """Resize the maps (B, C, h', w') of a head to the image of `image_size`, or to another `size`."""
        if not self.cut_padding:
            return resize(maps, size or image_size)
        multiple = self.backbone.patch_size
        maps = center_cut(resize(maps, padded_size(image_size, multiple)), image_size, multiple)
        return resize(maps, size or image_size)

    def train(self, mode: bool = True) -> "DenseModel":
        """Set the mode; that of a frozen backbone remains evaluation."""
        super().train(mode)
        if not any(parameter.requires_grad for parameter in self.backbone.parameters()):
            self.backbone.eval()
        return self


def image_size(images: Tensor) -> Size:
    """(height, width) of images (..., H, W) in pixels."""
    height, width = images.shape[-2:]
    return height, width
