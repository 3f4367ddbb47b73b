"""Writing videos frame by frame, with PyAV (FFmpeg). Memory use does not depend on their length.

Shapes: frames are RGB, (height, width, 3) uint8.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from dinov2.eval.extract.video import import_av
from dinov2.files import atomic_write
from dinov2.flags.visualization import WRITABLE_SUFFIXES

_MAX_GIF_RATE = Fraction(50)  # viewers slow down faster ones


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
