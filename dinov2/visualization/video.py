"""Videos in and out, frame by frame: memory holds a few frames, however long the video is. Needs PyAV (FFmpeg).

Shapes: frames are RGB, (height, width, 3) uint8.
"""

import importlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dinov2.data.images import ImageDecodeError, open_image, read_image_file
from dinov2.files import atomic_path

logger = logging.getLogger(__name__)

VIDEO_SUFFIXES = (".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")
WRITABLE_SUFFIXES = (".mp4", ".gif")

_USUAL_RATE = Fraction(25)  # frames per second of files that do not say
_FASTEST_GIF = Fraction(50)  # viewers slow down what is faster


def is_video(path: Path) -> bool:
    """Whether a file is one by its name; a GIF if it moves."""
    if path.suffix.lower() == ".gif":
        try:
            return open_image(read_image_file(path)).has_more_frames
        except (OSError, ImageDecodeError):
            return False
    return path.suffix.lower() in VIDEO_SUFFIXES


class Video:
    """A video file.

    Attributes:
        path: the file.
        rate: frames per second; of files with varying rates the average.
        size: (width, height) of upright frames.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no video, is damaged, or the package `av` is missing.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"no video {self.path}")
        with self._opened() as container:
            stream = container.streams.video[0]
            self.rate = Fraction(stream.average_rate or stream.guessed_rate or _USUAL_RATE)
            self._frames_said = stream.frames or round(float((container.duration or 0) / 10**6 * self.rate))
        first = next(self.arrays(), None)
        if first is None:
            raise ValueError(f"the video {self.path} has no frames")
        self.size = (first.shape[1], first.shape[0])

    def expected_frames(self) -> int:
        """How many frames there are by what the file says; 0 if it says nothing."""
        return self._frames_said

    def count_frames(self) -> int:
        """How many frames there are, decoding them all if the file does not say."""
        return self._frames_said or sum(1 for _ in self.arrays())

    def arrays(self, size: tuple[int, int] | None = None, *, every: int = 1) -> Iterator[np.ndarray]:
        """Upright frames (height, width, 3) uint8.

        Args:
            size: (width, height) to bring them to; None: as they are.
            every: only the first of so many.
        """
        with self._opened() as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            for index, frame in enumerate(container.decode(stream)):
                if index % every:
                    continue
                turns = frame.rotation // 90 % 4  # counterclockwise quarters; telephones film sideways
                given = {}
                if size is not None:
                    width, height = size if turns % 2 == 0 else size[::-1]
                    given = {"width": width, "height": height, "interpolation": "BICUBIC"}
                array = frame.reformat(format="rgb24", **given).to_ndarray()
                yield np.ascontiguousarray(np.rot90(array, turns)) if turns else array

    def frames(self, *, every: int = 1) -> Iterator[Image.Image]:
        """Upright frames as images."""
        return map(Image.fromarray, self.arrays(every=every))

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        av = import_av()
        try:
            with av.open(str(self.path)) as container:
                if not container.streams.video:
                    raise ValueError(f"{self.path} has no images, only {', '.join(s.type for s in container.streams)}")
                yield container
        except av.FFmpegError as error:
            raise ValueError(f"cannot read the video {self.path}: {error.strerror}") from error


@contextmanager
def writing_video(path: Path, rate: Fraction) -> Iterator[Callable[[np.ndarray], None]]:
    """A function that takes frames, all of one size, for a video that appears at `path` when it is whole.

    `.mp4` is H.264 as browsers play it, which needs an even width and height; `.gif` has 256 colors of its own in
    every frame, and shows at most 50 of them per second.

    Raises:
        ValueError: a name with another ending, or the package `av` is missing.
        OSError: the file cannot be written.
    """
    if path.suffix.lower() not in WRITABLE_SUFFIXES:
        raise ValueError(f"videos are written as {' or '.join(WRITABLE_SUFFIXES)}, not as {path.name!r}")
    av = import_av()
    try:
        with atomic_path(path) as temporary:
            writer = (_Gif if path.suffix.lower() == ".gif" else _Mp4)(av, temporary, rate)
            try:
                yield writer.add
                writer.close()
            finally:
                with suppress(av.FFmpegError, OSError):
                    writer.container.close()
    except av.FFmpegError as error:
        raise OSError(error.errno, f"cannot write the video: {error.strerror}", str(path)) from error


class _Mp4:
    def __init__(self, av: Any, path: Path, rate: Fraction) -> None:
        self.av, self.rate = av, rate
        self.stream: Any = None  # the first frame, which has a size, makes it
        self.container = av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"})  # plays as it loads

    def add(self, frame: np.ndarray) -> None:
        if self.stream is None:
            self.stream = self.container.add_stream("libx264", rate=self.rate, options={"crf": "18", "preset": "fast"})
            self.stream.height, self.stream.width = frame.shape[:2]
            self.stream.pix_fmt = "yuv420p"
        self._mux(self.av.VideoFrame.from_ndarray(frame, format="rgb24"))

    def close(self) -> None:
        if self.stream is not None:
            self._mux(None)
        self.container.close()

    def _mux(self, frame: Any) -> None:
        for packet in self.stream.encode(frame):
            self.container.mux(packet)


class _Gif(_Mp4):
    """Colors are chosen for each frame on its own, so that frames need not be kept."""

    def __init__(self, av: Any, path: Path, rate: Fraction) -> None:
        self.av, self.rate, self.count = av, min(rate, _FASTEST_GIF), 0
        self.stream: Any = None
        self.graph: Any = None
        self.container = av.open(str(path), "w", format="gif")

    def add(self, frame: np.ndarray) -> None:
        if self.stream is None:
            self.stream = self.container.add_stream("gif", rate=self.rate)
            self.stream.height, self.stream.width = frame.shape[:2]
            self.stream.pix_fmt = "pal8"
            self.graph = self._palette_graph(*frame.shape[:2])
        image = self.av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="rgb32")
        image.pts, image.time_base = self.count, 1 / self.rate
        self.count += 1
        self.graph.push(image)
        self._mux(self.graph.pull())

    def _palette_graph(self, height: int, width: int) -> Any:
        graph = self.av.filter.Graph()
        source = graph.add_buffer(width=width, height=height, format="rgb32", time_base=1 / self.rate)
        split, palette = graph.add("split"), graph.add("palettegen", "stats_mode=single")
        use, sink = graph.add("paletteuse", "new=1:dither=none"), graph.add("buffersink")
        source.link_to(split)
        split.link_to(use, 0, 0)
        split.link_to(palette, 1)
        palette.link_to(use, 0, 1)
        use.link_to(sink)
        graph.configure()
        return graph


def import_av() -> Any:
    """The module `av`, which only videos need.

    Raises:
        ValueError: if it is missing or too old, with the command that installs it.
    """
    try:
        av = importlib.import_module("av")
        importlib.import_module("av.filter")
    except ImportError as error:
        raise ValueError("videos need a package that is missing: pip install av") from error
    if not hasattr(av.VideoFrame, "rotation"):
        raise ValueError(
            f"videos need av 14.1 or newer, which knows how a camera was held, not {av.__version__}: pip install -U av"
        )
    # By default it keeps silent. Any log level would make its threads wait for Python's lock, and Python for them.
    return av
