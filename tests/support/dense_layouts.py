"""Small datasets with maps in the layouts of the real ones, and the files they consist of."""

import numpy as np
from PIL import Image


def save_image(path, height=6, width=8, seed=0, exif=None):
    """Write a JPEG file (whatever its name) of random smooth colors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    options = {} if exif is None else {"exif": exif}
    Image.fromarray(pixels).save(path, "PNG" if path.suffix == ".png" else "JPEG", **options)


def save_map(path, values, mode=None):
    """Write integers as a PNG or TIFF file: 8 bits (or a palette with mode "P"), or 16 bits for uint16."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(values))
    if mode == "P":
        image.putpalette([level for index in range(256) for level in (index, 255 - index, 7)])
    image.save(path)


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def labels(*values, height=6, width=8):
    """A map (height, width) uint8 with the given values in its first pixels, the first of them elsewhere."""
    result = np.full((height, width), values[0], np.uint8)
    result.reshape(-1)[: len(values)] = values
    return result
