"""Dataset strings: what is written is what is read, and a mistake is answered with the choices."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dinov2.data.datasets import DATASETS, Entry, ImageNet, make_dataset, parse_dataset_str
from dinov2.data.datasets.base import ImageDataset


def values(*keys):
    """Non-empty texts, rich in ":" and "=", that do not contain one of the dataset's own `:key=`."""
    text = st.text(st.one_of(st.sampled_from(":=/ .~\n"), st.characters(exclude_categories=["Cs"])), min_size=1)
    pieces = st.sampled_from([":", "=", "root", "split", ":foo=", "root=", "/a:b=c", "extra"])
    own_key = re.compile(rf":({'|'.join(keys)})=")
    return st.one_of(text, st.lists(pieces, min_size=1).map("".join)).filter(lambda value: not own_key.search(value))


@given(st.data())
def test_round_trip(data):
    name = data.draw(st.sampled_from(sorted(DATASETS)))
    entry = DATASETS[name]
    keys = [*entry.required, *(key for key in entry.optional if data.draw(st.booleans()))]
    arguments = {key: data.draw(values(*entry.keys)) for key in keys}
    if has_known_split := entry.splits is not None and "split" in keys:
        arguments["split"] = data.draw(st.sampled_from(sorted(entry.known_splits)))
    order = data.draw(st.permutations(keys))
    dataset_str = ":".join([name, *(f"{key}={arguments[key]}" for key in order)])
    if has_known_split:
        arguments["split"] = entry.known_splits[arguments["split"]]
    assert parse_dataset_str(dataset_str) == (name, arguments)


def test_published_string():
    assert parse_dataset_str("ImageNet:split=TRAIN:root=/data/in1k:extra=/data/extra") == (
        "ImageNet",
        {"split": ImageNet.Split.TRAIN, "root": "/data/in1k", "extra": "/data/extra"},
    )


@pytest.mark.parametrize(
    "dataset_str, message",
    [
        (
            "Imagenet:root=/x",
            r"unknown dataset 'Imagenet' \(did you mean ImageNet\?\) in .*; known: ImageNet, ImageNet22k",
        ),
        ("", "unknown dataset '' in '.*known: "),
        ("CIFAR", r"unknown dataset 'CIFAR' \(did you mean CIFAR10\?\)"),
        ("flowers:split=TRAIN:root=/x", r"unknown dataset 'flowers' \(did you mean Flowers102\?\)"),
        (
            "ImageNet:splt=TRAIN:root=/x:extra=/y",
            r"'splt' \(did you mean split\?\) .*write ImageNet:split=TRAIN\|VAL\|TEST",
        ),
        ("ImageNet:TRAIN:root=/x:extra=/y", "unknown key 'TRAIN:root'|unknown key 'TRAIN'"),
        ("ImageNet:split=TRAIN:rot=/x:extra=/y", "missing root"),
        ("ImageNet:split=TRAIN:root=/x:extra=/y:foo=1", "unknown key 'foo' .*write ImageNet:split"),
        ("ImageNet:split=TRAIN", "missing root and extra in 'ImageNet:split=TRAIN'; write .*:root=...:extra=..."),
        ("ImageNet22k", "missing root and extra in 'ImageNet22k'; write ImageNet22k:root=...:extra=..."),
        ("ImageNet22k:root=/x:extra=/y:split=TRAIN", "unknown key 'split' .*; write ImageNet22k:root=...:extra=..."),
        ("ImageFolder:root=", "missing root"),
        ("ImageFolder:root=/x:split=", r"split empty in .*; write ImageFolder:root=...\[:split=...\]"),
        ("ImageList:file=/x:root=:classes=", "root and classes empty"),
        ("ImageFolder:root=/nowhere:splt=val", r"unknown key 'splt' \(did you mean split\?\)"),
        ("ImageFolder:root=/x:root=/y", "given twice"),
        ("FashionMNIST", r"missing split .*write FashionMNIST:split=TRAIN\|VAL\[:root=...\]"),
        ("FashionMNIST:split=train", r"unknown split 'train' \(did you mean TRAIN\?\) in .*; known: TRAIN, VAL"),
        ("FashionMNIST:split=TRAIN:rot=/x", r"unknown key 'rot' \(did you mean root\?\)"),
        ("ImageNet:split=TEXT:root=/x:extra=/y", r"'TEXT' \(did you mean TEST\?\) in .*; known: TRAIN, VAL, TEST"),
    ],
)
def test_mistakes_are_answered_with_the_choices(dataset_str, message):
    with pytest.raises(ValueError, match=message):
        make_dataset(dataset_str=dataset_str)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", ["a:b", "a=b", "a:b=c", "root=x", "C:\\x", "x:root"])
def test_odd_paths_can_be_written(tmp_path, cache, name):
    (tmp_path / name).mkdir()
    Image.new("L", (4, 4)).save(tmp_path / name / "1.png")
    assert len(make_dataset(dataset_str=f"ImageFolder:root={tmp_path}:split={name}")) == 1
    assert len(make_dataset(dataset_str=f"ImageFolder:root={tmp_path / name}")) == 1


def test_home_folder(tmp_path, cache, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    Image.new("L", (4, 4)).save(tmp_path / "1.png")
    assert len(make_dataset(dataset_str="ImageFolder:root=~")) == 1


class Squares(ImageDataset):
    """The least that a dataset of one's own needs."""

    def __init__(self, *, size, **transforms):
        super().__init__(**transforms)
        self.size = int(size)

    def __len__(self):
        return self.size

    def get_image_data(self, index):
        raise KeyError("no such image")

    def get_target(self, index):
        return index**2


def test_a_data_set_of_ones_own(monkeypatch):
    monkeypatch.setitem(DATASETS, "Squares", Entry(Squares, required=("size",)))
    dataset = make_dataset(dataset_str="Squares:size=3", target_transform=str)
    assert dataset.get_targets().tolist() == [0, 1, 4]
    with pytest.raises(RuntimeError, match=r"sample 2 \(Squares sample 2\): 'no such image'") as caught:
        dataset[2]
    assert isinstance(caught.value.__cause__, KeyError)
