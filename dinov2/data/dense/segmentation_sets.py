"""The public segmentation datasets ADE20K, PASCAL VOC 2012 and Cityscapes, with the folders of their archives."""

import csv
import os
from pathlib import Path
from typing import Any

import numpy as np

from dinov2.data.datasets.file_list import check_folder, list_images
from dinov2.data.dense.base import IGNORED, SegmentationDataset
from dinov2.data.dense.pairing import check_files, find_root, pair_by_name, read_lines
from dinov2.data.dense.palettes import voc_palette

_VOID = 255  # value of ignored pixels in files


def check_split(name: str, split: str, known: tuple[str, ...]) -> None:
    """Raise a ValueError for an unknown split of a dataset."""
    if split not in known:
        raise ValueError(f"{name} has no split {split!r}; it has {', '.join(known)}")


def note_on_size(count: int, published: int) -> list[str]:
    """A message if a split does not have its published number of images."""
    if count == published:
        return []
    return [f"{count:,} images, but the published split has {published:,}: results are not comparable to others"]


class ADE20K(SegmentationDataset):
    """ADE20K of the scene parsing benchmark (`ADEChallengeData2016`), 150 classes; value 0 of the files is ignored.

    Class names are those of `objectInfo150.txt`, the first of each entry; without this file they are numbers.

    Args:
        split: "TRAIN" (20,210 images) or "VAL" (2,000).
        root: The folder `ADEChallengeData2016`, or the one that contains it.
        transforms, transform, target_transform: See `ImageDataset`.

    Raises:
        OSError, ValueError: Folders, images or maps are missing, or the file of names is malformed.
    """

    Splits = ("TRAIN", "VAL")
    num_names = 150

    def __init__(self, *, split: str, root: str | Path, **transforms: Any) -> None:
        check_split("ADE20K", split, self.Splits)
        folder, published = {"TRAIN": ("training", 20_210), "VAL": ("validation", 2_000)}[split]
        check_folder(Path(root))
        found = find_root(Path(root), inside=["ADEChallengeData2016"], needed=["images", "annotations"])
        values = {0: IGNORED, _VOID: IGNORED} | {label + 1: label for label in range(self.num_names)}
        super().__init__(classes=_ade20k_names(found / "objectInfo150.txt"), values=values, **transforms)
        self.split = split
        image_folder = os.path.join("images", folder)
        check_folder(found / image_folder)
        images = list(list_images(found / image_folder).images)
        map_folder = os.path.join("annotations", folder)
        pairs = pair_by_name(found, images, image_folder=image_folder, map_folder=map_folder, endings=[".png"])
        self._set_files(found, pairs.images, pairs.maps, [*pairs.notes, *note_on_size(len(images), published)])


def _ade20k_names(file: Path) -> list[str]:
    """Class names from a table with the columns Idx and Name; numbers if there is no such file."""
    count = ADE20K.num_names
    if not file.is_file():
        return [f"class {number}" for number in range(1, count + 1)]
    rows = [{key.strip(): value for key, value in row.items() if key} for row in _table(file)]
    try:
        names = {int(row["Idx"]): row["Name"].partition(",")[0].partition(";")[0].strip() for row in rows}
    except (KeyError, ValueError, AttributeError) as error:
        raise ValueError(f"{file} must be a table with the columns Idx and Name, separated by tabs: {error}") from error
    if sorted(names) != list(range(1, count + 1)):
        raise ValueError(f"{file} names {len(names)} classes, not those from 1 to {count}")
    return [names[number] for number in range(1, count + 1)]


def _table(file: Path) -> list[dict[str, str]]:
    lines = read_lines(file)
    return list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))


class VOC2012(SegmentationDataset):
    """The segmentation task of PASCAL VOC 2012: 21 classes with the background; value 255 (borders) is ignored.

    Args:
        split: "TRAIN" (1,464 images), "VAL" (1,449) or "TRAINVAL"; the lists in `ImageSets/Segmentation`.
        root: The folder `VOC2012`, or one that contains it or `VOCdevkit/VOC2012`.
        transforms, transform, target_transform: See `ImageDataset`.

    Raises:
        OSError, ValueError: Folders, lists, images or maps are missing.
    """

    Splits = ("TRAIN", "VAL", "TRAINVAL")
    names = (
        "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
        "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
    )  # fmt: skip

    def __init__(self, *, split: str, root: str | Path, **transforms: Any) -> None:
        check_split("VOC2012", split, self.Splits)
        check_folder(Path(root))
        needed = ["JPEGImages", "SegmentationClass", "ImageSets/Segmentation"]
        found = find_root(Path(root), inside=["VOC2012", "VOCdevkit/VOC2012"], needed=needed)
        values = {label: label for label in range(len(self.names))} | {_VOID: IGNORED}
        super().__init__(classes=self.names, values=values, palette=voc_palette(len(self.names)), **transforms)
        self.split = split
        file = found / "ImageSets" / "Segmentation" / f"{split.lower()}.txt"
        names = read_lines(file)
        images = [os.path.join("JPEGImages", f"{name}.jpg") for name in names]
        maps = [os.path.join("SegmentationClass", f"{name}.png") for name in names]
        check_files(found, images + maps, listed_in=file)
        published = {"TRAIN": 1_464, "VAL": 1_449, "TRAINVAL": 2_913}[split]
        self._set_files(found, images, maps, note_on_size(len(names), published))


# Cityscapes: number in *_labelIds.png, class name, published color.
_CITYSCAPES = (
    (7, "road", (128, 64, 128)),
    (8, "sidewalk", (244, 35, 232)),
    (11, "building", (70, 70, 70)),
    (12, "wall", (102, 102, 156)),
    (13, "fence", (190, 153, 153)),
    (17, "pole", (153, 153, 153)),
    (19, "traffic light", (250, 170, 30)),
    (20, "traffic sign", (220, 220, 0)),
    (21, "vegetation", (107, 142, 35)),
    (22, "terrain", (152, 251, 152)),
    (23, "sky", (70, 130, 180)),
    (24, "person", (220, 20, 60)),
    (25, "rider", (255, 0, 0)),
    (26, "car", (0, 0, 142)),
    (27, "truck", (0, 0, 70)),
    (28, "bus", (0, 60, 100)),
    (31, "train", (0, 80, 100)),
    (32, "motorcycle", (0, 0, 230)),
    (33, "bicycle", (119, 11, 32)),
)
_CITYSCAPES_IDS = 34  # numbers 0 to 33; those without a class above are ignored
_IMAGE_ENDING = "_leftImg8bit.png"


class Cityscapes(SegmentationDataset):
    """Cityscapes with its 19 evaluated classes; all other labels are ignored.

    Maps are `*_gtFine_labelIds.png`, mapped to the 19 classes, or, if there are none, `*_gtFine_labelTrainIds.png`,
    which have class indices and 255.

    Args:
        split: "TRAIN" (2,975 images) or "VAL" (500).
        root: The folder of `leftImg8bit` and `gtFine`.
        transforms, transform, target_transform: See `ImageDataset`.

    Raises:
        OSError, ValueError: Folders, images or maps are missing.
    """

    Splits = ("TRAIN", "VAL")

    def __init__(self, *, split: str, root: str | Path, **transforms: Any) -> None:
        check_split("Cityscapes", split, self.Splits)
        check_folder(Path(root))
        found = find_root(Path(root), inside=["cityscapes"], needed=["leftImg8bit", "gtFine"])
        image_folder, map_folder = (os.path.join(kind, split.lower()) for kind in ("leftImg8bit", "gtFine"))
        check_folder(found / image_folder)
        images = list(list_images(found / image_folder).images)
        wrong = [image for image in images if not image.endswith(_IMAGE_ENDING)]
        if wrong:
            raise ValueError(
                f"{found / image_folder} has {len(wrong):,} images that are no *{_IMAGE_ENDING}: {wrong[0]}"
            )
        stem = images[0].removesuffix(_IMAGE_ENDING)
        has_ids = not (found / map_folder / f"{stem}_gtFine_labelTrainIds.png").exists()
        has_ids = has_ids or (found / map_folder / f"{stem}_gtFine_labelIds.png").exists()
        super().__init__(
            classes=[name for _, name, _ in _CITYSCAPES],
            values=_cityscapes_values(has_ids),
            palette=np.array([color for _, _, color in _CITYSCAPES], np.uint8),
            **transforms,
        )
        self.split = split
        pairs = pair_by_name(
            found,
            images,
            image_folder=image_folder,
            map_folder=map_folder,
            endings=["_gtFine_labelIds.png" if has_ids else "_gtFine_labelTrainIds.png"],
            stem=lambda image: image.removesuffix(_IMAGE_ENDING),
        )
        published = {"TRAIN": 2_975, "VAL": 500}[split]
        self._set_files(found, pairs.images, pairs.maps, [*pairs.notes, *note_on_size(len(images), published)])


def _cityscapes_values(has_ids: bool) -> dict[int, int]:
    """Value in the files -> class index."""
    numbers = [number for number, _, _ in _CITYSCAPES] if has_ids else range(len(_CITYSCAPES))
    others = dict.fromkeys([*range(_CITYSCAPES_IDS if has_ids else 0), _VOID], IGNORED)
    return others | {number: label for label, number in enumerate(numbers)}
