"""FashionMNIST reads like any other dataset, from the package or from the full set's own files."""

import gzip
import io
import pickle

import numpy as np
import pytest
from PIL import Image

from dinov2.data.datasets import FashionMNIST, make_dataset

TRAIN, VAL = FashionMNIST.Split.TRAIN, FashionMNIST.Split.VAL


def idx(array):
    """The idx file of an array of bytes."""
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


@pytest.mark.parametrize("split, length", [("TRAIN", 10_000), ("VAL", 2_000)])
def test_the_embedded_part_is_balanced_and_gray(split, length):
    dataset = make_dataset(dataset_str=f"FashionMNIST:split={split}")
    assert len(dataset) == length
    assert np.bincount(dataset.get_targets()).tolist() == [length // 10] * 10
    image, target = dataset[0]
    pixels = np.asarray(image)
    assert (image.mode, pixels.shape, pixels.dtype) == ("RGB", (28, 28, 3), np.uint8)
    assert (pixels == pixels[..., :1]).all()
    assert pixels.max() > 200
    assert target == dataset.get_target(0) == dataset.get_targets()[0]
    assert isinstance(target, int)


def test_the_first_images_are_an_ankle_boot_in_both_splits():
    # As in the published files.
    for split in (TRAIN, VAL):
        assert FashionMNIST(split=split).get_class_name(0) == "ankle boot"


def test_image_data_is_a_file_of_the_same_image():
    dataset = FashionMNIST(split=VAL)
    decoded = Image.open(io.BytesIO(dataset.get_image_data(5))).convert("RGB")
    assert (np.asarray(decoded) == np.asarray(dataset[5][0])).all()
    assert dataset.describe(5) == "FashionMNIST VAL image 5"


def test_transforms_are_applied():
    dataset = FashionMNIST(split=VAL, transform=np.asarray, target_transform=str)
    image, target = dataset[0]
    assert (image.shape, target) == ((28, 28, 3), "9")


def test_a_pickled_copy_is_the_same():
    dataset = FashionMNIST(split=VAL)
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy.get_image_data(7) == dataset.get_image_data(7)


@pytest.fixture
def full():
    """Images and labels of a tiny "full" set by the beginning of its file names."""
    generator = np.random.default_rng(0)
    return {
        name: (generator.integers(0, 256, (length, 28, 28)), generator.integers(0, 10, length))
        for name, length in (("train", 6), ("t10k", 4))
    }


def write(folder, full, *, zipped):
    folder.mkdir(parents=True, exist_ok=True)
    for name, (images, labels) in full.items():
        for file, array in ((f"{name}-images-idx3-ubyte", images), (f"{name}-labels-idx1-ubyte", labels)):
            if zipped:
                (folder / f"{file}.gz").write_bytes(gzip.compress(idx(array)))
            else:
                (folder / file).write_bytes(idx(array))


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("folder", ["", "FashionMNIST/raw"])
def test_the_full_set_from_its_usual_files(tmp_path, full, zipped, folder):
    write(tmp_path / folder, full, zipped=zipped)
    for split, name in (("TRAIN", "train"), ("VAL", "t10k")):
        dataset = make_dataset(dataset_str=f"FashionMNIST:split={split}:root={tmp_path}")
        images, labels = full[name]
        assert dataset.get_targets().tolist() == labels.tolist()
        assert (np.stack([np.asarray(image)[..., 1] for image, _ in dataset]) == images).all()


def test_missing_files_are_named_with_all_their_places(tmp_path):
    with pytest.raises(FileNotFoundError, match="/train-images-idx3-ubyte, .*raw/train-images-idx3-ubyte.gz"):
        FashionMNIST(split=TRAIN, root=tmp_path)


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: b"\0\0\x0d" + data[3:], lambda data: b""])
def test_a_damaged_file_is_named(tmp_path, full, damage):
    write(tmp_path, full, zipped=False)
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="train-images-idx3-ubyte is not a complete idx file"):
        FashionMNIST(split=TRAIN, root=tmp_path)


def test_images_and_labels_must_be_equally_many(tmp_path, full):
    full["train"] = (full["train"][0], full["train"][1][:-1])
    write(tmp_path, full, zipped=False)
    with pytest.raises(ValueError, match="6 images but 5 labels of split TRAIN"):
        FashionMNIST(split=TRAIN, root=tmp_path)
