"""The public datasets with maps: read from their real layouts, and every file that is missing or wrong is named."""

import pickle

import numpy as np
import pytest
from dense_layouts import labels, save_image, save_map, write
from PIL import Image

from dinov2.data.datasets import DATASETS, make_dataset
from dinov2.data.datasets.torchvision_sources import SOURCES
from dinov2.data.dense import IGNORED, BadMapError, DenseDataset, check_maps
from dinov2.data.images import BadImageError, ImageOptions


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def open_dataset(dataset_str) -> DenseDataset:
    return make_dataset(dataset_str=dataset_str)


def counts(values):
    found, number = np.unique(values, return_counts=True)
    return dict(zip(found.tolist(), number.tolist(), strict=True))


def test_names_do_not_collide_with_those_of_torchvision():
    ours = {"ADE20K", "VOC2012", "Cityscapes", "NYUv2", "KITTIDepth", "SUNRGBD", "SegmentationFolder", "DepthFolder"}
    assert ours <= DATASETS.keys() and not ours & SOURCES.keys()


# --- ADE20K ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def ade(tmp_path):
    root = tmp_path / "ADEChallengeData2016"
    for number in (1, 2, 3):
        save_image(root / "images/training" / f"ADE_train_0000000{number}.jpg", seed=number)
        save_map(root / "annotations/training" / f"ADE_train_0000000{number}.png", labels(number, 0, 150))
    save_image(root / "images/validation/ADE_val_00000001.jpg")
    save_map(root / "annotations/validation/ADE_val_00000001.png", labels(0, 1, 2, 2, 255))
    return root


def test_ade20k(ade, caplog):
    caplog.set_level("INFO")
    dataset = open_dataset(f"ADE20K:split=VAL:root={ade}")
    assert (len(dataset), dataset.kind, dataset.num_classes, dataset.palette.shape) == (
        1,
        "segmentation",
        150,
        (150, 3),
    )
    labels_read = dataset.get_map(0)
    assert labels_read.dtype == np.int16 and labels_read.shape == (6, 8)
    assert labels_read[0, :6].tolist() == [IGNORED, 0, 1, 1, IGNORED, IGNORED]
    image, again = dataset.get_sample(0)
    assert (image.mode, image.size) == ("RGB", (8, 6)) and (again == labels_read).all()
    assert dataset.get_targets() is None and dataset[0][1] is None
    assert dataset.classes[:2] == ("class 1", "class 2")
    assert "1 images, but the published split has 2,000: results are not comparable" in caplog.text
    train = open_dataset(f"ADE20K:split=TRAIN:root={ade.parent}")  # the folder above
    assert [dataset.describe_map(0) for dataset in (train,)] == [
        str(ade / "annotations/training/ADE_train_00000001.png")
    ]
    assert train.get_map(2)[0, :3].tolist() == [2, IGNORED, 149]


def test_ade20k_names_its_classes(ade):
    header = "Idx\tRatio\tTrain\tVal\tStuff\tName"
    write(ade / "objectInfo150.txt", header, *(f"{i}\t0.1\t9\t1\t1\tthing {i}, synonym" for i in range(1, 151)))
    dataset = open_dataset(f"ADE20K:split=VAL:root={ade}")
    assert dataset.classes[0] == "thing 1" and dataset.classes[149] == "thing 150"
    write(ade / "objectInfo150.txt", header, "1\t0.1\t9\t1\t1\twall")
    with pytest.raises(ValueError, match="objectInfo150.txt names 1 classes, not those from 1 to 150"):
        open_dataset(f"ADE20K:split=VAL:root={ade}")
    write(ade / "objectInfo150.txt", "wall", "floor")
    with pytest.raises(ValueError, match="table with the columns Idx and Name"):
        open_dataset(f"ADE20K:split=VAL:root={ade}")


def test_missing_maps_are_named_when_the_dataset_is_opened(ade):
    (ade / "annotations/training/ADE_train_00000002.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 3 images in .*images/training have no map: ADE_train_00000002"):
        open_dataset(f"ADE20K:split=TRAIN:root={ade}")


def test_maps_without_an_image_are_noted(ade, caplog):
    caplog.set_level("INFO")
    (ade / "images/training/ADE_train_00000002.jpg").unlink()
    assert len(open_dataset(f"ADE20K:split=TRAIN:root={ade}")) == 2
    assert "ignored 1 map(s) without an image: " in caplog.text and "ADE_train_00000002.png" in caplog.text


def test_values_of_no_class_name_the_file(ade):
    save_map(ade / "annotations/validation/ADE_val_00000001.png", labels(1, 151, 151))
    dataset = open_dataset(f"ADE20K:split=VAL:root={ade}")
    with pytest.raises(BadMapError, match=r"map of sample 0 \(.*val_00000001.png\): 2 pixels .*151 \(2.*0 to 150, 255"):
        dataset.get_map(0)
    with pytest.raises(BadMapError, match="2 pixels"):
        check_maps(dataset)


def test_a_map_of_another_size_names_both_files(ade):
    save_map(ade / "annotations/validation/ADE_val_00000001.png", labels(1, height=6, width=9))
    dataset = open_dataset(f"ADE20K:split=VAL:root={ade}")
    message = r"image .*val_00000001.jpg has 8 x 6 pixels .*, but its map .*val_00000001.png has 9 x 6$"
    for read in (dataset.get_sample, lambda index: check_maps(dataset)):
        with pytest.raises(BadMapError, match=message):
            read(0)


def test_an_image_that_is_turned_by_its_exif_orientation_is_explained(ade):
    exif = Image.Exif()
    exif[0x0112] = 6
    save_image(ade / "images/validation/ADE_val_00000001.jpg", exif=exif)
    with pytest.raises(BadMapError, match="8 x 6; images are turned upright as their EXIF orientation demands"):
        open_dataset(f"ADE20K:split=VAL:root={ade}").get_sample(0)


@pytest.mark.parametrize("damage", ["missing", "truncated", "text", "rgb"])
def test_an_unreadable_map_is_named(ade, damage):
    dataset = open_dataset(f"ADE20K:split=TRAIN:root={ade}")
    path = ade / "annotations/training/ADE_train_00000003.png"
    if damage == "missing":
        path.unlink()
    elif damage == "rgb":
        save_map(path, np.random.default_rng(0).integers(0, 9, (6, 8, 3), np.uint8))
    else:
        path.write_bytes(path.read_bytes()[:50] if damage == "truncated" else b"hello")
    with pytest.raises(BadMapError, match=r"cannot read the map of sample 2 \(.*train_00000003.png\): ") as error:
        dataset.get_map(2)
    assert error.value.path == str(path)
    dataset.get_map(1)


def test_limits_on_pixels_hold_for_maps(ade):
    dataset = make_dataset(dataset_str=f"ADE20K:split=VAL:root={ade}", image_options=ImageOptions(max_pixels=47))
    with pytest.raises(BadMapError, match="48 pixels .*limit 47"):
        dataset.get_map(0)


def test_a_summary_of_some_maps(ade):
    train = open_dataset(f"ADE20K:split=TRAIN:root={ade}")
    summary = check_maps(train)
    assert (summary.num_checked, summary.num_pixels, summary.num_valid) == (3, 144, 141)
    assert {label: count for label, count in enumerate(summary.class_counts.tolist()) if count} == {
        0: 46, 1: 46, 2: 46, 149: 3,
    }  # fmt: skip
    assert summary.describe() == "3 maps checked: 4 of 150 classes, 97.9 % of the pixels labeled"
    assert check_maps(train, limit=2).num_checked == 2
    for number in (1, 2, 3):
        save_map(ade / "annotations/training" / f"ADE_train_0000000{number}.png", labels(0))
    with pytest.raises(ValueError, match="no pixel has a class in 3 maps of 3"):
        check_maps(train)


def test_an_unreadable_image_is_found_with_the_maps(ade):
    (ade / "images/validation/ADE_val_00000001.jpg").write_bytes(b"")
    with pytest.raises(BadImageError, match="sample 0 "):
        check_maps(open_dataset(f"ADE20K:split=VAL:root={ade}"))


def test_a_wrong_root_names_what_is_missing(ade, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        FileNotFoundError, match=r"has no images, annotations \(nor are all in .*ADEChallengeData2016\)"
    ):
        open_dataset(f"ADE20K:split=VAL:root={tmp_path / 'empty'}")
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere"):
        open_dataset(f"ADE20K:split=VAL:root={tmp_path / 'nowhere'}")
    with pytest.raises(ValueError, match="unknown split 'TEST'.*known: TRAIN, VAL"):
        open_dataset(f"ADE20K:split=TEST:root={ade}")


def test_a_dataset_may_be_sent_to_a_worker(ade):
    dataset = open_dataset(f"ADE20K:split=TRAIN:root={ade}")
    copy = pickle.loads(pickle.dumps(dataset))
    assert (copy.get_map(1) == dataset.get_map(1)).all() and copy.fingerprint() == dataset.fingerprint()


# --- VOC and Cityscapes ----------------------------------------------------------------------------------------------


@pytest.fixture
def voc(tmp_path):
    root = tmp_path / "VOCdevkit" / "VOC2012"
    for index, name in enumerate(("2007_000032", "2007_000039", "2007_000063")):
        save_image(root / "JPEGImages" / f"{name}.jpg", seed=index)
        save_map(root / "SegmentationClass" / f"{name}.png", labels(0, index + 1, 20, 255), mode="P")
    save_image(root / "JPEGImages" / "2007_000999.jpg")  # without a map, not in the lists
    write(root / "ImageSets/Segmentation/train.txt", "2007_000063", "2007_000032")
    write(root / "ImageSets/Segmentation/val.txt", "2007_000039")
    return root


@pytest.mark.parametrize("above", ["", "..", "../.."])
def test_voc(voc, above):
    dataset = open_dataset(f"VOC2012:split=TRAIN:root={(voc / above).resolve()}")
    assert [dataset.describe(index)[-15:] for index in range(2)] == ["2007_000063.jpg", "2007_000032.jpg"]
    assert dataset.get_map(0)[0, :5].tolist() == [0, 3, 20, IGNORED, 0]
    assert dataset.num_classes == 21 and dataset.classes[15] == "person"
    assert dataset.palette[15].tolist() == [192, 128, 128]


def test_voc_lists_only_existing_files(voc):
    write(voc / "ImageSets/Segmentation/trainval.txt", "2007_000039", "2007_000999")
    message = r"1 of 4 files listed in .*trainval.txt do not exist in .*: SegmentationClass/2007_000999.png"
    with pytest.raises(FileNotFoundError, match=message):
        open_dataset(f"VOC2012:split=TRAINVAL:root={voc}")
    write(voc / "ImageSets/Segmentation/trainval.txt")
    with pytest.raises(ValueError, match="trainval.txt is empty"):
        open_dataset(f"VOC2012:split=TRAINVAL:root={voc}")


def make_cityscapes(root, ending, values):
    for city, number in (("aachen", "000000_000019"), ("aachen", "000001_000019"), ("bochum", "000000_000313")):
        save_image(root / "leftImg8bit/train" / city / f"{city}_{number}_leftImg8bit.png")
        save_map(root / "gtFine/train" / city / f"{city}_{number}_gtFine_{ending}.png", labels(*values))
    return root


def test_cityscapes_maps_its_numbers_to_the_evaluated_classes(tmp_path):
    make_cityscapes(tmp_path, "labelIds", range(34))
    save_map(tmp_path / "gtFine/train/aachen/aachen_000000_000019_gtFine_color.png", labels(0))
    dataset = open_dataset(f"Cityscapes:split=TRAIN:root={tmp_path}")
    assert len(dataset) == 3 and dataset.describe_map(2).endswith("bochum/bochum_000000_000313_gtFine_labelIds.png")
    ids = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
    expected = [ids.index(number) if number in ids else IGNORED for number in range(34)]
    assert dataset.get_map(0).reshape(-1)[:34].tolist() == expected
    assert dataset.classes[13] == "car" and dataset.palette[13].tolist() == [0, 0, 142]
    assert len(np.unique(dataset.palette, axis=0)) == 19


def test_cityscapes_with_class_indices_in_its_files(tmp_path):
    make_cityscapes(tmp_path, "labelTrainIds", (0, 18, 255))
    dataset = open_dataset(f"Cityscapes:split=TRAIN:root={tmp_path}")
    assert dataset.get_map(1).reshape(-1)[:4].tolist() == [0, 18, IGNORED, 0]
    make_cityscapes(tmp_path, "labelTrainIds", (0, 19))
    with pytest.raises(BadMapError, match=r"19 \(1 pixels\); allowed: 0 to 18, 255"):
        dataset.get_map(0)


def test_cityscapes_without_maps_or_with_other_images(tmp_path):
    make_cityscapes(tmp_path, "polygons", (0,))
    with pytest.raises(FileNotFoundError, match="3 of 3 images .*aachen_000000_000019_gtFine_labelIds.png"):
        open_dataset(f"Cityscapes:split=TRAIN:root={tmp_path}")
    save_image(tmp_path / "leftImg8bit/train/zoo/other.png")
    with pytest.raises(ValueError, match=r"1 images that are no \*_leftImg8bit.png: zoo/other.png"):
        open_dataset(f"Cityscapes:split=TRAIN:root={tmp_path}")


# --- Depth -----------------------------------------------------------------------------------------------------------


def depth_pair(root, image, depth, value):
    save_image(root / image)
    save_map(root / depth, np.full((6, 8), value, np.uint16))


@pytest.mark.parametrize("slash", ["", "/"])
@pytest.mark.parametrize("folder", ["", "sync"])
def test_nyu(tmp_path, slash, folder):
    for number in (1, 2):
        pair = f"kitchen/rgb_0000{number}.jpg", f"kitchen/sync_depth_0000{number}.png"
        depth_pair(tmp_path / folder, *pair, 1500 * number)
    lines = [f"{slash}kitchen/rgb_0000{n}.jpg {slash}kitchen/sync_depth_0000{n}.png 518.8579" for n in (2, 1)]
    write(tmp_path / "nyu_train.txt", *lines)
    dataset = open_dataset(f"NYUv2:split=TRAIN:root={tmp_path}")
    assert (dataset.kind, dataset.num_classes, len(dataset)) == ("depth", 0, 2)
    assert dataset.get_map(0).dtype == np.float32 and counts(dataset.get_map(0)) == {3.0: 48}
    assert counts(dataset.get_sample(1)[1]) == {1.5: 48}
    summary = check_maps(dataset)
    assert summary.depth_range == (1.5, 3.0) and summary.num_valid == summary.num_pixels == 96
    assert summary.describe() == "2 maps checked: depths from 1.5 to 3 m at 100.0 % of the pixels"


@pytest.mark.parametrize("image_folder, map_folder", [("", ""), ("input", "gt_depth")])
def test_kitti_leaves_out_images_without_a_depth_map(tmp_path, caplog, image_folder, map_folder):
    caplog.set_level("INFO")
    drive = "2011_09_26_drive_0002_sync"
    image, depth = f"2011_09_26/{drive}/image_02/data/69.png", f"{drive}/proj_depth/groundtruth/image_02/69.png"
    save_image(tmp_path / image_folder / image)
    save_map(tmp_path / map_folder / depth, labels(0, 1).astype(np.uint16) * 2560)
    write(tmp_path / "kitti_eigen_test.txt", f"{image.replace('69', '54')} None 721.5377", f"{image} {depth} 721.5377")
    dataset = open_dataset(f"KITTIDepth:split=TEST:root={tmp_path}")
    assert len(dataset) == 1 and counts(dataset.get_map(0)) == {0.0: 47, 10.0: 1}
    assert "1 images in " in caplog.text and "have no depth map and are left out" in caplog.text
    assert "published split has 652" in caplog.text
    assert check_maps(dataset).num_valid == 1


def test_maps_and_list_in_other_places(tmp_path):
    save_image(tmp_path / "raw/a.png")
    save_map(tmp_path / "depth/x/a.png", np.full((6, 8), 512, np.uint16))
    write(tmp_path / "lists/mine.txt", "a.png x/a.png", "", "  ")
    rest = f"root={tmp_path}/raw:depth_root={tmp_path}/depth:list={tmp_path}/lists/mine.txt"
    assert counts(open_dataset(f"KITTIDepth:split=TRAIN:{rest}").get_map(0)) == {2.0: 48}
    assert counts(open_dataset(f"KITTIDepth:split=TRAIN:{rest}:scale=1024").get_map(0)) == {0.5: 48}
    with pytest.raises(FileNotFoundError, match="depth_root=.*|no folder"):
        open_dataset(f"KITTIDepth:split=TRAIN:{rest.replace('/depth:', '/dept:')}")
    with pytest.raises(ValueError, match="scale must be a positive number .*got '-1'"):
        open_dataset(f"KITTIDepth:split=TRAIN:{rest}:scale=-1")


def test_sun_rgbd(tmp_path):
    depth_pair(tmp_path, "SUNRGBD/kv1/a/image/1.jpg", "SUNRGBD/kv1/a/depth/1.png", 16000)
    write(tmp_path / "SUNRGBD_val_splits.txt", "SUNRGBD/kv1/a/image/1.jpg SUNRGBD/kv1/a/depth/1.png")
    assert counts(open_dataset(f"SUNRGBD:split=VAL:root={tmp_path}").get_map(0)) == {2.0: 48}


@pytest.mark.parametrize(
    "lines, message",
    [
        (None, r"no list of images and maps at .*nyu_test.txt; list=FILE names another one"),
        ([""], "nyu_test.txt is empty"),
        (["a.jpg"], r"entry 1 of .*nyu_test.txt must be 'image map', got 'a.jpg'"),
        (["a.jpg None 1", "b.jpg none 1"], "2 images, but none with a depth map"),
        (["a.jpg a.png", "b.jpg b.png"], r"2 of 4 files listed in .* do not exist in .*: b.jpg, b.png"),
        ([f"{i}.jpg {i}.png" for i in range(9)], r"18 of 18 .*: 0.jpg, 1.jpg, 2.jpg, and 15 more"),
    ],
)
def test_wrong_lists(tmp_path, lines, message):
    depth_pair(tmp_path, "a.jpg", "a.png", 1)
    if lines is not None:
        write(tmp_path / "nyu_test.txt", *lines)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_dataset(f"NYUv2:split=TEST:root={tmp_path}")


def test_a_visualization_is_no_depth_map(tmp_path):
    save_image(tmp_path / "a.jpg")
    save_map(tmp_path / "a.png", labels(1, 2))
    write(tmp_path / "nyu_test.txt", "a.jpg a.png")
    with pytest.raises(BadMapError, match=r"a.png\): it has 8 bits .*perhaps a visualization"):
        check_maps(open_dataset(f"NYUv2:split=TEST:root={tmp_path}"))


def test_maps_without_any_measurement(tmp_path):
    depth_pair(tmp_path, "a.jpg", "a.png", 0)
    write(tmp_path / "nyu_test.txt", "a.jpg a.png")
    with pytest.raises(ValueError, match="no pixel has a depth in 1 maps of 1, such as .*a.png"):
        check_maps(open_dataset(f"NYUv2:split=TEST:root={tmp_path}"))
