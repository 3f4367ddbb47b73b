"""Colors of classes, (C, 3) uint8: the published ones where a dataset has them, else distinct ones."""

import colorsys

import numpy as np

_GOLDEN_RATIO = (5**0.5 - 1) / 2  # of a turn between the hues of successive classes
_TONES = ((0.75, 0.95), (1.0, 0.6), (0.4, 1.0), (0.55, 0.7))  # saturation and value in HSV, in turn


def voc_palette(num_classes: int) -> np.ndarray:
    """The palette of PASCAL VOC, up to 256 colors: bits 0, 3 and 6 of the index are the highest bits of red; the next
    ones in each of these series follow, bits 1, 4, 7 for green and 2, 5 for blue."""
    if not 0 <= num_classes <= 256:
        raise ValueError(f"the palette of VOC has 256 colors, not {num_classes}")
    index = np.arange(num_classes)
    palette = np.zeros((num_classes, 3), np.uint8)
    for bit in range(8):
        palette[:, bit % 3] |= ((index >> bit & 1) << (7 - bit // 3)).astype(np.uint8)
    return palette


def distinct_palette(num_classes: int) -> np.ndarray:
    """Colors that differ clearly between successive classes; those of the first classes do not depend on the number."""
    colors = [
        colorsys.hsv_to_rgb(index * _GOLDEN_RATIO % 1, *_TONES[index % len(_TONES)]) for index in range(num_classes)
    ]
    return np.rint(255 * np.array(colors).reshape(-1, 3)).astype(np.uint8)
