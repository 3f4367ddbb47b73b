"""Several folders are one dataset: images in order, classes by name."""

from pathlib import Path

import pytest
from PIL import Image

from dinov2.data.datasets import ImageFolder, make_dataset
from dinov2.data.images import BadImageError


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for level, name in enumerate(
        ["a/cat/0.png", "a/dog/1.png", "b/ant/2.png", "b/dog/3.png", "c/4.png", "d,e/x/5.png"]
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (level, 0, 0)).save(tmp_path / name)
    return tmp_path


def made(folders: Path, roots: str):
    return make_dataset(dataset_str="ImageFolder:root=" + ",".join(str(folders / root) for root in roots.split()))


def test_images_follow_each_other_and_classes_of_a_name_are_one(folders: Path) -> None:
    dataset = made(folders, "a b")
    assert [dataset[index][0].getpixel((0, 0))[0] for index in range(len(dataset))] == [0, 1, 2, 3]
    assert dataset.classes == ["ant", "cat", "dog"] and dataset.get_targets().tolist() == [1, 2, 0, 2]
    assert [dataset[index][1] for index in range(4)] == [1, 2, 0, 2] and dataset.get_class_name(3) == "dog"
    assert dataset.describe(2) == str(folders / "b/ant/2.png") == list(dataset.image_files())[2]
    with pytest.raises(IndexError):
        dataset[4]


def test_the_order_of_folders_counts_and_one_is_as_before(folders: Path) -> None:
    assert made(folders, "a b").fingerprint() != made(folders, "b a").fingerprint()
    assert isinstance(made(folders, "a"), ImageFolder)


def test_a_folder_without_labels_is_said(folders: Path) -> None:
    dataset = made(folders, "a c")
    assert len(dataset) == 3 and dataset.get_targets() is None
    assert f"{folders}/c has no labels" in dataset.notes()[0][1]
    assert made(folders, "c").get_targets() is None


def test_a_comma_in_a_name_is_no_list(folders: Path) -> None:
    assert made(folders, "d,e").describe(0) == str(folders / "d,e/x/5.png")


def test_a_bad_image_is_named(folders: Path) -> None:
    dataset = made(folders, "a b")
    (folders / "b/ant/2.png").write_bytes(b"")
    with pytest.raises(BadImageError, match=r"sample 2 \(.*b/ant/2.png\)"):
        dataset.get_image(2)


@pytest.mark.parametrize(
    ("roots", "message"), [("a missing", "no folder .*missing"), ("a a", "a folder twice"), ("a  b", "names no folder")]
)
def test_wrong_folders(roots: str, message: str, folders: Path) -> None:
    text = ",".join(str(folders / root) if root else "" for root in roots.split(" "))
    with pytest.raises((OSError, ValueError), match=message):
        make_dataset(dataset_str=f"ImageFolder:root={text}")


def test_a_glob_is_the_folders_that_match(folders: Path) -> None:
    dataset = make_dataset(dataset_str=f"ImageFolder:root={folders}/[ab]")
    assert dataset.fingerprint() == made(folders, "a b").fingerprint() and dataset.classes == ["ant", "cat", "dog"]
    assert make_dataset(dataset_str=f"ImageFolder:root={folders}/[ab],{folders}/c").get_targets() is None
    one = make_dataset(dataset_str=f"ImageFolder:root={folders}/a*:split=cat")
    assert isinstance(one, ImageFolder) and one.root == folders / "a" / "cat"


def test_a_glob_without_folders_or_with_nested_ones_is_an_error(folders: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder matches root=.*/x\*"):
        make_dataset(dataset_str=f"ImageFolder:root={folders}/x*")
    with pytest.raises(ValueError, match=r"names .*a/cat, which is in .*a/: its images would come twice"):
        make_dataset(dataset_str=f"ImageFolder:root={folders}/a/**")
