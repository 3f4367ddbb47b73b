"""ImageFolder reads any folder of images, labels them by folder where it can, and remembers the list of files."""

import os
import pickle

import numpy as np
import pytest
import torchvision.datasets
from PIL import Image

from dinov2.data.datasets import ImageFolder, file_list, make_dataset


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dinov2" / "file_lists"


@pytest.fixture
def root(tmp_path):
    (tmp_path / "images").mkdir()
    return tmp_path / "images"


def add(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), 9).save(root / path, "PNG")  # Pillow goes by the content, not by the name


def settle(root):
    """Makes the folders older, as if they had not changed for a while."""
    for folder, _, _ in os.walk(root):
        os.utime(folder, (1_000_000, 1_000_000))


def paths(dataset):
    return [os.path.relpath(dataset.describe(index), dataset.root) for index in range(len(dataset))]


def test_labels_are_the_sorted_folders_of_the_first_level(root):
    add(root, "b/1.png", "a/deep/er/2.jpg", "a/3.JPEG", "a-b/4.webp", "c/.hidden/5.png")
    dataset = ImageFolder(root=root)
    assert paths(dataset) == ["a-b/4.webp", "a/3.JPEG", "a/deep/er/2.jpg", "b/1.png"]
    assert dataset.classes == ["a", "a-b", "b"]
    assert dataset.get_targets().tolist() == [1, 0, 0, 2] == [dataset.get_target(index) for index in range(4)]
    assert dataset.get_class_name(0) == "a-b"
    image, target = dataset[3]
    assert (image.mode, image.size, target) == ("RGB", (4, 4), 2)


def test_classes_are_those_of_torchvision(root):
    add(root, "b/x.png", "a/y.png", "a b/z.png", "a.b/z.png", "B/z.png")
    assert ImageFolder(root=root).classes == torchvision.datasets.ImageFolder(str(root)).classes


@pytest.mark.parametrize("files", [["1.png", "2.png"], ["1.png", "a/2.png"]])
def test_no_labels_when_images_lie_in_the_root(root, files):
    add(root, *files)
    dataset = ImageFolder(root=root)
    assert paths(dataset) == files
    assert dataset.classes == []
    assert dataset.get_targets() is dataset.get_target(0) is dataset.get_class_name(0) is None
    assert dataset[0][1] is None


def test_suffixes_in_any_case_and_nothing_else(root):
    images = ["1.jpg", "2.JPEG", "3.Jpg", "4.png", "5.bmp", "6.webp", "7.tif", "8.TIFF", "9.gif", "a.ppm", "b.pgm"]
    add(root, *images, ".hidden.png", ".cache/x.png")
    for other in ("notes.txt", "jpg", "table.npy"):
        (root / other).touch()
    assert paths(ImageFolder(root=root)) == images


def test_links_are_followed_and_circles_end(root, tmp_path):
    add(tmp_path, "elsewhere/1.png", "elsewhere/sub/2.png")
    (root / "a").symlink_to(tmp_path / "elsewhere")
    (root / "b").symlink_to(tmp_path / "elsewhere")  # the same again is no circle
    (tmp_path / "elsewhere" / "sub" / "up").symlink_to(root)
    (root / "b.png").symlink_to(tmp_path / "elsewhere" / "1.png")
    assert paths(ImageFolder(root=root)) == ["a/1.png", "a/sub/2.png", "b.png", "b/1.png", "b/sub/2.png"]


def test_names_that_are_not_text(root):
    name = os.fsdecode(b"caf\xe9.png")  # Latin-1 in a UTF-8 world
    add(root, name, "Zürich.png")
    dataset = ImageFolder(root=root)
    assert sorted(paths(dataset)) == sorted([name, "Zürich.png"])
    assert dataset[0][0].size == dataset[1][0].size == (4, 4)


def test_split_is_a_folder_below(root):
    add(root, "train/a/1.png", "val/a/2.png")
    dataset = make_dataset(dataset_str=f"ImageFolder:root={root}:split=val")
    assert paths(dataset) == ["a/2.png"]
    with pytest.raises(FileNotFoundError, match=f"no folder {root}/test; folders in {root}: train, val"):
        make_dataset(dataset_str=f"ImageFolder:root={root}:split=test")


@pytest.mark.parametrize("way", [{"root": ".", "split": "val"}, {"root": "val"}])
def test_a_split_that_lacks_classes_has_the_indices_of_train(root, way):
    add(root, "train/a/1.png", "train/b/1.png", "train/c/1.png", "val/c/2.png", "val/a/2.png")
    (root / "train" / "0 empty").mkdir()
    (root / "train" / "notes.txt").touch()
    train = ImageFolder(root=root / "train")
    val = ImageFolder(root=root / way["root"], split=way.get("split"))
    assert val.classes == train.classes == ["a", "b", "c"]
    assert paths(val) == ["a/2.png", "c/2.png"]
    assert val.get_targets().tolist() == [0, 2]


def test_a_split_with_classes_of_its_own_keeps_them(root):
    # Evaluations then refuse the pair, for the names differ.
    add(root, "train/a/1.png", "train/b/1.png", "val/b/2.png", "val/c/2.png")
    assert ImageFolder(root=root, split="val").classes == ["b", "c"]
    add(root, "test/1.png", "test/2.png")
    assert ImageFolder(root=root, split="test").get_targets() is None


def test_splits_that_are_taken_for_classes_are_pointed_out(root, caplog):
    add(root, "train/a/1.png", "val/a/2.png")
    assert ImageFolder(root=root).classes == ["train", "val"]
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning.endswith("the folders train, val are used as classes; to read one of them, with the classes "
                            "below it, add :split=train")  # fmt: skip


def test_the_error_for_an_empty_folder_names_the_suffixes(root):
    (root / "sub").mkdir()
    (root / "sub" / "x.npy").touch()
    message = rf"no images under {root}: searched 2 folder\(s\) with 1 file\(s\) for names that end in .*\.jpg, "
    with pytest.raises(FileNotFoundError, match=message):
        ImageFolder(root=root)


def test_a_missing_folder_is_named(root):
    with pytest.raises(FileNotFoundError, match=f"no folder {root}/nothing"):
        ImageFolder(root=root / "nothing")


def test_the_list_is_kept_and_used(root, cache, monkeypatch):
    add(root, "a/1.png", "b/2.png")
    settle(root)
    first = ImageFolder(root=root)
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(file_list, "_scan", None)  # a second scan of the files would fail
    again = ImageFolder(root=root)
    assert paths(again) == paths(first)
    assert again.get_targets().tolist() == [0, 1]


@pytest.mark.parametrize("change", ["a/3.png", "a/deep/3.png", "c/3.png"])
def test_a_change_anywhere_is_noticed(root, change):
    add(root, "a/1.png", "a/deep/1.png", "b/2.png")
    settle(root)
    assert len(ImageFolder(root=root)) == 3
    add(root, change)
    assert len(ImageFolder(root=root)) == 4
    (root / "b" / "2.png").unlink()
    assert len(ImageFolder(root=root)) == 3


def test_a_folder_that_changed_just_now_is_not_remembered(root, cache):
    add(root, "1.png")
    assert len(ImageFolder(root=root)) == 1
    assert not cache.exists()


@pytest.mark.parametrize("damage", ["truncate", "garbage", "empty"])
def test_a_damaged_cache_is_replaced(root, cache, damage):
    add(root, "a/1.png", "b/2.png")
    settle(root)
    ImageFolder(root=root)
    (file,) = cache.iterdir()
    good = file.read_bytes()
    file.write_bytes({"truncate": good[:-100], "garbage": b"garbage", "empty": b""}[damage])
    assert paths(ImageFolder(root=root)) == ["a/1.png", "b/2.png"]
    assert len(file.read_bytes()) == len(good)


def test_a_cache_that_cannot_be_written_is_no_error(root, cache):
    add(root, "a/1.png")
    settle(root)
    cache.parent.parent.touch()  # a file where the folder should be
    assert len(ImageFolder(root=root)) == 1


def test_a_pickled_copy_is_the_same_and_small(root):
    add(root, *(f"a/{index:03}.png" for index in range(50)))
    dataset = ImageFolder(root=root)
    data = pickle.dumps(dataset)
    assert paths(pickle.loads(data)) == paths(dataset)
    assert len(data) < 50 * (len("a/000.png") + 8 + 8) + 2000  # path, its end, target


def test_path_table_is_a_sequence():
    table = file_list.PathTable.of(["", "ab", "c/d"])
    assert list(table) == ["", "ab", "c/d"]
    assert table[-1] == "c/d"
    with pytest.raises(IndexError):
        table[3]
    assert len(file_list.PathTable.of([])) == 0
    assert table.ends.dtype == np.int64
