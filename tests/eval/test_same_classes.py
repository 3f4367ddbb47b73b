"""Labels of two datasets are compared only if they mean the same classes."""

from pathlib import Path

import numpy as np
import pytest
from eval_images import ImageSet
from PIL import Image

from dinov2.data import make_dataset
from dinov2.eval.setup import check_classes, check_labels, class_names, labeled_dataset


def folder(root: Path, *classes: str) -> str:
    for name in classes:
        (root / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(root / name / "a.png")
    return f"ImageFolder:root={root}"


def test_a_missing_class_folder_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    train = make_dataset(dataset_str=folder(tmp_path / "a" / "images", "cats", "dogs", "misc"))
    val = make_dataset(dataset_str=folder(tmp_path / "b" / "images", "dogs", "misc"))
    with pytest.raises(ValueError, match="the validation set has other classes.*2 and 3 classes; not in both: cats"):
        check_classes(class_names(train), val, "the validation set")
    check_classes(class_names(train), train, "the training set itself")


def test_classes_without_training_images_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    check_labels(np.array([0, 2, 2]), ImageSet(10), "val")
    assert "val: 3 of 10 images are of classes without a training image" in caplog.text
    assert "labels 1" in caplog.text
    caplog.clear()
    check_labels(np.array([0, 1, 2]), ImageSet(10), "val", num_classes=3)
    assert not caplog.records
    with pytest.raises(ValueError, match="val has labels up to 2, but there are 2 classes"):
        check_labels(np.array([0, 1]), ImageSet(10), "val", num_classes=2)


def test_labels_that_are_no_indices_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = ImageSet(10)
    images.labels[[4, 7]] = -1
    monkeypatch.setattr("dinov2.eval.setup.make_dataset", lambda **_: images)
    with pytest.raises(ValueError, match="2 images of 'ImageSet' have a label below 0, such as ImageSet sample 4"):
        labeled_dataset("ImageSet", lambda image: image)
    images.labels = 10**12 * np.arange(10)
    with pytest.raises(ValueError, match="has labels up to 9000000000000 .ImageSet sample 9.; labels are indices"):
        labeled_dataset("ImageSet", lambda image: image)
