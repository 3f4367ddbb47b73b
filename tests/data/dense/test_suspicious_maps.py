"""Maps that can be read but are probably not what their owner means: every such case is a warning or a clear error."""

import io

import numpy as np
import pytest
from dense_layouts import labels, save_image, save_map, write
from PIL import Image

from dinov2.data.datasets import make_dataset
from dinov2.data.dense import IGNORED, BadMapError, check_maps
from dinov2.data.dense.base import MapSummary


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def add(root, name, values):
    save_image(root / "images" / f"{name}.jpg", *values.shape)
    save_map(root / "masks" / f"{name}.png", values)


def folder(root, rest=""):
    return make_dataset(dataset_str=f"SegmentationFolder:root={root}{rest}")


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


# --- Classes that are named ------------------------------------------------------------------------------------------


def test_binary_masks_with_class_names_are_warned_of(tmp_path):
    write(tmp_path / "classes.txt", "background", "object")
    add(tmp_path, "a", labels(0, 255, 255, 255, 255))
    absent, ignored = check_maps(folder(tmp_path, ":classes=classes.txt")).warnings()
    assert absent == "1 of 2 classes have no pixel in 1 maps: object"
    assert ignored.startswith("8.3% of the pixels are ignored, and all others have one class, background: if the masks")
    assert "0 and 255, colors=FILE" in ignored
    write(tmp_path / "colors.txt", "background 0 0 0", "object 255 255 255")
    assert check_maps(folder(tmp_path, ":colors=colors.txt")).warnings() == []
    with pytest.raises(BadMapError, match="allowed: 0 to 1; if 255 marks ignored pixels, give ignore=255$"):
        folder(tmp_path, ":classes=classes.txt:ignore=none").get_map(0)
    add(tmp_path, "a", labels(0, 255, 255))  # 4.2 % ignored: the first warning alone
    assert check_maps(folder(tmp_path, ":classes=classes.txt")).warnings() == [absent]
    add(tmp_path, "a", labels(0, 1, 255, 255, 255, 255))
    assert check_maps(folder(tmp_path, ":classes=classes.txt")).warnings() == []


def test_labels_that_begin_at_1_are_warned_of(tmp_path):
    write(tmp_path / "classes.txt", "soil", "crop", "weed")
    add(tmp_path, "a", labels(1, 2))
    [warning] = check_maps(folder(tmp_path, ":classes=classes.txt")).warnings()
    assert warning == "1 of 3 classes have no pixel in 1 maps: soil; if labels begin at 1, give first=1"
    add(tmp_path, "a", labels(1, 2, 3))
    with pytest.raises(BadMapError, match=r"3 \(1 pixels\); allowed: 0 to 2, 255 \(255: ignored\); 0 does .*first=1$"):
        folder(tmp_path, ":classes=classes.txt").get_map(0)
    add(tmp_path, "a", labels(0, 3))
    with pytest.raises(BadMapError, match=r"\(255: ignored\)$"):  # 0 occurs
        folder(tmp_path, ":classes=classes.txt").get_map(0)


def test_missing_classes_are_normal_among_many():
    def summary(num_classes, found, **changes):
        counts = np.zeros(num_classes, np.int64)
        counts[found] = 50
        names = tuple(f"c{number}" for number in range(num_classes))
        return MapSummary(100, 100, 100, counts, None, names)._replace(**changes)

    assert summary(150, [0, 7]).warnings() == []
    [warning] = summary(150, [7, 149]).warnings()
    assert warning == "148 of 150 classes have no pixel in 100 maps: c0, c1, c2, and 145 more"
    assert "first=1" in summary(150, [7, 149], has_own_indices=True).warnings()[0]
    assert summary(30, [*range(29)]).warnings() == ["1 of 30 classes have no pixel in 100 maps: c29"]
    assert summary(31, [*range(30)]).warnings() == []


# --- The value of class 0 --------------------------------------------------------------------------------------------


def test_first_is_the_value_of_class_0(tmp_path, caplog):
    add(tmp_path, "a", labels(1, 0, 3, 255))
    dataset = folder(tmp_path, ":first=1")
    assert dataset.classes == ("class 0", "class 1", "class 2")
    assert dataset.get_map(0)[0, :5].tolist() == [0, IGNORED, 2, IGNORED, 0]
    assert folder(tmp_path, ":first=1:ignore=3").num_classes == 255  # 255 is a label then
    write(tmp_path / "classes.txt", "soil", "crop", "weed")
    assert folder(tmp_path, ":first=1:classes=classes.txt").get_map(0)[0, 2] == 2
    write(tmp_path / "classes.txt", "soil", "crop")
    with pytest.raises(BadMapError, match=r"3 \(1 pixels\); allowed: 0 to 2, 255 \(0, 255: ignored\)$"):
        folder(tmp_path, ":first=1:classes=classes.txt").get_map(0)
    with pytest.raises(ValueError, match="all pixels .* have ignored values: 0, 1, 3, and 1 more"):
        folder(tmp_path, ":first=4")


@pytest.mark.parametrize("wrong", ["-1", "x", "65536"])
def test_wrong_values_of_first(tmp_path, wrong):
    add(tmp_path, "a", labels(0))
    with pytest.raises(ValueError, match=f"first must be the value of class 0 in the masks, 0 or more, got '{wrong}'"):
        folder(tmp_path, f":first={wrong}")
    write(tmp_path / "colors.txt", "a 0 0 0")
    with pytest.raises(ValueError, match="first=1 is for masks of class indices"):
        folder(tmp_path, ":first=1:colors=colors.txt")


# --- Classes that are counted ----------------------------------------------------------------------------------------


def test_a_stray_label_is_warned_of(tmp_path, caplog):
    add(tmp_path, "a", labels(0, 1, 1, 2, 2))
    add(tmp_path, "b", labels(0, 1, 2, 200))
    assert folder(tmp_path).num_classes == 201
    [warning] = warnings_of(caplog)
    assert "4 of 201 labels occur: 0, 1, 2, 200; the rarest is 200 (1 pixels, see masks/b.png); classes=FILE" in warning


def test_counted_labels_that_begin_at_1_are_warned_of(tmp_path, caplog):
    add(tmp_path, "a", labels(1, 2, 3))
    folder(tmp_path)
    assert warnings_of(caplog) == [
        f"{tmp_path}: label 0 never occurs, 1 is the smallest: if labels begin at 1, give first=1"
    ]
    caplog.clear()
    folder(tmp_path, ":first=1")
    add(tmp_path, "a", labels(0, 2, 3))
    folder(tmp_path)
    assert warnings_of(caplog) == []


def test_levels_are_no_class_indices(tmp_path, caplog):
    add(tmp_path, "a", labels(0, 255, 255))
    assert folder(tmp_path, ":ignore=none").num_classes == 256
    [warning] = warnings_of(caplog)
    assert "2 of 256 labels occur: 0, 255;" in warning and "colors=FILE reads levels such as 0 and 255" in warning


@pytest.mark.parametrize("values, expected", [((0, 50, 120), "half of the "), ((0, 100, 200), " labels occur: ")])
def test_masks_that_were_jpeg_files_are_warned_of(tmp_path, caplog, values, expected):
    generator, mask = np.random.default_rng(0), np.zeros((256, 256), np.uint8)
    for _ in range(12):
        top, left = generator.integers(0, 200, 2)
        mask[top : top + 40, left : left + 40] = generator.choice(values)
    file = io.BytesIO()
    Image.fromarray(mask).save(file, "JPEG")
    add(tmp_path, "a", np.asarray(Image.open(file)))
    folder(tmp_path)
    [warning] = warnings_of(caplog)
    assert expected in warning and "see masks/a.png" in warning


def test_many_labels_that_all_occur_are_no_warning(tmp_path, caplog):
    add(tmp_path, "a", np.arange(4096, dtype=np.uint8).reshape(64, 64) % 150)
    assert folder(tmp_path).num_classes == 150 and warnings_of(caplog) == []


def test_16_bit_masks_with_65535(tmp_path):
    add(tmp_path, "a", labels(0, 1).astype(np.uint16))
    mask = labels(0, 1, 2).astype(np.uint16)
    mask[0, 5] = 65535
    add(tmp_path, "b", mask)
    with pytest.raises(ValueError, match="masks/b.png has 65535: if its pixels are to be ignored, give ignore=65535"):
        folder(tmp_path)
    write(tmp_path / "classes.txt", "x", "y", "z")
    with pytest.raises(BadMapError, match="masks/b.png.*; if 65535 marks ignored pixels, give ignore=65535"):
        folder(tmp_path, ":classes=classes.txt").get_map(1)
    dataset = folder(tmp_path, ":ignore=65535")
    assert dataset.num_classes == 3 and dataset.get_map(1)[0, [2, 5]].tolist() == [2, IGNORED]


# --- Files beside the right place ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "files, message",
    [
        (["00.jpg"], r"masks/ has 00.jpg \(JPEG changes values: save maps as PNG\)$"),
        (
            ["00_mask.png", "100.png"],
            r"masks/ has 00_mask.png \(a map has the path and name .* ends in .png, .tif, .*\)$",
        ),
        (["deep/00.png"], r"masks/ has deep/00.png \(a map has the path"),
        (["x.png", "y.png"], r"masks/ has x.png, y.png$"),
        ([], r"masks/ has no files$"),
    ],
)
def test_maps_with_other_names_are_named(tmp_path, files, message):
    save_image(tmp_path / "images/00.jpg")
    (tmp_path / "masks").mkdir()
    for file in files:
        save_map(tmp_path / "masks" / file, labels(0))
    with pytest.raises(FileNotFoundError, match=r"1 of 1 images in .* have no map: 00.jpg \(no .*\); " + message):
        folder(tmp_path)


def test_maps_of_other_images_are_not_named(tmp_path):
    add(tmp_path, "00_1", labels(0))
    save_image(tmp_path / "images/00.jpg")
    with pytest.raises(FileNotFoundError, match=r"1 of 2 images .* \(no masks/00.png or masks/00.tif\)$"):
        folder(tmp_path)


@pytest.mark.parametrize("key", ["classes", "colors"])
def test_files_of_classes_are_relative_to_root_or_the_working_folder(tmp_path, monkeypatch, key):
    root, work = tmp_path / "data", tmp_path / "work"
    add(root, "a", labels(0))
    work.mkdir()
    monkeypatch.chdir(work)
    with pytest.raises(FileNotFoundError, match=rf"^{key}=c.txt: .* in root={root}, nor in the working folder {work}$"):
        folder(root, f":{key}=c.txt")
    with pytest.raises(FileNotFoundError, match=rf"^{key}=/no/c.txt: there is no such file$"):
        folder(root, f":{key}=/no/c.txt")
    for place, name in ((work, "near work"), (root, "near root")):  # root is tried first
        write(place / "c.txt", name if key == "classes" else f"{name} 0 0 0")
        assert folder(root, f":{key}=c.txt").classes == (name,)


# --- Depths ----------------------------------------------------------------------------------------------------------


def test_depths_in_millimeters_are_warned_of(tmp_path):
    save_image(tmp_path / "images/a.jpg")
    (tmp_path / "depth").mkdir()
    np.save(tmp_path / "depth/a.npy", np.linspace(1500, 3000, 48, dtype=np.float32).reshape(6, 8))

    def summary(rest=""):
        return check_maps(make_dataset(dataset_str=f"DepthFolder:root={tmp_path}{rest}"))

    [warning] = summary().warnings()
    assert "largest depth is 3e+03 m: perhaps they are millimeters" in warning and "scale=" in warning
    assert summary(":scale=1000").depth_range == (1.5, 3) and summary(":scale=1000").warnings() == []
    [warning] = summary(":scale=1000000").warnings()
    assert "largest depth is 0.003 m: perhaps they are divided by a wrong scale" in warning
