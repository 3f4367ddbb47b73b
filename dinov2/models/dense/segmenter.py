"""Semantic segmentation: a backbone and a segmentation head.

Legend: B images of (H, W) pixels, C classes.
"""

from torch import Tensor

from dinov2.models.dense.dense_model import DenseModel, image_size
from dinov2.models.dense.padding import Size


class Segmenter(DenseModel):
    """Images to the logits of classes for every pixel; see `DenseModel` for the arguments.

    The released heads read tokens after the final norm (`norm=True`): of the last block, or of the last four (`+ms`).
    """

    def forward(self, images: Tensor, size: Size | None = None) -> Tensor:
        """Images (B, 3, H, W) -> logits (B, C, H, W), or of another `size` (height, width)."""
        return self.to_image(self.decode_head(self.features(images)), image_size(images), size)
