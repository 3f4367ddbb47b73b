"""Input images: files, folders, globs, datasets and videos. Images are decoded one at a time, on demand."""

import glob
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch.utils.data import Dataset

from dinov2.data import make_dataset
from dinov2.data.datasets import DATASETS
from dinov2.data.datasets.base import ImageDataset
from dinov2.data.images import (
    DEFAULT_OPTIONS,
    AnyImage,
    BadImageError,
    ImageDecodeError,
    ImageOptions,
    decode_image,
    read_image_file,
)
from dinov2.data.images.survey import survey_images
from dinov2.eval.extract.video import Video, is_video
from dinov2.eval.results import counted

logger = logging.getLogger(__name__)

MAX_FRAMES = 100  # frames that are taken from a video by default


class LoadedImage(NamedTuple):
    """A decoded image with its name."""

    name: str
    path: str
    image: AnyImage


class ImageInput(NamedTuple):
    """An image that is decoded on demand."""

    name: str  # short, for captions
    path: str  # for messages and lists
    decode: Callable[[], AnyImage]  # returns an upright image, or raises BadImageError

    def load(self) -> LoadedImage:
        """Decode the image; a `BadImageError` if it cannot be read."""
        return LoadedImage(self.name, self.path, self.decode())


def list_inputs(
    inputs: Sequence[str], num_images: int | None = None, image_options: ImageOptions = DEFAULT_OPTIONS
) -> list[ImageInput]:
    """List the images of some inputs, in order.

    Args:
        inputs: Image files, videos, folders, globs (`'holiday/*.jpg'`) and dataset strings.
        num_images: Maximum number of images of each folder, glob, dataset and video, evenly spaced. None: all, but
            `MAX_FRAMES` of a video, because its frames are kept in memory.
        image_options: How image files are decoded. Without a value range, one is measured if there are images of more
            than 8 bits: one for all single files, and one for each glob, folder and dataset.
    """
    files = [path for path in (Path(item).expanduser() for item in inputs) if path.is_file()]
    file_options = _with_value_range([path for path in files if not is_video(path)], image_options)
    return [image for item in inputs for image in _list_input(item, num_images, image_options, file_options)]


def load_images(inputs: Sequence[ImageInput]) -> Iterator[LoadedImage]:
    """Decode images. One that cannot be read is left out, with a warning; a `ValueError` if none can."""
    num_bad = 0
    for item in inputs:
        try:
            yield item.load()
        except BadImageError as error:
            if len(inputs) == 1:
                raise ValueError(str(error)) from error
            logger.warning("left out: %s", error)
            num_bad += 1
    if num_bad == len(inputs):
        raise no_readable_image(inputs)


def no_readable_image(inputs: Sequence[ImageInput]) -> ValueError:
    """The error for images of which none can be read, with the reason for the first."""
    reason = ""
    try:
        inputs[0].decode()
    except BadImageError as error:
        reason = f"; the first: {error}"
    return ValueError(f"none of {counted(len(inputs), 'image')} can be read{reason}")


class TransformedImages(Dataset[tuple[int, Any] | None]):
    """Indices of images and the transformed images; None, with a warning, for an image that cannot be read."""

    def __init__(self, inputs: Sequence[ImageInput], transform: Callable[[AnyImage], Any]) -> None:
        self.inputs, self.transform = inputs, transform

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[int, Any] | None:
        try:
            return index, self.transform(self.inputs[index].decode())
        except BadImageError as error:
            logger.warning("left out: %s", error)
            return None


def _list_input(
    text: str, num_images: int | None, options: ImageOptions, file_options: ImageOptions
) -> list[ImageInput]:
    """The images of one input; `file_options` are for a single file."""
    path = Path(text).expanduser()
    if path.is_file():
        return _video_frames(path, num_images) if is_video(path) else [_file_input(path, file_options)]
    if path.is_dir():
        text = f"ImageFolder:root={path}"
    if text.partition(":")[0] in DATASETS:
        return _spaced(_dataset_inputs(make_dataset(dataset_str=text, image_options=options)), num_images)
    if files := [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if Path(name).is_file()]:
        videos = [file for file in files if is_video(file)]
        image_files = [file for file in files if file not in videos]
        glob_options = _with_value_range(image_files, options)
        images = _spaced([_file_input(file, glob_options) for file in image_files], num_images)
        return images + [frame for video in videos for frame in _video_frames(video, num_images)]
    if glob.has_magic(text):
        raise FileNotFoundError(f"no file matches {text!r}")
    raise FileNotFoundError(
        f"no such images: {text!r}; give image files, folders, globs, videos or dataset strings such as "
        "FashionMNIST:split=VAL"
    )


def _spaced(images: Sequence[ImageInput], num_images: int | None) -> list[ImageInput]:
    count = len(images) if num_images is None else min(num_images, len(images))
    if count < len(images):
        logger.info(
            "%d of %d images are used, evenly spaced (--num-images, for queries --num-queries)", count, len(images)
        )
    return [images[position * len(images) // count] for position in range(count)]


def _with_value_range(files: Sequence[Path], options: ImageOptions) -> ImageOptions:
    """The options with one value range for all files."""
    return survey_images(
        lambda index: read_image_file(files[index], options), lambda index: str(files[index]), len(files), options
    ).options


def _file_input(path: Path, options: ImageOptions) -> ImageInput:
    return ImageInput(path.name, str(path), partial(_decode_file, path, options))


def _decode_file(path: Path, options: ImageOptions) -> AnyImage:
    try:
        return decode_image(read_image_file(path, options), options)
    except (OSError, ImageDecodeError) as error:
        raise BadImageError(f"cannot read the image {path}: {error}", path=str(path)) from error


def _dataset_inputs(dataset: ImageDataset) -> list[ImageInput]:
    """The samples of a dataset, named by their files if they have some, otherwise by their index."""
    paths = [dataset.describe(index) for index in range(len(dataset))]
    names = [Path(path).name if Path(path).suffix else f"image {index}" for index, path in enumerate(paths)]
    return [ImageInput(*each, partial(dataset.get_image, i)) for i, each in enumerate(zip(names, paths, strict=True))]


def _video_frames(path: Path, num_images: int | None) -> list[ImageInput]:
    """Evenly spaced frames, decoded at once: a video can only be decoded from its start."""
    video, count = Video(path), num_images or MAX_FRAMES
    every = max(video.count_frames() // count, 1)
    seconds = (float(index * every / video.rate) for index in range(count))
    timed = zip(seconds, video.frames(every=every), strict=False)
    return [ImageInput(f"{path.name}, {at:.1f} s", f"{path}, {at:.3f} s", frame.copy) for at, frame in timed]
