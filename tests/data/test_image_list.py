"""ImageList reads what a text file lists, and never guesses what a label means."""

import os
import pickle

import numpy as np
import pytest
from PIL import Image

from dinov2.data.datasets import ImageList, make_dataset
from dinov2.data.images import BadImageError


@pytest.fixture
def root(tmp_path):
    for name in ("a.png", "b c.png", "sub/d,e.png", "sub/f:g.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4), (len(name), 0, 0)).save(tmp_path / name)
    return tmp_path


def write(path, content):
    path.write_text(content, encoding="utf-8")
    return path


def paths(dataset):
    return [os.path.relpath(dataset.describe(index), dataset.root) for index in range(len(dataset))]


def test_names_are_numbered_in_sorted_order(root):
    file = write(root / "train.tsv", "b c.png\twren\n\nsub/d,e.png\tAlbatross\r\na.png\twren \n")
    dataset = make_dataset(dataset_str=f"ImageList:file={file}", transform=np.asarray)
    assert paths(dataset) == ["b c.png", "sub/d,e.png", "a.png"]
    assert dataset.classes == ["Albatross", "wren"]
    assert dataset.get_targets().tolist() == [1, 0, 1] == [dataset.get_target(index) for index in range(3)]
    image, target = dataset[1]
    assert (image[0, 0].tolist(), target) == ([len("sub/d,e.png"), 0, 0], 0)


def test_whole_numbers_are_class_indices(root):
    file = write(root / "train.txt", "a.png\t10\nb c.png\t2\n")
    dataset = ImageList(file=file)
    assert dataset.classes == []
    assert dataset.get_targets().tolist() == [10, 2]


def test_csv_has_quotes_and_spaces_after_commas(root):
    file = write(root / "train.CSV", '"sub/d,e.png", 1\na.png,0\n')
    dataset = ImageList(file=file)
    assert paths(dataset) == ["sub/d,e.png", "a.png"]
    assert dataset.get_targets().tolist() == [1, 0]


@pytest.mark.parametrize("suffix, separator", [("csv", ","), ("tsv", "\t")])
def test_a_first_line_may_name_the_columns(root, suffix, separator):
    rows = [["width", "label", "path"], ["4", "crow", "a.png"], ["4", "owl", "b c.png"]]
    # As some spreadsheets write it, with a byte order mark.
    file = write(root / f"list.{suffix}", "\ufeff" + "\n".join(map(separator.join, rows)))
    dataset = ImageList(file=file)
    assert paths(dataset) == ["a.png", "b c.png"]
    assert [dataset.classes[target] for target in dataset.get_targets()] == ["crow", "owl"]


def test_paths_alone_have_no_labels(root):
    dataset = ImageList(file=write(root / "all.txt", "b c.png\nsub/f:g.png\n"))
    assert dataset.get_targets() is dataset.get_target(0) is dataset[1][1] is None
    assert paths(dataset) == ["b c.png", "sub/f:g.png"]


def test_root_is_where_relative_paths_start(root, tmp_path):
    (tmp_path / "lists").mkdir()
    file = write(tmp_path / "lists" / "x.txt", f"d,e.png\n{root}/a.png\n")
    dataset = make_dataset(dataset_str=f"ImageList:file={file}:root={root / 'sub'}")
    assert [dataset.describe(index) for index in range(2)] == [f"{root}/sub/d,e.png", f"{root}/a.png"]
    assert dataset[1][0].size == (4, 4)


def test_train_and_val_share_the_classes_of_the_training_list(root):
    train = write(root / "train.tsv", "a.png\towl\nb c.png\tcrow\nsub/d,e.png\twren\n")
    val = write(root / "val.tsv", "sub/f:g.png\twren\n")
    names = write(root / "classes.txt", "wren\ncrow\nowl\n")
    alone, shared, listed = (
        make_dataset(dataset_str=f"ImageList:file={val}{classes}")
        for classes in ("", f":classes={train}", f":classes={names}")
    )
    assert (alone.classes, alone.get_target(0)) == (["wren"], 0)  # refused by evaluations: other names than in training
    assert (shared.classes, shared.get_target(0)) == (["crow", "owl", "wren"], 2)
    assert shared.classes == ImageList(file=train).classes
    assert (listed.classes, listed.get_target(0)) == (["wren", "crow", "owl"], 0)


def test_numbers_with_classes(root):
    numbers = write(root / "numbers.tsv", "a.png\t2\nb c.png\t10\n")
    birds = write(root / "birds.txt", "".join(f"bird {number}\n" for number in range(11)))
    assert ImageList(file=numbers, classes=birds).get_targets().tolist() == [2, 10]
    # Not "10" before "2": numbers are indices in the list of the classes, too.
    assert ImageList(file=numbers, classes=numbers).get_targets().tolist() == [2, 10]
    # A class may be called "2".
    named = write(root / "named.tsv", "a.png\t2\nb c.png\tten\n")
    assert ImageList(file=write(root / "val.tsv", "a.png\t2\n"), classes=named).get_targets().tolist() == [0]
    assert ImageList(file=write(root / "val.tsv", "b c.png\tten\n"), classes=named).get_targets().tolist() == [1]


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "list.tsv is empty"),
        ("path\tlabel\n", "list.tsv lists no image"),
        ("a.png\t1\nb c.png\n", r"line 2 of .*list.tsv has 1 column\(s\), the first has 2: \['b c.png'\]"),
        ("a.png\t1\t4\n", "line 1 of .* has 3 columns; expected a path and a label, or a first line that names"),
        ("a.png\t-1\nb c.png\t0\n", "has labels -1 to 0; they must be at least 0$"),
        ("a.png 1\nb c.png 2\n", "no file .*/a.png 1, the first image in .*list.tsv; .* separated by tabs"),
        ("nothing.png\t1\n", "no file .*/nothing.png, the first image in"),
        ("a.png\t1\nb c.png\t\n", r"line 2 of .*list.tsv has an empty path or label: \['b c.png', ''\]"),
        ("a.png\t\n", "line 1 of .*list.tsv has an empty path or label"),
        (" \n", "line 1 of .*list.tsv has an empty path or label"),
    ],
)
def test_mistakes_are_named(root, content, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        ImageList(file=write(root / "list.tsv", content))


@pytest.mark.parametrize(
    "labels, classes, message",
    [
        (["owl", "crow"], "owl\n", "labels that are not among the 1 classes: crow"),
        (["0", "2"], "owl\ncrow\n", "labels 0 to 2; they must be at least 0 and below 2, the number of classes"),
        (["0", "1"], "owl\nowl\n", "classes.txt names a class twice: owl"),
    ],
)
def test_labels_that_are_no_classes_are_named(root, labels, classes, message):
    file = write(root / "list.tsv", f"a.png\t{labels[0]}\nb c.png\t{labels[1]}\n")
    with pytest.raises(ValueError, match=message):
        ImageList(file=file, classes=write(root / "classes.txt", classes))


def test_a_missing_list_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.tsv"):
        make_dataset(dataset_str=f"ImageList:file={tmp_path}/nowhere.tsv")


def test_a_broken_image_is_named_and_labels_need_none(root):
    file = write(root / "list.tsv", "a.png\t1\ngone.png\t0\n")
    dataset = ImageList(file=file)
    assert dataset.get_targets().tolist() == [1, 0]
    with pytest.raises(BadImageError, match=r"sample 1 \(.*gone.png\)"):
        dataset[1]


def test_names_that_are_not_text(root):
    name = os.fsdecode(b"caf\xe9.png")  # Latin-1 in a UTF-8 world
    Image.new("L", (2, 2)).save(root / name)
    (root / "list.tsv").write_bytes(b"caf\xe9.png\tZ\xc3\xbcrich\n")
    dataset = ImageList(file=root / "list.tsv")
    assert dataset.classes == ["Zürich"]
    assert pickle.loads(pickle.dumps(dataset))[0][0].size == (2, 2)
