"""Reading and writing videos frame by frame, with PyAV (FFmpeg). Memory use does not depend on their length.

Shapes: frames are RGB, (height, width, 3) uint8.
"""

import importlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dinov2.data.images import ImageDecodeError, open_image, read_image_file
from dinov2.files import atomic_write
from dinov2.flags.visualization import WRITABLE_SUFFIXES

logger = logging.getLogger(__name__)

VIDEO_SUFFIXES = (".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")

_DEFAULT_RATE = Fraction(25)  # frames per second of files without a frame rate
_MAX_GIF_RATE = Fraction(50)  # viewers slow down faster ones


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

    def arrays(self, size: tuple[int, int] | None = None, *, every: int = 1) -> Iterator[np.ndarray]:
        """Iterate over upright frames (height, width, 3) uint8: one of `every`, resized to `size` (width, height)."""
        with self._open() as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            for index, frame in enumerate(container.decode(stream)):
                if index % every:
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


@contextmanager
def writing_video(path: Path, rate: Fraction) -> Iterator[Callable[[np.ndarray], None]]:
    """Write a video with a function that appends frames, all of one size. An existing file is replaced at the end.

    `.mp4` is H.264 as browsers play it, which needs an even width and height. `.gif` has a palette of 256 colors for
    every frame, and at most 50 frames per second.

    Raises:
        ValueError: The suffix of `path` is another, or the package `av` is missing.
        OSError: The file cannot be written.
    """
    if path.suffix.lower() not in WRITABLE_SUFFIXES:
        raise ValueError(f"videos are written as {' or '.join(WRITABLE_SUFFIXES)}, not as {path.name!r}")
    av, is_gif = import_av(), path.suffix.lower() == ".gif"
    rate = min(rate, _MAX_GIF_RATE) if is_gif else rate
    options = {} if is_gif else {"movflags": "+faststart"}  # playback can begin before the file is loaded
    stream, graph, count = None, None, 0

    def add(array: np.ndarray | None) -> None:
        nonlocal stream, graph, count
        frame = None if array is None else av.VideoFrame.from_ndarray(array, format="rgb24")
        if stream is None and frame:  # the first frame gives the size
            stream = container.add_stream("gif" if is_gif else "libx264", rate=rate)
            stream.width, stream.height, stream.pix_fmt = frame.width, frame.height, "pal8" if is_gif else "yuv420p"
            stream.options = {} if is_gif else {"crf": "18", "preset": "fast"}
            graph = _palette_graph(av, frame, rate) if is_gif else None
        if graph and frame:
            frame = frame.reformat(format="rgb32")
            frame.pts, frame.time_base = count, 1 / rate
            graph.push(frame)
            frame, count = graph.pull(), count + 1
        if stream:
            container.mux(stream.encode(frame))

    with atomic_write(path) as file:
        try:
            with av.open(str(file.name), "w", format=path.suffix.lower()[1:], options=options) as container:
                yield add
                add(None)  # flushes the encoder
        except av.FFmpegError as error:
            raise OSError(error.errno, f"cannot write the video: {error.strerror}", str(path)) from error


def _palette_graph(av: Any, frame: Any, rate: Fraction) -> Any:
    """A filter graph that reduces every frame to a palette of its own, so that no frames are kept."""
    graph = av.filter.Graph()
    source = graph.add_buffer(width=frame.width, height=frame.height, format="rgb32", time_base=1 / rate)
    split, palette = graph.add("split"), graph.add("palettegen", "stats_mode=single")
    use, sink = graph.add("paletteuse", "new=1:dither=none"), graph.add("buffersink")
    graph.link_nodes(source, split, use, sink)
    split.link_to(palette, 1)
    palette.link_to(use, 0, 1)
    graph.configure()
    return graph


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
