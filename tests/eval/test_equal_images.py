"""Images are known by their files, and copies of training images among those that are tested on are counted."""

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from eval_images import ImageSet, write_images

from dinov2.data import make_dataset
from dinov2.data.datasets.base import ImageDataset
from dinov2.eval import file_identity
from dinov2.eval.file_identity import LabeledDataset, file_stats, image_identity, report_equal_images

MINUTE_NS = 60 * 10**9


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_images(tmp_path / "set", 6, seed=0)
    return tmp_path / "set"


def dataset(folder: Path) -> ImageDataset:
    return make_dataset(dataset_str=f"ImageFolder:root={folder}")


def swap(folder: Path) -> None:
    """Two files of one size change places."""
    a, b = folder / "r" / "0.png", folder / "g" / "1.png"
    size = max(a.stat().st_size, b.stat().st_size)
    contents = [path.read_bytes().ljust(size, b"\0") for path in (a, b)]
    a.write_bytes(contents[1])
    b.write_bytes(contents[0])


def touch(folder: Path) -> None:
    stat = (folder / "b" / "2.png").stat()
    os.utime(folder / "b" / "2.png", ns=(stat.st_atime_ns, stat.st_mtime_ns + MINUTE_NS))


def grow(folder: Path) -> None:
    path = folder / "b" / "2.png"
    stat = path.stat()
    path.write_bytes(path.read_bytes() + b"\0")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def rename(folder: Path) -> None:
    (folder / "b" / "2.png").rename(folder / "b" / "9.png")


def move_to_another_class(folder: Path) -> None:
    (folder / "b" / "2.png").rename(folder / "r" / "2.png")


@pytest.mark.parametrize("change", [swap, touch, grow, rename, move_to_another_class])
def test_replaced_images_are_others(folder: Path, change: Callable[[Path], None]) -> None:
    before = image_identity(dataset(folder))
    assert image_identity(dataset(folder)) == before
    change(folder)
    assert image_identity(dataset(folder)) != before


def test_any_number_of_files_is_read_in_order_and_some_may_be_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_identity, "STATS_AT_ONCE", 3)
    paths = [tmp_path / str(size) for size in range(8)]
    for size, path in enumerate(paths):
        path.write_bytes(b"x" * size)
    paths[4].unlink()
    stats = file_stats(map(str, [*paths, "Set image 3", "\0"]), 10)
    assert stats[:, 0].tolist() == [0, 1, 2, 3, -1, 5, 6, 7, -1, -1]
    assert stats[7, 1] == paths[7].stat().st_mtime_ns


def test_copies_of_training_images_are_counted(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_images(tmp_path / "val", 6, seed=1)
    for name, copy in (("r/0", "r/new"), ("g/1", "g/new"), ("g/4", "b/new")):
        (tmp_path / "val" / f"{copy}.png").write_bytes((folder / f"{name}.png").read_bytes())
    (tmp_path / "val" / "b" / "link.png").symlink_to(folder / "b" / "2.png")
    train, val = dataset(folder), dataset(tmp_path / "val")
    with caplog.at_level(logging.WARNING):
        found = report_equal_images("train", LabeledDataset.of(train), {"val": LabeledDataset.of(val)})
    assert found == {
        "train": {"compared": 6, "equal": 0, "with_other_labels": 0},
        "val": {"compared": 10, "equal": 4, "with_other_labels": 1},
    }
    assert "val: 4 of 10 images are also training images (the same bytes), 1 of them with another label" in caplog.text
    assert "train:" not in caplog.text


def test_copies_in_the_training_set_are_warned_of_if_their_labels_differ(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    (folder / "r" / "copy.png").write_bytes((folder / "r" / "0.png").read_bytes())
    counts = report_equal_images("train", LabeledDataset.of(dataset(folder)), {})["train"]
    assert counts == {"compared": 7, "equal": 2, "with_other_labels": 0}
    assert [record.levelname for record in caplog.records if "are duplicates" in record.message] == ["INFO"]
    (folder / "b" / "copy.png").write_bytes((folder / "r" / "0.png").read_bytes())
    counts = report_equal_images("train", LabeledDataset.of(dataset(folder)), {})["train"]
    assert counts == {"compared": 8, "equal": 3, "with_other_labels": 3}
    assert "3 of 8 images are duplicates (the same bytes), 3 of them with another label" in caplog.text


def test_the_same_set_for_training_and_test_is_reported(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    both = LabeledDataset.of(dataset(folder))
    found = report_equal_images("set", both, {"set": both})
    assert found == {"set": {"compared": 6, "equal": 6, "with_other_labels": 0}}
    assert "set is both training and test set" in caplog.text


def test_of_many_files_a_share_is_compared(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, path in enumerate(sorted(folder.rglob("*.png"))):
        path.write_bytes(path.read_bytes() + bytes(number))  # six sizes
    shutil.copytree(folder, tmp_path / "val")
    train, val = LabeledDataset.of(dataset(folder)), LabeledDataset.of(dataset(tmp_path / "val"))
    monkeypatch.setattr(file_identity, "MOST_FILES", 5)
    some = report_equal_images("train", train, {"val": val})["val"]
    assert 0 < some["equal"] == some["compared"] < 6


def test_images_without_files_are_not_compared_but_have_an_identity() -> None:
    labeled = LabeledDataset.of(ImageSet(5))
    assert report_equal_images("a", labeled, {"b": labeled})["b"] == {
        "compared": 0,
        "equal": 0,
        "with_other_labels": 0,
    }
    assert image_identity(ImageSet(5)) != image_identity(ImageSet(6))
