"""Small images of one color in tar archives."""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image


def image_bytes(level: int, form: str = "PNG") -> bytes:
    """The file of an image whose red has this level."""
    file = io.BytesIO()
    Image.new("RGB", (6, 5), (level, 0, 0)).save(file, form)
    return file.getvalue()


def write_tar(path: Path, files: Iterable[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> Path:
    """A tar archive of these files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as archive:
        for name, content in files:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def levels(dataset: Any) -> list[int]:
    """The red level of each image of a dataset."""
    return [dataset.get_image(index).getpixel((0, 0))[0] for index in range(len(dataset))]
