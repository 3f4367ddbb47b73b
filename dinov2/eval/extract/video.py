"""Reading videos frame by frame, with PyAV (FFmpeg). Memory use does not depend on their length.

Shapes: frames are RGB, (height, width, 3) uint8.
"""

import importlib
from collections.abc import Container, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dinov2.data.images import ImageDecodeError, open_image, read_image_file

VIDEO_SUFFIXES = (".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")

_DEFAULT_RATE = Fraction(25)  # frames per second of files without a frame rate


def is_video(path: Path) -> bool:
    """Whether the suffix of a file is that of a video; a GIF is one if it has several frames."""
    if path.suffix.lower() == ".gif":
        try:
            return open_image(read_image_file(path)).has_more_frames
        except (OSError, ImageDecodeError):
            return False
    return path.suffix.lower() in VIDEO_SUFFIXES


class Video:
    """A video file.

    Attributes:
        path: The file.
        rate: Frames per second; the average if the rate varies.
        size: (width, height) of upright frames in pixels.
        expected_frames: Number of frames according to the header; 0 if it has none.

    Raises:
        ValueError: The file is not a video or is damaged, or the package `av` is missing.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"no video {self.path}")
        with self._open() as container:
            stream = container.streams.video[0]
            self.rate = Fraction(stream.average_rate or stream.guessed_rate or _DEFAULT_RATE)
            self.expected_frames: int = stream.frames or round(float((container.duration or 0) / 10**6 * self.rate))
        first = next(self.arrays(), None)
        if first is None:
            raise ValueError(f"the video {self.path} has no frames")
        self.size = (first.shape[1], first.shape[0])

    def count_frames(self) -> int:
        """Number of frames. If the header does not give it, all frames are decoded."""
        return self.expected_frames or sum(1 for _ in self.arrays())

    def times(self) -> Iterator[float]:
        """Iterate over the times in seconds at which frames are shown."""
        with self._open() as container:
            for index, frame in enumerate(_decoded(container)):
                yield float(index / self.rate) if frame.time is None else frame.time

    def arrays(
        self, size: tuple[int, int] | None = None, *, every: int = 1, wanted: Container[int] | None = None
    ) -> Iterator[np.ndarray]:
        """Iterate over upright frames (height, width, 3) uint8, resized to `size` (width, height).

        One of `every` frames is returned, of those whose index is in `wanted` (None: of all).
        """
        with self._open() as container:
            for index, frame in enumerate(_decoded(container)):
                if index % every or (wanted is not None and index not in wanted):
                    continue
                turns = frame.rotation // 90 % 4  # counterclockwise quarter turns, from the orientation of the camera
                width, height = (size if turns % 2 == 0 else size[::-1]) if size else (None, None)
                array = frame.reformat(width, height, "rgb24", interpolation="BICUBIC" if size else None).to_ndarray()
                yield np.ascontiguousarray(np.rot90(array, turns)) if turns else array

    def frames(self, *, every: int = 1) -> Iterator[Image.Image]:
        """Iterate over upright frames as images."""
        return map(Image.fromarray, self.arrays(every=every))

    @contextmanager
    def _open(self) -> Iterator[Any]:
        av = import_av()
        try:
            with av.open(str(self.path)) as container:
                if not container.streams.video:
                    types = ", ".join(stream.type for stream in container.streams)
                    raise ValueError(f"{self.path} has no video stream, only {types}")
                yield container
        except av.FFmpegError as error:
            raise ValueError(f"cannot read the video {self.path}: {error.strerror}") from error


def _decoded(container: Any) -> Iterator[Any]:
    """Decode the frames of an open video."""
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    return container.decode(stream)


def import_av() -> Any:
    """Import the optional package `av`; a `ValueError` with the command that installs it if it is missing or old."""
    try:
        av = importlib.import_module("av")
        importlib.import_module("av.filter")
    except ImportError as error:
        raise ValueError("videos need a package that is missing: pip install av") from error
    if not hasattr(av.VideoFrame, "rotation"):
        raise ValueError(
            f"videos need av 14.1 or newer, which reads the orientation of the camera, not {av.__version__}: "
            "pip install -U av"
        )
    # Logging is off by default and stays so: FFmpeg's threads would wait for Python's lock, and Python for them.
    return av
