"""SegmentationFolder and DepthFolder: folders of any users, their classes, colors and splits."""

import numpy as np
import pytest
from dense_layouts import labels, save_image, save_map, write

from dinov2.data.datasets import make_dataset
from dinov2.data.dense import IGNORED, BadMapError
from dinov2.data.dense import label_scan as module


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path):
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def add(root, name, *values, images="images", masks="masks", suffix=".png", **options):
    save_image(root / images / f"{name}.jpg")
    save_map(root / masks / f"{name}{suffix}", labels(*values), **options)


def folder(root, rest=""):
    return make_dataset(dataset_str=f"SegmentationFolder:root={root}{rest}")


def test_classes_up_to_the_largest_label(root, caplog):
    caplog.set_level("INFO")
    add(root, "b", 0, 3)
    add(root, "deep/a", 1, 255, suffix=".TIF")
    dataset = folder(root)
    assert dataset.classes == ("class 0", "class 1", "class 2", "class 3")
    assert (
        "4 classes, as the largest label in 2 masks is 3; the rarest label has 1 pixels, see masks/b.png" in caplog.text
    )
    assert [dataset.get_map(index)[0, :3].tolist() for index in (0, 1)] == [[0, 3, 0], [1, IGNORED, 1]]


@pytest.mark.parametrize("images, masks", [("images/{}", "masks/{}"), ("{}/images", "{}/masks")])
def test_splits_have_the_same_classes(root, images, masks):
    for split, largest in (("train", 5), ("val", 2)):
        add(root, "x", 0, largest, images=images.format(split), masks=masks.format(split))
    for split in ("train", "val"):
        assert folder(root, f":split={split}").num_classes == 6
    with pytest.raises(FileNotFoundError, match=r"no folders images/test and masks/test or test/images and test/masks"):
        folder(root, ":split=test")


def test_classes_from_a_file(root, tmp_path):
    add(root, "a", 0, 1, 9, 255)
    write(tmp_path / "names.txt", "background", "a cat")
    dataset = folder(root, f":classes={tmp_path}/names.txt")
    assert dataset.classes == ("background", "a cat")
    with pytest.raises(BadMapError, match=r"9 \(1 pixels\); allowed: 0 to 1, 255 \(255: ignored\)$"):
        dataset.get_map(0)
    assert folder(root, f":classes={tmp_path}/names.txt:ignore=9")._lookup.tolist() == [0, 1, *[-2] * 7, IGNORED]
    write(tmp_path / "names.txt", "cat", "dog", "cat")
    with pytest.raises(ValueError, match="names a class twice: cat"):
        folder(root, f":classes={tmp_path}/names.txt")


def test_ignored_values(root):
    add(root, "a", 0, 1, 2)
    dataset = folder(root, ":ignore=0")
    assert dataset.get_map(0)[0, :4].tolist() == [IGNORED, 1, 2, IGNORED] and dataset.num_classes == 3
    assert folder(root, ":ignore=none").get_map(0)[0, :4].tolist() == [0, 1, 2, 0]
    with pytest.raises(ValueError, match="ignore must be the value of ignored pixels in the masks, or none, got 'x'"):
        folder(root, ":ignore=x")
    add(root, "b", 0, 255)
    assert folder(root, ":ignore=none").num_classes == 256


def test_masks_that_are_hardly_class_indices(root):
    add(root, "a", 0, 255)
    with pytest.raises(ValueError, match=r"only 0 and 255, which is ignored; .*'object 255 255 255'"):
        folder(root)
    save_map(root / "masks/a.png", labels(255))
    with pytest.raises(ValueError, match="all pixels of the masks in .* have ignored values: 255"):
        folder(root)
    save_map(root / "masks/a.png", labels(0, 255).astype(np.uint16) * 257)
    with pytest.raises(
        ValueError, match="values from 0 to 65535, not class indices; masks/a.png has 65535: .*ignore=65535"
    ):
        folder(root)


def test_many_masks_are_not_read_for_the_number_of_classes(root, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_MAX_SCANNED", 1)
    add(root, "a", 0)
    add(root, "b", 1)
    with pytest.raises(ValueError, match="2 masks, too many to read them all .* classes=FILE"):
        folder(root)
    write(tmp_path / "names.txt", "x", "y")
    assert folder(root, f":classes={tmp_path}/names.txt").num_classes == 2


@pytest.fixture
def colored(root):
    save_image(root / "images/a.png")
    pixels = np.zeros((6, 8, 3), np.uint8)
    pixels[0, :4] = [[255, 0, 0], [0, 0, 255], [9, 9, 9], [1, 2, 3]]
    save_map(root / "masks/a.png", pixels)
    return root


def test_masks_of_colors(colored, tmp_path):
    with pytest.raises(BadMapError, match=r"masks/a.png: it has 3 channels \(mode RGB\).*colors=FILE"):
        folder(colored)
    table = tmp_path / "colors.txt"
    write(table, "ground 0 0 0", "red car 255 0 0", "ignored 9 9 9", "red car 0 0 255", "sky 1 2 3")
    dataset = folder(colored, f":colors={table}")
    assert dataset.classes == ("ground", "red car", "sky")
    assert dataset.palette.tolist() == [[0, 0, 0], [255, 0, 0], [1, 2, 3]]
    assert dataset.get_map(0)[0, :5].tolist() == [1, 1, IGNORED, 2, 0] and dataset.get_map(0).dtype == np.int16
    write(table, "ground 0 0 0", "car 255 0 0")
    with pytest.raises(BadMapError, match=r"3 pixels have colors .*: 0 0 255 \(1 pixels\), 1 2 3 .*, 9 9 9 "):
        folder(colored, f":colors={table}").get_map(0)


def test_binary_masks_by_their_colors(root, tmp_path):
    add(root, "a", 0, 255)
    write(tmp_path / "colors.txt", "background 0 0 0", "object 255 255 255")
    assert folder(root, f":colors={tmp_path}/colors.txt").get_map(0)[0, :3].tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    "lines, message",
    [
        (["a 0 0"], "must have lines 'name red green blue'.*got 'a 0 0'"),
        (["a 0 0 256"], "from 0 to 255"),
        (["a 0 0 0", "b 0 0 0"], "gives the color 0 0 0 twice, the second time for b"),
        (["ignored 0 0 0"], "no class but ignored ones"),
    ],
)
def test_wrong_color_tables(colored, tmp_path, lines, message):
    write(tmp_path / "colors.txt", *lines)
    with pytest.raises(ValueError, match=message):
        folder(colored, f":colors={tmp_path}/colors.txt")


def test_partners_that_are_missing_or_ambiguous(root):
    add(root, "a", 0)
    save_image(root / "images/b.jpg")
    with pytest.raises(FileNotFoundError, match=r"1 of 2 images .*: b.jpg \(no masks/b.png or masks/b.tif\)"):
        folder(root)
    save_map(root / "masks/b.png", labels(0))
    save_map(root / "masks/b.tif", labels(0))
    with pytest.raises(ValueError, match="image b.jpg has several maps in .*: masks/b.png, masks/b.tif"):
        folder(root)
    (root / "masks/b.tif").unlink()
    save_image(root / "images/b.png")
    with pytest.raises(ValueError, match="images b.jpg and b.png in .* have the same map, masks/b.png"):
        folder(root)


def test_folders_that_are_missing(root):
    (root / "pictures").mkdir()
    with pytest.raises(FileNotFoundError, match="has no folders images and masks; it has pictures"):
        folder(root)
    with pytest.raises(FileNotFoundError, match="has no folders images and depth; it has pictures"):
        make_dataset(dataset_str=f"DepthFolder:root={root}")


def test_depths_of_integers_and_floats(root):
    save_image(root / "images/val/a.jpg")
    save_map(root / "depth/val/a.png", labels(0, 4).astype(np.uint16) * 500)
    save_image(root / "images/val/b.jpg")
    np.save(root / "depth/val/b.npy", np.full((6, 8), 2.25))
    dataset = make_dataset(dataset_str=f"DepthFolder:root={root}:split=val")
    assert dataset.get_sample(0)[1][0, :3].tolist() == [0, 2, 0] and (dataset.get_map(1) == 2.25).all()
    dataset = make_dataset(dataset_str=f"DepthFolder:root={root}:split=val:scale=500")
    assert dataset.get_map(0)[0, 1] == 4 and (dataset.get_map(1) == 2.25 / 500).all()  # floats, too
    with pytest.raises(ValueError, match="scale must be a positive number"):
        make_dataset(dataset_str=f"DepthFolder:root={root}:split=val:scale=mm")
