"""Labels of two data sets are compared only if they mean the same classes."""

from pathlib import Path

import pytest
from PIL import Image

from dinov2.data import make_dataset
from dinov2.eval.setup import check_same_classes


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
        check_same_classes(train, val, "the validation set")
    check_same_classes(train, train, "the training set itself")
