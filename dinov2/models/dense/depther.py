"""Depth estimation: a backbone and a depth head, with the published method names.

Legend: B images of (H, W) pixels.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dinov2.models.dense.dense_model import DenseModel, image_size
from dinov2.models.dense.layers import Layer
from dinov2.models.dense.padding import Size
from dinov2.models.dense.sliding_window import slide

Metas = Sequence[Mapping[str, Any]] | None
"""What is known of each image of a batch; the entry `flip` is used, and `flip_direction` with it."""

INFERENCE_MODES = ("whole", "slide")
_FLIPPED_AXES = {"horizontal": -1, "vertical": -2}


class Depther(DenseModel):
    """Images to depth in meters; see `DenseModel` for the arguments. Released heads read tokens before the final norm.

    The range of depths is that of the head, `decode_head.min_depth` to `decode_head.max_depth`.
    """

    def forward(self, images: Tensor, size: Size | None = None) -> Tensor:
        """Images (B, 3, H, W) -> depth (B, 1, H, W) in meters, or of another `size` (height, width).

        The output of the head is clamped to the range of depths, then resized.
        """
        return self.to_image(self._clamped(images), image_size(images), size)

    def _clamped(self, images: Tensor) -> Tensor:
        head: Any = self.decode_head
        return head(self.features(images)).clamp(head.min_depth, head.max_depth)

    # --- The published interface -------------------------------------------------------------------------------------

    def extract_feat(self, img: Tensor) -> list[Layer]:
        """`features`, by its published name."""
        return self.features(img)

    def encode_decode(
        self, img: Tensor, img_metas: Metas = None, rescale: bool = True, size: Size | None = None
    ) -> Tensor:
        """Depth (B, 1, H, W) as `forward`, or with `rescale=False` on the grid of the head (and `size` is unused)."""
        return self(img, size) if rescale else self._clamped(img)

    def whole_inference(
        self, img: Tensor, img_meta: Metas = None, rescale: bool = True, size: Size | None = None
    ) -> Tensor:
        """Depth (B, 1, H, W) of whole images; see `encode_decode`."""
        return self.encode_decode(img, img_meta, rescale, size)

    def slide_inference(
        self,
        img: Tensor,
        img_meta: Metas = None,
        rescale: bool = True,
        stride: int | Size | None = None,
        crop_size: int | Size | None = None,
    ) -> Tensor:
        """Depth (B, 1, H, W), averaged over sliding windows.

        Args:
            img: Images (B, 3, H, W).
            img_meta: Unused.
            rescale: Must be true: windows overlap at the resolution of the image.
            stride: (height, width) in pixels or one number; by default two thirds of the window.
            crop_size: The window, likewise; by default a square of the shorter side.
        """
        if not rescale:
            raise ValueError("sliding windows give depth at the resolution of the image: rescale must be true")
        shorter = min(img.shape[-2:])
        window = (shorter, shorter) if crop_size is None else crop_size
        if stride is None:
            height, width = (window, window) if isinstance(window, int) else window
            stride = (max(2 * height // 3, 1), max(2 * width // 3, 1))
        return slide(self, img, window=window, stride=stride)

    def inference(
        self,
        img: Tensor,
        img_meta: Metas = None,
        rescale: bool = True,
        size: Size | None = None,
        mode: str = "whole",
        **windows: Any,
    ) -> Tensor:
        """Depth (B, 1, H, W), flipped back if `img_meta` says that images are flipped.

        Args:
            img: Images (B, 3, H, W).
            img_meta: See `Metas`. All images of a batch must be flipped the same way.
            rescale, size: See `encode_decode`. With sliding windows `size` must be None.
            mode: `whole`, or `slide` for sliding windows.
            windows: `stride` and `crop_size` of `slide_inference`.
        """
        if mode not in INFERENCE_MODES:
            raise ValueError(f"unknown mode of inference {mode!r}; known: {', '.join(INFERENCE_MODES)}")
        if windows and mode == "whole" or size is not None and mode == "slide":
            raise ValueError(f"mode={mode!r} has no {', '.join(windows) or 'size'}")
        slides = partial(self.slide_inference, img, img_meta, rescale, **windows)
        depth = slides() if mode == "slide" else self.whole_inference(img, img_meta, rescale, size)
        axis = _flipped_axis(img_meta)
        return depth if axis is None else depth.flip(axis)

    def simple_test(self, img: Tensor, img_meta: Metas = None, rescale: bool = True) -> list[Any]:
        """Depth of each image of a batch, as arrays (1, H, W); needs NumPy."""
        return list(self.inference(img, img_meta, rescale).detach().cpu().numpy())

    def aug_test(
        self, imgs: Sequence[Tensor], img_metas: Sequence[Metas] | None = None, rescale: bool = True
    ) -> list[Any]:
        """The mean depth of several versions of a batch, such as its mirror images, as arrays; needs NumPy.

        Args:
            imgs: Versions of the same B images, each (B, 3, H, W).
            img_metas: Which versions are flipped, see `inference`; None if none is.
            rescale: Must be true: the versions are averaged at the resolution of the images.
        """
        if not rescale:
            raise ValueError("several versions of an image are averaged at its resolution: rescale must be true")
        metas = [None] * len(imgs) if img_metas is None else img_metas
        if not len(metas) == len(imgs) > 0:
            raise ValueError(f"{len(imgs)} versions of the images with {len(metas)} img_metas: give one for each")
        depths = [self.inference(img, meta) for img, meta in zip(imgs, metas, strict=True)]
        return list(torch.stack(depths).mean(0).detach().cpu().numpy())


def _flipped_axis(metas: Metas) -> int | None:
    """The axis along which all images of a batch are flipped, if they are."""
    directions = {meta.get("flip_direction") or "horizontal" if meta.get("flip") else None for meta in metas or [{}]}
    if len(directions) != 1 or not directions <= {None, *_FLIPPED_AXES}:
        known = ", ".join(_FLIPPED_AXES)
        raise ValueError(f"images of a batch are flipped one way ({known}) or not at all, not {directions}")
    direction = directions.pop()
    return None if direction is None else _FLIPPED_AXES[direction]
