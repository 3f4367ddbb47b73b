"""Images and maps that belong together: by the names of their files, or by a list."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

_MOST_NAMED = 3  # missing files in a message
_MAX_SEARCHED = 20_000  # files that are looked at for one of another name
_JPEG_ENDINGS = (".jpg", ".jpeg")


class Pairs(NamedTuple):
    """Files that belong together, relative to one folder."""

    images: list[str]
    maps: list[str]
    notes: list[str]  # on files that are not used


class FolderNames:
    """Names of the files in folders, each of which is read once: far fewer accesses to a disk than one per file."""

    def __init__(self) -> None:
        self._names: dict[str, frozenset[str]] = {}

    def of(self, folder: str) -> frozenset[str]:
        """The names in a folder; none if there is no such folder."""
        if folder not in self._names:
            try:
                self._names[folder] = frozenset(os.listdir(folder))
            except (FileNotFoundError, NotADirectoryError):
                self._names[folder] = frozenset()
        return self._names[folder]

    def has(self, path: str) -> bool:
        folder, name = os.path.split(path)
        return name in self.of(folder)

    def unused(self, used: Sequence[str], endings: Sequence[str]) -> Iterator[str]:
        """Paths of the files in all folders read so far that have one of the endings and are not among ``used``."""
        known = set(used)
        for folder, names in self._names.items():
            for name in sorted(names):
                if name.endswith(tuple(endings)) and (path := os.path.join(folder, name)) not in known:
                    yield path


def without_suffix(name: str) -> str:
    return os.path.splitext(name)[0]


def pair_by_name(
    root: Path,
    images: Sequence[str],
    *,
    image_folder: str,
    map_folder: str,
    endings: Sequence[str],
    stem: Callable[[str], str] = without_suffix,
) -> Pairs:
    """Find the map of each image: the file of the same name in another folder, with one of several endings.

    Args:
        root: Folder that the results are relative to.
        images: Paths relative to `root/image_folder`.
        image_folder, map_folder: Folders of images and maps, relative to `root`.
        endings: Ends of the names of maps, such as ".png", after the stem of the image.
        stem: Path of an image -> what its path has in common with that of its map.

    Raises:
        FileNotFoundError: An image has no map; names some of them.
        ValueError: An image has two maps, or two images have the same one.
    """
    names = FolderNames()
    maps: list[str] = []
    missing: list[str] = []
    stems: list[str] = []  # of the images without a map
    owners: dict[str, str] = {}
    for image in images:
        candidates = [os.path.join(map_folder, stem(image) + ending) for ending in endings]
        found = [path for path in candidates if names.has(os.path.join(root, path))]
        if len(found) > 1:
            raise ValueError(f"image {image} has several maps in {root}: {', '.join(found)}")
        if not found:
            missing.append(f"{image} (no {' or '.join(candidates[:2])})")
            stems.append(os.path.basename(stem(image)))
            continue
        if (other := owners.setdefault(found[0], image)) != image:
            raise ValueError(f"images {other} and {image} in {root / image_folder} have the same map, {found[0]}")
        maps += found
    if missing:
        raise FileNotFoundError(
            f"{len(missing):,} of {len(images):,} images in {root / image_folder} have no map: {named(missing)}"
            f"{_what_is_there(root, map_folder, stems, used=maps, endings=endings)}"
        )
    unused = list(names.unused([os.path.join(root, path) for path in maps], endings))
    notes = [f"ignored {len(unused):,} map(s) without an image: {named(unused)}"] if unused else []
    return Pairs([os.path.join(image_folder, image) for image in images], maps, notes)


def _what_is_there(
    root: Path, map_folder: str, stems: Sequence[str], *, used: Sequence[str], endings: Sequence[str]
) -> str:
    """Text about files in the folder of maps: those with one of the stems in the name, or any if none is ``used``."""
    walked = (os.path.join(folder, name) for folder, _, names in os.walk(root / map_folder) for name in names)
    files = {os.path.relpath(path, root / map_folder) for path in islice(walked, _MAX_SEARCHED)}
    unused = sorted(files - {os.path.relpath(path, map_folder) for path in used})
    stem = re.compile(rf"(?<![^\W_])({'|'.join(map(re.escape, stems[:_MOST_NAMED]))})(?![^\W_])")
    similar = [file for file in unused if stem.search(os.path.basename(file))]
    if not similar:
        return "" if used else f"; {map_folder}{os.sep} has {named(unused) or 'no files'}"
    if any(file.lower().endswith(_JPEG_ENDINGS) for file in similar):
        advice = "JPEG changes values: save maps as PNG"
    else:
        advice = f"a map has the path and name of its image, and ends in {named(endings)}"
    return f"; {map_folder}{os.sep} has {named(similar)} ({advice})"


def check_files(root: Path, paths: Sequence[str], *, listed_in: Path) -> None:
    """Raise a FileNotFoundError that names some of the files of a list, relative to ``root``, that do not exist."""
    names = FolderNames()
    missing = [path for path in paths if not names.has(os.path.join(root, path))]
    if missing:
        raise FileNotFoundError(
            f"{len(missing):,} of {len(paths):,} files listed in {listed_in} do not exist in {root}: {named(missing)}"
        )


def named(names: Sequence[object], *, most: int = _MOST_NAMED) -> str:
    """The first few of some names, and the number of the others."""
    more = [f"and {len(names) - most:,} more"] if len(names) > most else []
    return ", ".join([*map(str, names[:most]), *more])


def given_file(root: Path, key: str, given: str | Path) -> Path:
    """Path of a file that a key of a dataset string names: relative to ``root``, or else to the working folder."""
    for path in (root / given, Path(given)):
        if path.is_file():
            return path
    if Path(given).is_absolute():
        raise FileNotFoundError(f"{key}={given}: there is no such file")
    raise FileNotFoundError(
        f"{key}={given}: there is no such file in root={root}, nor in the working folder {Path.cwd()}"
    )


def read_lines(file: Path) -> list[str]:
    """Read the lines of a text file, without those that are empty; no lines at all are a ValueError."""
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not a text file in UTF-8: {error}") from error
    lines = [line for line in lines if line]
    if not lines:
        raise ValueError(f"{file} is empty")
    return lines


def find_root(root: Path, *, inside: Sequence[str], needed: Sequence[str]) -> Path:
    """The folder ``root`` itself, or one inside it, that has all of the ``needed`` files and folders.

    Raises:
        FileNotFoundError: There is none; names what is missing.
    """
    candidates = [root, *(root / name for name in inside)]
    for candidate in candidates:
        if all((candidate / name).exists() for name in needed):
            return candidate
    missing = [name for name in needed if not (root / name).exists()]
    tried = f" (nor are all in {' or '.join(map(str, candidates[1:]))})" if len(candidates) > 1 else ""
    raise FileNotFoundError(f"root={root} has no {', '.join(missing)}{tried}")
