"""Random masks over the patch grid, as unions of rectangles (block-wise masking of BEiT, as iBOT uses it)."""

import math
import random

import numpy as np

_ATTEMPTS_PER_RECTANGLE = 10


class MaskingGenerator:
    """Draws masks of a given number of patches.

    Args:
        input_size: Patch grid, (height, width) or one side.
        num_masking_patches: Only a fallback for ``max_num_patches``.
        min_num_patches: Smallest area from which a rectangle is drawn, in patches.
        max_num_patches: Largest area of a rectangle. None: ``num_masking_patches``, or else half of the grid.
            Training uses :func:`published_max_num_patches`.
        min_aspect: Smallest height / width of a rectangle.
        max_aspect: Largest height / width; None: 1 / ``min_aspect``.
    """

    def __init__(
        self,
        input_size: int | tuple[int, int],
        num_masking_patches: int | None = None,
        min_num_patches: int = 4,
        max_num_patches: float | None = None,
        min_aspect: float = 0.3,
        max_aspect: float | None = None,
    ) -> None:
        self.height, self.width = (input_size, input_size) if isinstance(input_size, int) else input_size
        self.num_masking_patches = num_masking_patches
        self.min_num_patches = min_num_patches
        if max_num_patches is None:
            max_num_patches = num_masking_patches
        self.max_num_patches = self.height * self.width // 2 if max_num_patches is None else max_num_patches
        self.log_aspect = (math.log(min_aspect), math.log(max_aspect or 1 / min_aspect))

    def __repr__(self) -> str:
        return (
            f"MaskingGenerator({self.height} x {self.width}, rectangles of {self.min_num_patches} to "
            f"{self.max_num_patches:g} patches, log aspect {self.log_aspect[0]:.3f} to {self.log_aspect[1]:.3f})"
        )

    def get_shape(self) -> tuple[int, int]:
        """(height, width) of the grid."""
        return self.height, self.width

    def __call__(self, num_masking_patches: int = 0, *, rng: random.Random) -> np.ndarray:
        """Draws one mask, (height, width) bool, True where masked.

        At most ``num_masking_patches`` are masked: usually exactly as many, sometimes one or two fewer.
        """
        mask = np.zeros((self.height, self.width), dtype=bool)
        missing = num_masking_patches
        while missing > 0:
            added = self._add_rectangle(mask, min(missing, self.max_num_patches), rng)
            if added == 0:
                break
            missing -= added
        return mask

    def _add_rectangle(self, mask: np.ndarray, most: float, rng: random.Random) -> int:
        """Marks one rectangle that adds 1 to ``most`` patches; returns how many, 0 if every attempt failed."""
        for _ in range(_ATTEMPTS_PER_RECTANGLE):
            area = rng.uniform(self.min_num_patches, most)
            aspect = math.exp(rng.uniform(*self.log_aspect))
            height = round(math.sqrt(area * aspect))
            width = round(math.sqrt(area / aspect))
            if height >= self.height or width >= self.width:
                continue
            top = rng.randint(0, self.height - height)
            left = rng.randint(0, self.width - width)
            rectangle = mask[top : top + height, left : left + width]
            added = height * width - int(np.count_nonzero(rectangle))
            if 0 < added <= most:
                rectangle[:] = True
                return added
        return 0


def published_max_num_patches(img_size: int, patch_size: int) -> float:
    """Largest rectangle of the released training: about half of the grid, less where its side is odd.

    Half of the image is rounded down to whole patches before it is multiplied: 128 of 256 patches for 224/14, but 666
    of 1369 for 518/14. Kept because the published recipe trains with it.
    """
    return 0.5 * img_size // patch_size * img_size // patch_size
