"""The linear segmentation head: batch normalization and a 1x1 convolution.

Legend: B images, (h, w) tokens, C classes.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from dinov2.models.dense.layers import Layer, concatenate


class SegmentationHead(nn.Module):
    """Logits of classes for every token, with the parameter names of the released heads: `bn.`, `conv_seg.`.

    To train it on several devices, `torch.nn.SyncBatchNorm.convert_sync_batchnorm` shares the statistics, as published.

    Args:
        in_channels: Number of channels of all layers together, class tokens included: L * D, or L * 2D.
        num_classes: Number of classes C.
        dropout: Rate at which whole channels are dropped in training.
        use_class_token: Whether the class token of a layer is concatenated to each of its patch tokens.
    """

    def __init__(
        self, in_channels: int, num_classes: int, *, dropout: float = 0.0, use_class_token: bool = False
    ) -> None:
        super().__init__()
        if in_channels < 1 or num_classes < 1:
            raise ValueError(f"a head needs channels and classes, not {in_channels} and {num_classes}")
        self.in_channels, self.num_classes, self.use_class_token = in_channels, num_classes, use_class_token
        self.dropout = nn.Dropout2d(dropout)
        self.bn = nn.BatchNorm2d(in_channels)
        self.conv_seg = nn.Conv2d(in_channels, num_classes, kernel_size=1)
        if not self.conv_seg.weight.is_meta:
            nn.init.normal_(self.conv_seg.weight, std=0.01)
            nn.init.zeros_(self.conv_seg.bias)  # type: ignore[arg-type]

    def forward(self, layers: Sequence[Layer]) -> Tensor:
        """Layers -> logits (B, C, h, w)."""
        features = concatenate(layers, class_token=self.use_class_token, channels=self.in_channels)
        return self.conv_seg(self.bn(self.dropout(features)))

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments that build this head again."""
        return {
            "in_channels": self.in_channels,
            "num_classes": self.num_classes,
            "dropout": self.dropout.p,
            "use_class_token": self.use_class_token,
        }
