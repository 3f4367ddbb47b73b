"""ImageNet in its real folder layout: dump_extra makes the tables that reading needs, for whole and partial copies."""

import io
import json
import logging
import pickle
import shlex

import numpy as np
import pytest
from PIL import Image

from dinov2.data.adapters import DatasetWithEnumeratedTargets
from dinov2.data.datasets import ImageNet, make_dataset
from dinov2.data.images import BadImageError

TRAIN, VAL, TEST = ImageNet.Split.TRAIN, ImageNet.Split.VAL, ImageNet.Split.TEST
# In another order than the folders, with the longest name in the last row (Q33).
LABELS = 'n01443537,goldfish\nn01440764,tench\nn02124075,"cat, Egyptian, of the longest name"\n'
FILES = {  # path -> gray value of the image
    "train/n01440764/n01440764_10026.JPEG": 10,
    "train/n01440764/n01440764_9.JPEG": 20,
    "train/n01443537/n01443537_2.JPEG": 30,
    "train/n02124075/n02124075_7.JPEG": 40,
    "val/n01440764/ILSVRC2012_val_00000293.JPEG": 50,
    "val/n02124075/ILSVRC2012_val_00000001.JPEG": 60,
    "test/ILSVRC2012_test_00000001.JPEG": 70,
}


def gray_jpeg(value):
    file = io.BytesIO()
    Image.new("L", (8, 8), value).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture
def root(tmp_path):
    """A small ImageNet with its labels."""
    for path, value in FILES.items():
        (tmp_path / "images" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / path).write_bytes(gray_jpeg(value))
    (tmp_path / "images" / "labels.txt").write_text(LABELS)
    return tmp_path / "images"


def dumped(root, split, **options):
    dataset = ImageNet(split=split, root=root, extra=root.parent / "extra", **options)
    dataset.dump_extra()
    return dataset


def gray(image):
    return np.asarray(image)[0, 0].tolist()


def test_train_reads_back_what_is_in_the_folders(root):
    dataset = dumped(root, TRAIN)
    assert [gray(image) for image, _ in dataset] == [[value] * 3 for value in (10, 20, 30, 40)]
    assert [target for _, target in dataset] == [0, 0, 1, 2] == dataset.get_targets().tolist()
    assert dataset.get_image_data(1) == gray_jpeg(20)
    assert dataset.describe(2) == str(root / "train/n01443537/n01443537_2.JPEG")
    assert [dataset.get_class_id(index) for index in (0, 3)] == ["n01440764", "n02124075"]
    assert [dataset.get_class_name(index) for index in (0, 3)] == ["tench", "cat, Egyptian, of the longest name"]
    assert (dataset.find_class_id(1), dataset.find_class_name(1)) == ("n01443537", "goldfish")


def test_val_has_its_own_file_names_and_folder_ranks(root):
    dataset = dumped(root, VAL)
    assert [gray(image)[0] for image, _ in dataset] == [50, 60]
    assert dataset.get_targets().tolist() == [0, 1]


def test_tables_have_the_published_names_and_types(root):
    dumped(root, TRAIN)
    extra = root.parent / "extra"
    assert {path.name for path in extra.iterdir()} == {
        f"{kind}-TRAIN.npy" for kind in ("entries", "class-ids", "class-names")
    }
    assert np.load(extra / "entries-TRAIN.npy").dtype == np.dtype(
        [("actual_index", "<u4"), ("class_index", "<u4"), ("class_id", "<U9"), ("class_name", "<U34")]
    )
    assert np.load(extra / "class-ids-TRAIN.npy").tolist() == ["n01440764", "n01443537", "n02124075"]


def test_test_split_has_100000_unlabeled_records_and_needs_no_labels_file(root):
    (root / "labels.txt").unlink()
    dataset = dumped(root, TEST)
    entries = np.load(root.parent / "extra" / "entries-TEST.npy")
    assert len(dataset) == len(entries) == 100_000
    assert set(entries["class_index"].tolist()) == {2**32 - 1}
    assert entries["actual_index"][[0, -1]].tolist() == [1, 100_000]
    assert entries.dtype["class_id"] == entries.dtype["class_name"] == np.dtype("<U0")
    image, target = dataset[0]
    assert (gray(image)[0], target) == (70, None)
    assert dataset.get_targets() is dataset.get_class_id(0) is dataset.get_class_name(0) is None
    with pytest.raises(ValueError, match="TEST split of ImageNet has no classes"):
        dataset.find_class_name(0)


def test_the_command_in_the_error_creates_the_missing_tables(root):
    dataset = ImageNet(split=VAL, root=root, extra=root / "a 'new' folder")
    with pytest.raises(FileNotFoundError, match="missing .*entries-VAL.npy") as caught:
        len(dataset)
    python, option, statements = shlex.split(str(caught.value).partition("with:\n")[2])
    assert (python, option) == ("python", "-c")
    exec(statements, {})
    assert len(dataset) == 2


def test_an_unofficial_length_is_logged_once(root, caplog):
    dataset = dumped(root, TRAIN)
    with caplog.at_level(logging.WARNING):
        assert len(dataset) == len(dataset) == 4
    assert [record.message for record in caplog.records] == [f"{root} has 4 images, ImageNet TRAIN has 1281167"]


def test_a_pickled_copy_opens_its_own_tables(root):
    dataset = dumped(root, TRAIN)
    assert len(dataset) == 4  # opens the table
    data = pickle.dumps(dataset)
    assert b"tench" not in data
    assert pickle.loads(data)[3][1] == 2


def test_transforms_apply_to_image_and_target(root):
    dataset = dumped(root, VAL, transform=gray, target_transform=str)
    assert dataset[1] == ([60] * 3, "1")
    joint = ImageNet(split=VAL, root=root, extra=root.parent / "extra", transforms=lambda image, target: (target, 7))
    assert joint[1] == (1, 7)
    with pytest.raises(ValueError, match="either transforms"):
        ImageNet(split=VAL, root=root, extra=root, transforms=max, transform=gray)


def test_dataset_string_makes_the_dataset(root):
    dumped(root, VAL)
    dataset = make_dataset(dataset_str=f"ImageNet:split=VAL:root={root}:extra={root.parent / 'extra'}", transform=gray)
    assert dataset[0] == ([50] * 3, 0)
    assert dataset.split is VAL


@pytest.mark.parametrize("content", [None, b"not an image", gray_jpeg(10)[:-30]])
def test_a_bad_image_names_index_and_path_and_keeps_the_cause(root, content):
    dataset = dumped(root, TRAIN)
    path = root / "train/n01443537/n01443537_2.JPEG"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadImageError, match=f"sample 2 .*{path}") as caught:
        dataset[2]
    assert caught.value.path == str(path)
    assert isinstance(caught.value.__cause__, OSError if content is None else ValueError)


def test_beyond_the_end_is_no_bad_image(root):
    with pytest.raises(IndexError, match="sample 4 of a dataset of 4"):
        dumped(root, TRAIN)[4]


def test_missing_labels_file_is_named(root):
    (root / "labels.txt").unlink()
    with pytest.raises(RuntimeError, match=f"{root / 'labels.txt'}"):
        dumped(root, TRAIN)


@pytest.mark.parametrize(
    "path, content, message",
    [
        ("labels.txt", "n01440764,tench\nn01443537\n", "row 2"),
        ("labels.txt", "n01440764,tench\n", "lacks .*n01443537.*n02124075"),
        ("train/n01440764/cat.JPEG", "", "cat.JPEG is not named like"),
        ("train/n01440764/n99999999_1.JPEG", "", "n99999999_1.JPEG is not named like"),
    ],
)
def test_what_does_not_belong_is_named(root, path, content, message):
    (root / path).write_text(content)
    with pytest.raises(ValueError, match=message):
        dumped(root, TRAIN)
    assert not (root.parent / "extra").exists()


def test_validation_images_in_one_heap_are_an_error(root):
    for path in list((root / "val").iterdir()):
        (path / next(path.iterdir()).name).rename(root / "val" / f"{path.name}.JPEG")
        path.rmdir()
    with pytest.raises(FileNotFoundError, match="expected one folder per class"):
        dumped(root, VAL)


def test_enumerated_targets(root):
    dataset = DatasetWithEnumeratedTargets(dumped(root, VAL, transform=gray))
    assert list(dataset) == [([50] * 3, (0, 0)), ([60] * 3, (1, 1))]
    assert (len(dataset), dataset.get_target(1), dataset.get_image_data(1)) == (2, (1, 1), gray_jpeg(60))
    assert dataset.get_targets().tolist() == [0, 1]
    assert dataset.describe(0).endswith("val_00000293.JPEG")


def test_enumerated_targets_replace_none_in_items_only(root):
    dataset = DatasetWithEnumeratedTargets(dumped(root, TEST, transform=gray))
    assert dataset[0] == ([70] * 3, (0, 0))
    assert dataset.get_target(5) == (5, None)


# --- Reassessed labels -----------------------------------------------------------------------------------------------


def real_file(root, lists, total=50_000):
    path = root.parent / "real.json"
    path.write_text(json.dumps(lists + [[]] * (total - len(lists))))
    return path


def test_reassessed_labels_are_lists_by_the_number_of_the_image(root):
    dumped(root, VAL)
    path = real_file(root, [[1, 0]] + [[]] * 291 + [[1]])
    dataset = make_dataset(dataset_str=f"ImageNet:split=VAL:root={root}:extra={root.parent / 'extra'}:real={path}")
    assert [dataset.describe(i)[-13:] for i in (0, 1)] == ["00000293.JPEG", "00000001.JPEG"]
    assert [target for _, target in dataset] == [[1], [1, 0]]
    assert dataset.get_targets().tolist() == [[1, -1], [1, 0]]
    assert pickle.loads(pickle.dumps(dataset)).get_target(1) == [1, 0]


@pytest.mark.parametrize("split", [TRAIN, TEST])
def test_only_val_has_reassessed_labels(root, split):
    with pytest.raises(ValueError, match=f"for split VAL only, not for {split.name}"):
        ImageNet(split=split, root=root, extra=root, real=root / "real.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[[0], ", "is not a JSON file"),
        ('{"a": 1}', "contains a dict, not a list of 50000 lists"),
        ("[[0], [1]]", "contains a list of 2, not a list of 50000 lists of class indices, one per image"),
        (json.dumps([[0]] * 49_999 + [3]), "image 50000: 3 is not a list of indices of the 2 classes"),
        (json.dumps([[0], [2]] + [[]] * 49_998), r"image 2: \[2\] is not a list of indices of the 2 classes"),
        (json.dumps([["n01440764"]] + [[]] * 49_999), "image 1: .* is not a list of indices"),
    ],
)
def test_files_of_something_else_are_named(root, content, message):
    dumped(root, VAL)
    path = root.parent / "real.json"
    path.write_text(content)
    dataset = ImageNet(split=VAL, root=root, extra=root.parent / "extra", real=path)
    with pytest.raises(ValueError, match=message):
        dataset.get_targets()
