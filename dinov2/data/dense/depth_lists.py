"""NYU Depth v2, KITTI and SUN RGB-D in the folders and lists that depth estimation uses: a line per image and map."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dinov2.data.datasets.file_list import check_folder
from dinov2.data.dense.base import DepthDataset
from dinov2.data.dense.pairing import check_files, given_file, read_lines
from dinov2.data.dense.segmentation_sets import check_split, note_on_size

_NO_MAP = "none"  # in a list: an image without a depth map


class ListFormat(NamedTuple):
    """Where a dataset has its files."""

    lists: dict[str, str]  # split -> name of the list
    scale: float  # integers in the files per meter
    image_folders: tuple[str, ...]  # folders that paths of images may be relative to, below the root
    map_folders: tuple[str, ...]  # the same for maps
    published: dict[str, int]  # split -> number of images with a map


_NYU_FOLDERS = ("", "sync", "official_splits/test")
FORMATS = {
    "NYUv2": ListFormat(
        {"TRAIN": "nyu_train.txt", "TEST": "nyu_test.txt"},
        1000.0,
        _NYU_FOLDERS,
        _NYU_FOLDERS,
        {"TRAIN": 24_231, "TEST": 654},
    ),
    "KITTIDepth": ListFormat(
        {"TRAIN": "kitti_eigen_train.txt", "TEST": "kitti_eigen_test.txt"},
        256.0,
        ("", "input"),
        ("", "gt_depth"),
        {"TEST": 652},
    ),
    "SUNRGBD": ListFormat({"VAL": "SUNRGBD_val_splits.txt"}, 8000.0, ("",), ("",), {}),
}


class ListedDepth(DepthDataset):
    """Images and depth maps of a list, whose lines are `image map`, followed by other columns that are ignored.

    Columns are separated by spaces; paths are relative to the folders below, with or without a leading slash. Lines
    whose map is `None` are left out and counted in `num_without_map`.

    Args:
        name: "NYUv2", "KITTIDepth" or "SUNRGBD", see `FORMATS`.
        split: A split of this dataset.
        root: Folder of the images; those of KITTI may be in `input` below it, those of NYU in `sync` (training) or
            `official_splits/test`.
        list: The list of images and maps, relative to `root` or the working folder; default: its usual name in `root`.
        depth_root: Folder of the maps; default: `root`, for KITTI also `gt_depth` below it.
        scale: Values in the maps per meter; default: that of the dataset for integers, 1 for floats.
        transforms, transform, target_transform: See `ImageDataset`.

    Raises:
        OSError, ValueError: Folders, the list or files are missing, a line is malformed, nothing is left.
    """

    def __init__(
        self,
        name: str,
        *,
        split: str,
        root: str | Path,
        list: str | Path | None = None,  # noqa: A002, the key of the dataset string
        depth_root: str | Path | None = None,
        scale: float | str | None = None,
        **transforms: Any,
    ) -> None:
        known = FORMATS[name]
        check_split(name, split, tuple(known.lists))
        super().__init__(scale=parse_scale(scale, known.scale), float_scale=parse_scale(scale, 1.0), **transforms)
        self.name, self.split, folder = name, split, Path(root)
        check_folder(folder)
        if depth_root is not None:
            check_folder(Path(depth_root), given_as="depth_root")
        file = find_list(folder, list, known.lists[split])
        images, maps, self.num_without_map = read_pairs(file)
        images = _below(folder, images, known.image_folders)
        if depth_root is None:
            maps = _below(folder, maps, known.map_folders)
        else:
            maps = [os.path.join(os.path.abspath(depth_root), path) for path in maps]
        check_files(folder, images + maps, listed_in=file)
        notes = note_on_size(len(images), known.published.get(split, len(images)))
        if self.num_without_map:
            notes.append(f"{self.num_without_map:,} images in {file} have no depth map and are left out")
        self._set_files(folder, images, maps, notes)


def parse_scale(scale: float | str | None, default: float) -> float:
    """The number of a key `scale`, or a default; ValueError if it is not a positive number."""
    try:
        value = default if scale is None else float(scale)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise ValueError(f"scale must be a positive number (values in the depth maps per meter), got {scale!r}")
    return value


def find_list(root: Path, given: str | Path | None, usual: str) -> Path:
    """Path of the list of a dataset: the given one, below ``root`` or by itself, or the usual one in ``root``."""
    if given is not None:
        return given_file(root, "list", given)
    if not (root / usual).is_file():
        raise FileNotFoundError(f"no list of images and maps at {root / usual}; list=FILE names another one")
    return root / usual


def read_pairs(file: Path) -> tuple[list[str], list[str], int]:
    """Read the paths of images and maps of a list, without leading slashes, and the number of images without a map."""
    images, maps, num_without = [], [], 0
    for number, line in enumerate(read_lines(file), start=1):
        columns = line.split()
        if len(columns) < 2:
            raise ValueError(f"entry {number} of {file} must be 'image map', got {line!r}")
        if columns[1].lower() == _NO_MAP:
            num_without += 1
            continue
        images.append(columns[0].lstrip("/"))
        maps.append(columns[1].lstrip("/"))
    if not images:
        raise ValueError(f"{file} has {num_without:,} images, but none with a depth map")
    return images, maps, num_without


def _below(root: Path, paths: Sequence[str], folders: Sequence[str]) -> list[str]:
    """Prefix paths by the first folder below ``root`` in which the first of them exists; else by none."""
    found = (folder for folder in folders if (root / folder / paths[0]).exists())
    folder = next(found, "")
    return [os.path.join(folder, path) for path in paths]
