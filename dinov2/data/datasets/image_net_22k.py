"""ImageNet-22k as one tarball per class, read through memory maps without unpacking."""

import gzip
import io
import logging
import mmap
import re
import tarfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dinov2.data.datasets.file_list import check_folder
from dinov2.data.datasets.index_files import INTEGERS, TEXT, ExtraFile, IndexedDataset

logger = logging.getLogger(__name__)

TAR_BLOCK = 512  # bytes; each member of a tarball is a header of one block, then data in whole blocks
END_OF_ARCHIVE = "** Block of NULs **"  # in the listing of tar
_FIELDS = {
    "class_index": INTEGERS,
    "class_id": TEXT,
    "start_offset": INTEGERS,
    "end_offset": INTEGERS,
    "filename": TEXT,
}
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)  # members with contiguous data
_MAX_EXPANSION = 100  # of a gzipped image; images hardly shrink, whereas zeros shrink a thousandfold
UNDECODABLE = {"n06470073_47249.JPEG"}


class ImageNet22k(IndexedDataset):
    """ImageNet-22k (all of ImageNet, 21841 classes).

    Expects one uncompressed tarball `<root>/<wnid>.tar` per class, and in `extra` the tables that `dump_extra`
    writes once. `root` and `extra` may be the same folder. Unpacked into folders, the same images are read by
    `ImageFolder`.

    Args:
        root, extra: Folders of the tarballs and of the tables.
        mmap_cache_size: Number of tarballs that stay memory-mapped.
        transforms, transform, target_transform: See `ImageDataset`.
    """

    def __init__(self, *, root: str | Path, extra: str | Path, mmap_cache_size: int = 16, **transforms: Any) -> None:
        super().__init__(**transforms)
        if mmap_cache_size < 1:
            raise ValueError(f"mmap_cache_size is {mmap_cache_size}, must be at least 1")
        self.root = Path(root)
        creation = (
            "from dinov2.data.datasets import ImageNet22k; "
            f"ImageNet22k(root={str(root)!r}, extra={str(extra)!r}).dump_extra()"
        )
        self._entries = ExtraFile(Path(extra, "entries.npy"), creation, _FIELDS)
        self._class_ids = ExtraFile(Path(extra, "class-ids.npy"), creation)
        self._mmap_cache_size = mmap_cache_size
        self._maps: OrderedDict[str, mmap.mmap] = OrderedDict()  # by class, least recently used first

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": OrderedDict()}  # a spawned worker opens its own

    def describe(self, index: int) -> str:
        """The tarball and the name of the image in it."""
        entry = self._entries.array[index]
        return f"{self._tarball(str(entry['class_id']))}: {entry['filename']}"

    def image_files(self) -> Iterator[str]:
        """The tarball of each image."""
        return (str(self._tarball(str(class_id))) for class_id in self._entries.array["class_id"])

    def get_image_data(self, index: int) -> bytes:
        """Returns an image file, with the zero padding of its last block in the tarball."""
        entry = self._entries.array[index]
        tarball = self._map(str(entry["class_id"]))
        start, end = int(entry["start_offset"]), int(entry["end_offset"])
        self._check_member(index, tarball, start, end)
        options = self.image_options
        if end - start > options.max_bytes:
            raise OSError(f"{end - start:,} bytes, limit {options.max_file_size:,} MiB (images.max_file_size)")
        data = tarball[start + TAR_BLOCK : end]
        return _unzipped(data, options.max_bytes) if data.startswith(b"\x1f\x8b") else data

    def _check_member(self, index: int, tarball: mmap.mmap, start: int, end: int) -> None:
        """Raise a `ValueError` if there is no regular file at exactly these bytes of a tarball."""
        size = end - start - TAR_BLOCK
        try:
            member = tarfile.TarInfo.frombuf(tarball[start : start + TAR_BLOCK], "utf-8", "surrogateescape")
            fits = member.type in _REGULAR and size - TAR_BLOCK < member.size <= size and end <= len(tarball)
        except (tarfile.TarError, ValueError, OverflowError):
            fits = False
        if not fits:
            raise self._entries.damaged(
                f"entry {index} is wrong: {self.describe(index)} is not at bytes {start} to {end}"
            )

    def get_class_ids(self) -> np.ndarray:
        """Returns the WordNet ids of the classes of all samples, (len(self),) unicode."""
        return np.array(self._entries.array["class_id"])

    def _tarball(self, class_id: str) -> Path:
        return self.root / f"{class_id}.tar"

    def _map(self, class_id: str) -> mmap.mmap:
        if class_id in self._maps:
            self._maps.move_to_end(class_id)
        else:
            if not self._tarball(class_id).is_file():
                raise FileNotFoundError(f"no tarball {self._tarball(class_id)}")
            with self._tarball(class_id).open("rb") as file:
                self._maps[class_id] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            if len(self._maps) > self._mmap_cache_size:
                self._maps.popitem(last=False)[1].close()
        return self._maps[class_id]

    def dump_extra(self) -> None:
        """Write the extra files.

        The offsets of the images come from `<root>/blocks/<wnid>.log`, the output of `tar --list --block-number`, or
        without it from the headers in the tarball. Class indices are those of the sorted tarballs.

        Raises:
            FileNotFoundError, ValueError: There are no tarballs, or a listing or a tarball is truncated or malformed.
        """
        check_folder(self.root)
        class_ids = sorted(path.stem for path in self.root.glob("*.tar") if path.is_file())
        if not class_ids:
            raise FileNotFoundError(f"no tarballs <wnid>.tar in {self.root}")
        parts = []
        for class_index, class_id in enumerate(class_ids):
            parts.append(self._list_class(class_index, class_id))
            if class_index % 100 == 0:
                logger.info("listing %s: %d of %d tarballs", self.root, class_index, len(class_ids))
        self._class_ids.save(np.array(class_ids))
        self._entries.save(np.concatenate(parts))  # as wide as the longest strings
        logger.info("wrote the extra files of %d classes to %s", len(class_ids), self._entries.path.parent)

    def _list_class(self, class_index: int, class_id: str) -> np.ndarray:
        """The table of the images in one tarball."""
        log = self.root / "blocks" / f"{class_id}.log"
        members = _members_in_log(log) if log.exists() else _members_in_tarball(self._tarball(class_id))
        # Folders and links are listed too, but have no data.
        rows = [
            (class_index, class_id, *member)
            for member in members
            if member[2] not in UNDECODABLE and member[1] - member[0] > TAR_BLOCK
        ]
        dtype = [
            ("class_index", "<u4"),
            ("class_id", f"<U{len(class_id)}"),
            ("start_offset", "<u8"),  # of the header block
            ("end_offset", "<u8"),  # of the last data block
            ("filename", f"<U{max((len(row[-1]) for row in rows), default=1)}"),
        ]
        return np.array(rows, dtype)


def _unzipped(data: bytes, max_bytes: int) -> bytes:
    """Decompress a gzip file, as which a few images are stored; zeros may follow it."""
    limit = min(max_bytes, 2**20 + _MAX_EXPANSION * len(data))
    with gzip.open(io.BytesIO(data)) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"{len(data):,} gzipped bytes expand to more than {limit:,}")
    return content


def _members_in_log(path: Path) -> Iterator[tuple[int, int, str]]:
    """Start, end and name of the members, from the lines `block <number>: <name>` of a listing."""
    lines = [re.fullmatch(r"block (\d{1,15}): (.*)", line) for line in path.read_text(encoding="utf-8").splitlines()]
    members = [(int(line[1]) * TAR_BLOCK, line[2]) for line in lines if line is not None]
    if len(members) < len(lines) or not members or members[-1][1] != END_OF_ARCHIVE:
        raise ValueError(f"{path} is not a complete listing by tar --list --block-number")
    for (start, name), (end, _) in zip(members, members[1:], strict=False):
        if end <= start:
            raise ValueError(f"{path} names block {end // TAR_BLOCK} after block {start // TAR_BLOCK}")
        yield start, end, name


def _members_in_tarball(path: Path) -> Iterator[tuple[int, int, str]]:
    """Start, end and name of the members, from the headers in a tarball."""
    try:
        with tarfile.open(path, "r:") as tarball:
            for member in tarball:
                if member.type in _REGULAR:
                    end = member.offset_data + -(-member.size // TAR_BLOCK) * TAR_BLOCK
                    yield member.offset_data - TAR_BLOCK, end, member.name
    except (tarfile.TarError, EOFError, OverflowError) as error:
        raise ValueError(f"cannot read the tarball {path}: {error}") from error
