"""Index files, lists and dataset strings that are damaged or wrong are errors in words, and nothing of them is used."""

import io
import os
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov2.data.datasets import DATASETS, FashionMNIST, ImageFolder, ImageNet, ImageNet22k, make_dataset
from dinov2.data.images import BadImageError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def png(value):
    file = io.BytesIO()
    Image.new("L", (8, 8), value).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def indexed(tmp_path):
    """Dataset strings with index files in the folder of the same name."""
    twenty_two, one = tmp_path / "22k", tmp_path / "1k"
    twenty_two.mkdir()
    for kind in range(3):
        with tarfile.open(twenty_two / f"n{kind}.tar", "w") as tar:
            for index in range(4):
                member = tarfile.TarInfo(f"n{kind}_{index}.JPEG")
                member.size = len(png(0))
                tar.addfile(member, io.BytesIO(png(40 * kind + 10 * index)))
        (one / "train" / f"n{kind}").mkdir(parents=True)
        for index in range(3):
            (one / "train" / f"n{kind}" / f"n{kind}_{index}.JPEG").write_bytes(png(40 * kind + 10 * index))
    (one / "labels.txt").write_text("n0,a\nn1,b\nn2,c\n")
    ImageNet22k(root=twenty_two, extra=twenty_two).dump_extra()
    ImageNet(split=ImageNet.Split.TRAIN, root=one, extra=one).dump_extra()
    return {
        "22k": f"ImageNet22k:root={twenty_two}:extra={twenty_two}",
        "1k": f"ImageNet:split=TRAIN:root={one}:extra={one}",
    }


def content(dataset_str):
    """Targets and pixels; None for an image that cannot be read."""
    dataset = make_dataset(dataset_str=dataset_str)
    images = []
    for index in range(len(dataset)):
        try:
            images.append(dataset.get_image(index).tobytes())
        except BadImageError:
            images.append(None)
    return dataset.get_targets().tolist(), images


WRONG = {
    "empty": b"",
    "floats": np.zeros(9),
    "scalar": np.array(3),
    "objects": np.array([{}], object),
    "table": np.zeros((3, 3), np.int64),
    "no entries": np.zeros(0, "U4"),
    "other fields": np.zeros(3, [("class_index", "<u4"), ("class_id", "<f4")]),
}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize(
    "name, file", [("22k", "entries.npy"), ("22k", "class-ids.npy"), ("1k", "class-names-TRAIN.npy")]
)
def test_what_is_no_index_is_named_with_what_to_do(indexed, tmp_path, kind, name, file):
    path = tmp_path / name / file
    if isinstance(WRONG[kind], bytes):
        path.write_bytes(WRONG[kind])
    else:
        np.save(path, WRONG[kind], allow_pickle=True)
    with pytest.raises(ValueError, match=rf"{path} is damaged or of another kind: (.|\n)*recreate it with:\npython -c"):
        make_dataset(dataset_str=indexed[name])


def test_flipped_and_cut_indices_are_noticed_or_change_nothing(indexed, tmp_path):
    generator = random.Random(0)
    for name, dataset_str in indexed.items():
        targets, images = content(dataset_str)
        for path in sorted((tmp_path / name).glob("*.npy")):
            good = path.read_bytes()
            for _ in range(20):
                damaged = bytearray(good)
                for _ in range(generator.choice([1, 3])):
                    limit = generator.choice([128, len(good)])
                    damaged[generator.randrange(limit)] ^= 1 << generator.randrange(8)
                path.write_bytes(generator.choice([damaged, damaged[: generator.randrange(len(good))], good + b"\0"]))
                try:
                    found, read = content(dataset_str)
                except (ValueError, OSError) as error:
                    assert name in str(error)
                else:
                    assert found == targets
                    assert all(image in (None, right) for image, right in zip(read, images, strict=True))
            path.write_bytes(good)


def test_an_index_of_other_tarballs_reads_nothing(indexed, tmp_path):
    entries = np.load(tmp_path / "22k" / "entries.npy")
    entries["start_offset"][0] += 512
    entries["end_offset"][1] = 2**40
    np.save(tmp_path / "22k" / "entries.npy", entries)
    dataset = make_dataset(dataset_str=indexed["22k"])
    for index in (0, 1):
        with pytest.raises(BadImageError, match=rf"entry {index} is wrong: .*n0.tar: n0_{index}.JPEG is not at bytes"):
            dataset.get_image(index)
    assert dataset.get_image(2).getpixel((0, 0)) == (20, 20, 20)


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.csv", b"x.png\0,1\n", "zero bytes"),
        ("a.txt", "x.png\t1\n".encode("utf-16"), "not in UTF-8"),
        ("a.csv", b'"' + b"x" * 200_000 + b'",1\n', "field larger than field limit"),
        ("a.txt", b"x.png\t" + b"9" * 30 + b"\n", "class index of 30 digits"),
    ],
)
def test_lists_that_are_no_text_or_absurd_are_errors(tmp_path, name, text, message):
    (tmp_path / "x.png").write_bytes(png(1))
    (tmp_path / name).write_bytes(text)
    with pytest.raises(ValueError, match=message):
        make_dataset(dataset_str=f"ImageList:file={tmp_path / name}")


def test_a_folder_or_a_pipe_for_a_list_is_called_what_it_is(tmp_path):
    with pytest.raises(OSError, match="is a folder, not a list; for its images write ImageFolder:root="):
        make_dataset(dataset_str=f"ImageList:file={tmp_path}")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="pipe is a named pipe, not a list"):
        make_dataset(dataset_str=f"ImageList:file={tmp_path / 'pipe'}")


def test_a_stored_list_that_is_inconsistent_is_made_anew(tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    for index in range(3):
        (root / f"{index}.png").write_bytes(png(index))
    os.utime(root, (1_000_000, 1_000_000))
    ImageFolder(root=root)
    (stored,) = (tmp_path / "cache" / "dinov2" / "file_lists").iterdir()
    with np.load(stored) as arrays:
        good = dict(arrays)
    for name, value in {
        "file_ends": np.array([5, 4, 15]),
        "file_data": good["file_data"].astype(np.int64),
        "folder_times": good["folder_times"][:0],
        "kind_counts": np.array([1]),
    }.items():
        np.savez(stored, **(good | {name: value}))
        assert len(ImageFolder(root=root)) == 3
        with np.load(stored) as arrays:
            assert np.array_equal(arrays[name], good[name])


def test_a_damaged_installation_is_named(monkeypatch, tmp_path):
    (tmp_path / "fashion_mnist_12k.npz").write_bytes(b"PK\x03\x04 damaged")
    monkeypatch.setattr("importlib.resources.files", lambda package: tmp_path)
    with pytest.raises(OSError, match=r"fashion_mnist_12k.npz is damaged, install the package again"):
        FashionMNIST(split=FashionMNIST.Split.VAL)


def test_random_dataset_strings_give_datasets_or_clear_errors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    Path("images/0.png").write_bytes(png(1))
    Path("list.txt").write_text("images/0.png\n")
    Path("loop").symlink_to("loop")
    os.mkfifo("pipe")
    generator = random.Random(0)
    values = ["images", "list.txt", "pipe", "loop", "", "/dev/null", "/dev/zero", "\0", "a\nb", "é\ud800", "x" * 5000]
    values += ["%s%d%n", "~nobody", "images:root=images", "images/*.png", "TRAIN", "VAL", "0", "-1", "true"]
    keys = ["root", "split", "extra", "file", "classes", "real", "seed", "partition", "Root", "", "\0", "é"]
    for _ in range(300):
        name = generator.choice([*DATASETS, "ImageFolder", "ImageList", "", "\0", "imagefolder"])
        known = [key for key in DATASETS[name].keys if key != "download"] if name in DATASETS else keys
        chosen = generator.choice([known, generator.sample(keys, 3)])
        parts = [f"{key}={generator.choice(values)}" for key in chosen]
        try:
            dataset = make_dataset(dataset_str=":".join([name, *parts]))
            assert len(dataset) in (1, 2000, 10000)
        except (ValueError, OSError) as error:
            assert str(error)
