"""Where inputs come from: image files, folders, globs, datasets, videos; read one by one, when they are needed."""

import glob
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from torch.utils.data import Dataset

from dinov2.data import make_dataset
from dinov2.data.datasets import DATASETS
from dinov2.data.datasets.base import ImageDataset
from dinov2.data.images import (
    DEFAULT_OPTIONS,
    BadImageError,
    ImageDecodeError,
    ImageOptions,
    decode_image,
    read_image_file,
)
from dinov2.data.images.survey import survey_images
from dinov2.visualization.video import Video, is_video

logger = logging.getLogger(__name__)

MOST_FRAMES = 100  # of a video whose frames are taken for images


class ImageInput(NamedTuple):
    """A item that is read when it is loaded."""

    name: str  # short, for captions
    path: str  # for messages and lists
    load: Callable[[], Image.Image]  # upright RGB; raises BadImageError


class LoadedImage(NamedTuple):
    """A item with its name."""

    name: str
    path: str
    image: Image.Image


def list_inputs(
    sources: Sequence[str], num_images: int | None = None, image_options: ImageOptions = DEFAULT_OPTIONS
) -> list[ImageInput]:
    """The inputs that people mean, in their order.

    Args:
        sources: image files, videos, folders, globs (`'holiday/*.jpg'`) and dataset strings.
        num_images: at most so many of each folder, glob, dataset and video, evenly spaced; None: all of them, of a
            video `MOST_FRAMES`, because they are held in memory.
        image_options: How image files are read; without a value range, one is measured on the files that are given one
            by one, on each glob, folder and dataset, where there are images of more than 8 bits.

    Raises:
        FileNotFoundError: a source is none of these, or has no images.
        ValueError: a wrong dataset string, or a video that cannot be read.
    """
    files = [path for path in (Path(source).expanduser() for source in sources) if path.is_file()]
    of_files = _measured([path for path in files if not is_video(path)], image_options)
    return [item for source in sources for item in _list_source(source, num_images, image_options, of_files)]


def load_images(inputs: Sequence[ImageInput]) -> Iterator[LoadedImage]:
    """The inputs that can be read; a warning names each of the others.

    Raises:
        ValueError: there was only one and it cannot be read, or none of them can.
    """
    num_bad = 0
    for item in inputs:
        try:
            image = item.load()
        except BadImageError as error:
            if len(inputs) == 1:
                raise ValueError(str(error)) from error
            logger.warning("left out: %s", error)
            num_bad += 1
            continue
        yield LoadedImage(item.name, item.path, image)
    if num_bad == len(inputs):
        raise no_readable_image(inputs)


def no_readable_image(inputs: Sequence[ImageInput]) -> ValueError:
    """The error when none of some images can be read, with the reason for the first."""
    reason = ""
    try:
        inputs[0].load()
    except BadImageError as error:
        reason = f"; the first: {error}"
    return ValueError(f"not one of {len(inputs)} images can be read{reason}")


class TransformedImages(Dataset[tuple[int, Any] | None]):
    """Images with their positions, transformed; None, and a warning, for one that cannot be read."""

    def __init__(self, inputs: Sequence[ImageInput], transform: Callable[[Image.Image], Any]) -> None:
        self.inputs, self.transform = inputs, transform

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[int, Any] | None:
        try:
            return index, self.transform(self.inputs[index].load())
        except BadImageError as error:
            logger.warning("left out: %s", error)
            return None


def _list_source(
    source: str, num_images: int | None, options: ImageOptions, of_files: ImageOptions
) -> list[ImageInput]:
    path = Path(source).expanduser()
    if path.is_file():
        return _video_frames(path, num_images) if is_video(path) else [_of_file(path, of_files)]
    if path.is_dir():
        source = f"ImageFolder:root={path}"
    if source.partition(":")[0] in DATASETS:
        return _spaced(_of_dataset(make_dataset(dataset_str=source, image_options=options)), num_images)
    if files := [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if Path(name).is_file()]:
        videos = [file for file in files if is_video(file)]
        image_files = [file for file in files if file not in videos]
        of_glob = _measured(image_files, options)
        images = [_of_file(file, of_glob) for file in image_files]
        return _spaced(images, num_images) + [frame for file in videos for frame in _video_frames(file, num_images)]
    if glob.has_magic(source):
        raise FileNotFoundError(f"no file matches {source!r}")
    raise FileNotFoundError(
        f"no such images: {source!r}; give image files, folders, globs, videos or dataset strings such as "
        "FashionMNIST:split=VAL"
    )


def _spaced(inputs: Sequence[ImageInput], num_images: int | None) -> list[ImageInput]:
    count = len(inputs) if num_images is None else min(num_images, len(inputs))
    return [inputs[position * len(inputs) // count] for position in range(count)]


def _measured(files: Sequence[Path], options: ImageOptions) -> ImageOptions:
    """The options with one value range for all of some files."""
    survey = survey_images(
        lambda index: read_image_file(files[index], options), lambda index: str(files[index]), len(files), options
    )
    return survey.options


def _of_file(path: Path, options: ImageOptions) -> ImageInput:
    return ImageInput(path.name, str(path), partial(_load_file, path, options))


def _load_file(path: Path, options: ImageOptions) -> Image.Image:
    try:
        return decode_image(read_image_file(path, options), options)
    except (OSError, ImageDecodeError) as error:
        raise BadImageError(f"cannot read the image {path}: {error}", path=str(path)) from error


def _of_dataset(dataset: ImageDataset) -> list[ImageInput]:
    """Samples whose description is a path are called by the name of the file."""
    paths = [dataset.describe(index) for index in range(len(dataset))]
    names = [Path(path).name if Path(path).suffix else f"image {index}" for index, path in enumerate(paths)]
    loaders = [partial(dataset.get_image, index) for index in range(len(dataset))]
    return [ImageInput(*parts) for parts in zip(names, paths, loaders, strict=True)]


def _video_frames(path: Path, num_images: int | None) -> list[ImageInput]:
    """Evenly spaced frames, held in memory: to come by one of them all before it must be decoded."""
    video, count = Video(path), num_images or MOST_FRAMES
    every = max(video.count_frames() // count, 1)
    frames = []
    for index, frame in enumerate(islice(video.frames(every=every), count)):
        seconds = float(index * every / video.rate)
        frames.append(ImageInput(f"{path.name}, {seconds:.1f} s", f"{path}, {seconds:.3f} s", frame.copy))
    return frames
