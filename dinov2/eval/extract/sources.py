"""Sources of images as one dataset: folders, files, globs, lists, dataset strings, videos, images in memory."""

import glob
import hashlib
import logging
import math
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from dinov2.data import make_dataset
from dinov2.data.datasets import DATASETS, ImageFolder, ImageList, parse_dataset_str
from dinov2.data.datasets.base import ImageDataset, ListedDataset
from dinov2.data.datasets.file_list import PathTable
from dinov2.data.datasets.pages import with_pages
from dinov2.data.images import EncodedImage, ImageOptions, encode_png
from dinov2.eval.extract.video import Video, import_av, is_video

logger = logging.getLogger(__name__)

LIST_SUFFIXES = (".csv", ".tsv", ".txt")


class ImageFiles(ListedDataset):
    """Some image files, in the given order, without labels."""

    def __init__(self, paths: Iterable[str | Path]) -> None:
        super().__init__()
        self.root, self.classes, self._targets = Path(), [], None
        self._images = PathTable.of(map(str, paths))

    def describe(self, index: int) -> str:
        return str(self._images[index])


class VideoFrames(ImageDataset):
    """Frames of a video in their order. Frames that are read in order are decoded once.

    Args:
        path: The video. All of it is decoded once here, because headers do not give the exact number of frames.
        fps: Frames per second that are used, the first of each interval of 1 / fps seconds; None: all.
    """

    def __init__(self, path: Path, fps: float | None = None) -> None:
        super().__init__()
        self.video = Video(path)
        self.frames = np.fromiter(sample_frames(self.video.times(), fps), np.int64)  # indices in the video
        logger.info("%s: %d frames are used", path, len(self.frames))
        self._frames: Iterator[np.ndarray] = iter(())
        self._next = len(self.frames)  # position of the next frame of this iterator

    def __len__(self) -> int:
        return len(self.frames)

    def __getstate__(self) -> dict[str, Any]:
        """The state without the open video, for worker processes."""
        return self.__dict__ | {"_frames": iter(()), "_next": len(self.frames)}

    def open_image(self, index: int) -> EncodedImage:
        if index < self._next:
            self._frames, self._next = self.video.arrays(wanted=set(self.frames.tolist())), 0
        for pixels in self._frames:
            self._next += 1
            if self._next > index:
                return EncodedImage(Image.fromarray(pixels))
        raise ValueError(f"the video {self.video.path} has changed: it ends before frame {self.frames[index]}")

    def get_image_data(self, index: int) -> bytes:
        return encode_png(self.open_image(index).pixels())

    def get_target(self, index: int) -> None:
        return None

    def describe(self, index: int) -> str:
        return f"{self.video.path}#{self.frames[index]}"


def sample_frames(times: Iterable[float], fps: float | None) -> Iterator[int]:
    """Indices of the frames to use, of all with times in seconds: the first in each interval of 1 / fps seconds."""
    first, last = math.nan, -1
    for index, time in enumerate(times):
        first = time if index == 0 else first
        interval = index if fps is None else math.floor((time - first) * fps + 1e-6)
        if interval > last:
            last = interval
            yield index


class MemoryImages(ImageDataset):
    """Images in memory: PIL images, or tensors (3, H, W) that are the input of the model."""

    def __init__(self, images: Sequence[Image.Image] | Tensor) -> None:
        super().__init__()
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def get_image(self, index: int) -> Any:
        image = self.images[index]
        return image if isinstance(image, Tensor) else image.convert("RGB")

    def get_image_data(self, index: int) -> bytes:
        return encode_png(np.asarray(self.get_image(index)))

    def get_target(self, index: int) -> None:
        return None

    def describe(self, index: int) -> str:
        return f"image {index}"

    def digest(self) -> str:
        """SHA-256 of the pixels."""
        digest = hashlib.sha256()
        for index in range(len(self)):
            pixels = np.ascontiguousarray(self.get_image(index))
            digest.update(f"{pixels.shape} {pixels.dtype}".encode() + pixels.tobytes())
        return digest.hexdigest()


class Concatenated(ImageDataset):
    """The images of several datasets, one after the other; without labels, whose meanings may differ."""

    def __init__(self, parts: Sequence[ImageDataset]) -> None:
        super().__init__()
        self.parts, self.ends = parts, list(accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self.ends[-1]

    def open_image(self, index: int) -> EncodedImage:
        part, position = self._find(index)
        return part.open_image(position)

    def get_image_data(self, index: int) -> bytes:
        part, position = self._find(index)
        return part.get_image_data(position)

    def get_target(self, index: int) -> None:
        return None

    def describe(self, index: int) -> str:
        part, position = self._find(index)
        return part.describe(position)

    def _find(self, index: int) -> tuple[ImageDataset, int]:
        number = bisect_right(self.ends, index)
        return self.parts[number], index - (self.ends[number - 1] if number else 0)


def parts_of(dataset: ImageDataset) -> Sequence[ImageDataset]:
    """The datasets that a dataset consists of."""
    return dataset.parts if isinstance(dataset, Concatenated) else [dataset]


# --- From text -------------------------------------------------------------------------------------------------------


def check_sources(items: Sequence[str]) -> None:
    """Raise an error for a source that is missing or misspelled, without reading any; see `open_sources`."""
    if not items:
        raise ValueError("no images given (--images)")
    for item in items:
        path = Path(item).expanduser()
        if path.is_file() and is_video(path):
            import_av()
        if path.exists():
            continue
        if item.partition(":")[0] in DATASETS:
            _, arguments = parse_dataset_str(item)
            paths = [os.path.expanduser(arguments[key]) for key in ("root", "extra", "file") if key in arguments]
            if not all(map(os.path.exists, paths)):
                make_dataset(dataset_str=item)  # raises the error that names a remedy
        elif not glob.has_magic(item):
            raise FileNotFoundError(
                f"no such images: {item!r}; give a folder, image files, a glob in quotes, a list of images "
                f"({', '.join(LIST_SUFFIXES)}), a video, or a dataset string of {', '.join(DATASETS)}"
            )
        elif not next(glob.iglob(str(path), recursive=True), None):
            raise FileNotFoundError(f"no file matches {item!r}")


def open_sources(items: Sequence[str], options: ImageOptions, fps: float | None = None) -> ImageDataset:
    """Open the images of some sources as one dataset, in order.

    Args:
        items: Folders (all images below them, in the order of their paths), image files, globs, lists of images (see
            `ImageList`), dataset strings, videos.
        options: How image files are decoded.
        fps: Frames per second that are used of videos; None: all.
    """
    parts: list[ImageDataset] = []
    files: list[str] = []
    for item in items:
        path = Path(item).expanduser()
        is_item = path.exists() or item.partition(":")[0] in DATASETS
        for each in [item] if is_item else sorted(glob.glob(str(path), recursive=True)):
            if (part := _open(each, options, fps)) is None:
                files.append(str(Path(each).expanduser()))
                continue
            parts += _opened_files(files, options) + [part]
            files = []
    parts += _opened_files(files, options)
    dataset = parts[0] if len(parts) == 1 else Concatenated(parts)
    if len(dataset) == 0:
        raise ValueError(f"no images in {' '.join(items)}")
    return dataset


def _open(item: str, options: ImageOptions, fps: float | None) -> ImageDataset | None:
    """Open a source as a dataset; None for a single image file."""
    path = Path(item).expanduser()
    if path.is_dir():
        return _opened(ImageFolder(root=path), options)
    if not path.exists():
        dataset: ImageDataset = make_dataset(dataset_str=item, image_options=options)
        return dataset
    if path.suffix.lower() in LIST_SUFFIXES:
        return _opened(ImageList(file=path), options)
    return VideoFrames(path, fps) if is_video(path) else None


def _opened_files(files: Sequence[str], options: ImageOptions) -> list[ImageDataset]:
    return [_opened(ImageFiles(files), options)] if files else []


def _opened(dataset: ImageDataset, options: ImageOptions) -> ImageDataset:
    """Set how images are decoded, and log what `make_dataset` does."""
    dataset.image_options = options
    dataset = with_pages(dataset)
    for level, note in dataset.notes():
        logger.log(level, "%s", note)
    return dataset
