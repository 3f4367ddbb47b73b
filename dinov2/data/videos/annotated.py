"""Videos as folders of frames, with a label map per frame, in the layout of DAVIS 2017.

root/JPEGImages/480p/SEQUENCE/00000.jpg
root/Annotations/480p/SEQUENCE/00000.png    palette images: 0 background, 1.. objects, 255 not scored
root/ImageSets/2017/val.txt                 names of sequences; a plain folder needs none
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from dinov2.data.datasets.file_list import IMAGE_SUFFIXES

VOID = 255  # label of pixels that are not scored
RESOLUTION = "480p"
MIN_FRAMES = 3  # the first and the last one are not scored


class AnnotatedVideo(NamedTuple):
    """A sequence of frames and their label maps, T files each."""

    name: str
    frames: Sequence[Path]
    annotations: Sequence[Path]


class VideoSet(NamedTuple):
    """The videos of a dataset."""

    videos: Sequence[AnnotatedVideo]

    @property
    def num_frames(self) -> int:
        return sum(len(video.frames) for video in self.videos)


def read_videos(*, root: str, split: str | None, resolution: str = RESOLUTION) -> VideoSet:
    """List the videos below a folder in the layout of DAVIS 2017.

    Args:
        root: The folder.
        split: Which list of names to read, "TRAIN" or "VAL"; None for all sequences.
        resolution: Name of the folders of frames and annotations, such as "480p" or "Full-Resolution".

    Raises:
        FileNotFoundError: A folder, a list, an annotation, or the frame of an annotation is missing.
        ValueError: There is no sequence, or one is too short.
    """
    images, annotations = (Path(root) / kind / resolution for kind in ("JPEGImages", "Annotations"))
    for folder in (images, annotations):
        if not folder.is_dir():
            raise FileNotFoundError(f"no folder {folder}; expected JPEGImages and Annotations with {resolution} in it")
    if split is None:
        names = sorted(path.name for path in annotations.iterdir() if path.is_dir())
    else:
        list_file = Path(root) / "ImageSets" / "2017" / f"{split.lower()}.txt"
        names = [line.strip() for line in list_file.read_text().splitlines() if line.strip()]
    if not names:
        raise ValueError(f"{root} has no sequence" + ("" if split is None else f" in the split {split}"))
    return VideoSet([_video(name, images / name, annotations / name) for name in names])


def _video(name: str, images: Path, annotations: Path) -> AnnotatedVideo:
    if not images.is_dir():
        raise FileNotFoundError(f"no folder {images} with the frames of {name}")
    frames = sorted(path for path in images.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    if len(frames) < MIN_FRAMES:
        raise ValueError(f"{images} has {len(frames)} frames; at least {MIN_FRAMES} are needed")
    labels = [annotations / f"{frame.stem}.png" for frame in frames]
    missing = [path for path in labels if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"no annotation {missing[0]}: {len(missing)} of {len(frames)} frames of {name} have none. The objects of "
            "the first frame are tracked, but scores need the annotations of all frames"
        )
    surplus = sorted(set(annotations.glob("*.png")) - set(labels))
    if surplus:
        raise FileNotFoundError(
            f"no frame {images / surplus[0].stem}.* for the annotation {surplus[0]}: {len(surplus)} annotations of "
            f"{name} have none. Add the frames or remove these annotations, so that it is clear which frames are scored"
        )
    return AnnotatedVideo(name, frames, labels)


def read_labels(path: Path) -> np.ndarray:
    """Read a label map: a palette or gray image -> (H, W) uint8. Another kind of image is a ValueError."""
    with Image.open(path) as image:
        if image.mode not in ("P", "L", "1"):
            raise ValueError(
                f"{path} is an image of mode {image.mode}, not a palette image of labels: save an array of labels with "
                "Pillow's mode P (or L), a number per pixel instead of a color"
            )
        return np.array(image, dtype=np.uint8)


def read_palette(path: Path) -> list[int]:
    """The palette of a label map, 256 colors (R, G, B, R, G, B, ...), or that of DAVIS for a gray image."""
    with Image.open(path) as image:
        found = image.getpalette() if image.mode == "P" else None
    default = default_palette()
    return default if found is None else [*found, *default[len(found) :]]


def default_palette() -> list[int]:
    """The colors of PASCAL VOC and DAVIS: three bits of the label at a time, one for each of red, green and blue."""
    colors = []
    for label in range(256):
        bits = [[label >> (3 * place + channel) & 1 for place in range(3)] for channel in range(3)]
        colors += [sum(bit << (7 - place) for place, bit in enumerate(channel)) for channel in bits]
    return colors
