"""The sets of torchvision read as what was written in the files that it expects; nothing is downloaded unasked.

What is written is random images with known classes; only the checksums of the published files are not compared.
"""

import gzip
import io
import pickle
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
import pytest
import torchvision.datasets
from PIL import Image
from torchvision_layouts import LAYOUTS

from dinov2.data.datasets import TorchvisionSet, make_dataset, parse_dataset_str
from dinov2.data.datasets.torchvision_sets import split_samples
from dinov2.data.datasets.torchvision_sources import SOURCES
from dinov2.data.images import BadImageError


@pytest.fixture(autouse=True)
def any_checksum(monkeypatch):
    monkeypatch.setattr(torchvision.datasets.utils, "check_md5", lambda *arguments, **options: True)


def write(name, root):
    return LAYOUTS[name](root)


def rgb(pixels):
    return Image.fromarray(pixels).convert("RGB").tobytes()


def content(dataset):
    """The samples in an order that does not depend on that of the dataset."""
    return sorted(((image.tobytes(), target) for image, target in dataset), key=lambda sample: sample[0])


def expected(samples):
    return sorted(((rgb(image), target) for image, target in samples), key=lambda sample: sample[0])


def dataset_str(name, root, split=None, **options):
    keys = ({} if split is None else {"split": split}) | {"root": root} | options
    return name + "".join(f":{key}={value}" for key, value in keys.items())


def test_every_set_is_tried():
    assert set(LAYOUTS) == set(SOURCES)


@pytest.mark.parametrize("name", LAYOUTS)
def test_images_and_classes_are_those_that_were_written(name, tmp_path):
    truth = write(name, tmp_path)
    class_names = []
    for split, samples in truth.items():
        dataset = make_dataset(dataset_str=dataset_str(name, tmp_path, split))
        assert len(dataset) == len(samples) > 0
        assert content(dataset) == expected(samples)
        targets = [target for _, target in dataset]
        assert targets == [dataset.get_target(index) for index in range(len(dataset))]
        if None in targets:
            assert dataset.get_targets() is None
        else:
            assert dataset.get_targets().tolist() == targets
            assert dataset.get_targets().dtype == np.int64
        for index in (0, len(dataset) - 1):
            decoded = Image.open(io.BytesIO(dataset.get_image_data(index))).convert("RGB")
            assert decoded.tobytes() == dataset[index][0].tobytes()
            assert str(tmp_path) in dataset.describe(index) or name in dataset.describe(index)
        assert content(pickle.loads(pickle.dumps(dataset))) == content(dataset)
        class_names.append(dataset.classes)
    # Evaluations compare the names of the classes of the sets they train and test on.
    assert class_names[1:] == class_names[:-1] or name == "EMNIST"
    if name not in ("GTSRB", "SEMEION", "USPS", "SVHN", "FER2013", "PCAM", "CLEVRClassification"):
        assert all(class_names)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_split_is_one_that_torchvision_knows(name, tmp_path):
    # An empty folder is answered with "not there", a name that torchvision does not know with another error.
    for split in SOURCES[name].split_names:
        with pytest.raises(FileNotFoundError, match=f"no {name} in {tmp_path}: "):
            make_dataset(dataset_str=dataset_str(name, tmp_path, split))
        (tmp_path / "x" / SOURCES[name].content).mkdir(parents=True, exist_ok=True)
        with pytest.raises(FileNotFoundError, match=f"no {name} in {tmp_path}/x: "):
            make_dataset(dataset_str=dataset_str(name, tmp_path / "x", split))


@pytest.mark.parametrize(
    "name, known", [("CIFAR10", "TRAIN, TEST"), ("Imagenette", "TRAIN, VAL"), ("EuroSAT", "TRAIN, T")]
)
def test_a_split_that_was_not_published_is_answered_with_those_that_were(name, known):
    wrong = "TEST" if name == "Imagenette" else "VAL"
    with pytest.raises(ValueError, match=f"unknown split '{wrong}' in .*; known: {known}"):
        make_dataset(dataset_str=dataset_str(name, "/data", wrong))
    with pytest.raises(ValueError, match=f"{name} has no split '{wrong}'; it has {known}"):
        TorchvisionSet(name, root="/data", split=wrong)


def test_a_published_division_must_be_chosen_from():
    with pytest.raises(ValueError, match=r"missing split in .*; write CIFAR10:split=TRAIN\|TEST:root=...\[:download="):
        make_dataset(dataset_str="CIFAR10:root=/data")


# --- Missing, broken, downloaded -------------------------------------------------------------------------------------


def test_the_error_for_a_missing_dataset_has_the_string_that_downloads_it(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        make_dataset(dataset_str=dataset_str("DTD", tmp_path, "VAL", partition=3))
    message, _, download = str(caught.value).partition("; to download it: ")
    assert message == f"no DTD in {tmp_path}: {tmp_path}/dtd does not exist"
    keys = {"split": "VAL", "root": str(tmp_path), "partition": "3", "download": "true"}
    assert parse_dataset_str(download) == ("DTD", keys)
    assert list(tmp_path.iterdir()) == []


def test_the_error_names_datasets_that_torchvision_cannot_download(tmp_path):
    with pytest.raises(FileNotFoundError, match="stanford_cars does not exist; torchvision cannot download it"):
        make_dataset(dataset_str=dataset_str("StanfordCars", tmp_path, "TRAIN"))
    with pytest.raises(ValueError, match="unknown key 'download'"):
        make_dataset(dataset_str=dataset_str("StanfordCars", tmp_path, "TRAIN", download="true"))


def test_files_of_another_checksum_are_refused(tmp_path, monkeypatch):
    cifar10 = LAYOUTS["CIFAR10"]
    cifar10(tmp_path)
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError, match="not found or corrupted; to download it"):
        make_dataset(dataset_str=dataset_str("CIFAR10", tmp_path, "TRAIN"))


def test_lists_without_images_are_noticed(tmp_path):
    write("Places365", tmp_path)
    shutil.rmtree(tmp_path / "val_large")
    with pytest.raises(FileNotFoundError, match=f"no Places365 in .*: no images in {tmp_path}/val_large"):
        make_dataset(dataset_str=dataset_str("Places365", tmp_path, "VAL"))


def test_a_malformed_file_is_named_with_its_set(tmp_path):
    write("OxfordIIITPet", tmp_path)
    (tmp_path / "oxford-iiit-pet" / "annotations" / "test.txt").write_text("no columns\n")
    with pytest.raises(ValueError, match=f"cannot read OxfordIIITPet in {tmp_path}: ValueError: not enough values"):
        make_dataset(dataset_str=dataset_str("OxfordIIITPet", tmp_path, "TEST"))


def test_labels_need_no_image_and_a_broken_one_is_named(tmp_path):
    truth = write("EuroSAT", tmp_path)
    files = sorted(tmp_path.rglob("*.jpg"))
    for file in files:
        file.write_bytes(b"broken")
    dataset = make_dataset(dataset_str=dataset_str("EuroSAT", tmp_path))
    assert np.bincount(dataset.get_targets()).tolist() == [6, 6, 6]
    assert len(truth[None]) == 18
    with pytest.raises(BadImageError, match="sample 3") as caught:
        dataset[3]
    assert caught.value.path == dataset.describe(3) == str(files[3])


@pytest.mark.parametrize("name", ["Flowers102", "StanfordCars", "SVHN"])
def test_a_missing_package_is_named(name, tmp_path, monkeypatch):
    write(name, tmp_path)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(ValueError, match="pip install scipy$"):
        make_dataset(dataset_str=dataset_str(name, tmp_path, "TRAIN"))


def test_a_missing_package_for_pcam_is_named(tmp_path, monkeypatch):
    (tmp_path / "pcam").mkdir()
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ValueError, match="cannot read PCAM: h5py is not found.*pip install h5py"):
        make_dataset(dataset_str=dataset_str("PCAM", tmp_path, "TEST"))


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A server of Kuzushiji-MNIST, used by torchvision; yields the requests that it gets."""
    raw = tmp_path / "published" / "KMNIST" / "raw"
    (tmp_path / "published").mkdir()
    LAYOUTS["KMNIST"](tmp_path / "published")
    for file in list(raw.iterdir()):
        (raw / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
    requests = []

    class Handler(SimpleHTTPRequestHandler):
        def log_request(self, *_):
            requests.append(self.path)

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=raw))
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(torchvision.datasets.KMNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
    yield requests
    server.shutdown()
    server.server_close()


def test_a_download_happens_once_and_only_on_request(tmp_path, mirror):
    root = tmp_path / "data"
    with pytest.raises(
        FileNotFoundError, match=f"{root} does not exist; to download it: KMNIST:split=TRAIN:root={root}:"
    ):
        make_dataset(dataset_str=dataset_str("KMNIST", root, "TRAIN"))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        make_dataset(dataset_str=dataset_str("KMNIST", root, "TRAIN", download="false"))
    assert mirror == [] and not root.exists()
    string = dataset_str("KMNIST", root, "TRAIN", download="true")
    with ThreadPoolExecutor(3) as pool:  # like the processes of a distributed run
        datasets = list(pool.map(lambda _: make_dataset(dataset_str=string), range(3)))
    assert content(datasets[0]) == content(datasets[1]) == content(datasets[2])
    assert datasets[0].get_targets().tolist() == [5, 0, 9]
    assert sorted(set(mirror)) == sorted(f"/{file}" for file, _ in torchvision.datasets.KMNIST.resources)
    num_requests = len(mirror)
    assert num_requests == 8  # each file is asked for its address, then for itself
    make_dataset(dataset_str=string)
    assert len(mirror) == num_requests


def test_a_missing_network_is_reported(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    with pytest.raises(OSError, match=f"cannot download MNIST to {tmp_path}: .*refused"):
        make_dataset(dataset_str=dataset_str("MNIST", tmp_path, "TRAIN", download="true"))


def test_what_is_there_is_not_downloaded(tmp_path):
    write("SUN397", tmp_path)
    assert len(make_dataset(dataset_str=dataset_str("SUN397", tmp_path, download="True"))) == 6


# --- Options ---------------------------------------------------------------------------------------------------------


def test_options_are_passed_on(tmp_path):
    write("DTD", tmp_path)
    write("FGVCAircraft", tmp_path)
    write("STL10", tmp_path)
    assert len(make_dataset(dataset_str=dataset_str("DTD", tmp_path, "TRAIN", partition=2))) == 1
    aircraft = make_dataset(dataset_str=dataset_str("FGVCAircraft", tmp_path, "VAL", annotation_level="family"))
    assert (aircraft.classes, aircraft.get_targets().tolist()) == (["Boeing 707", "Falcon"], [1])
    fold = make_dataset(dataset_str=dataset_str("STL10", tmp_path, "TRAIN", folds=0))
    assert fold.get_targets().tolist() == [0, 4]


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("DTD", {"partition": "two"}, "partition must be an integer, got 'two'"),
        ("Places365", {"small": "yes"}, "small must be true or false, got 'yes'"),
        ("CIFAR10", {"download": "please"}, "download must be true or false, got 'please'"),
        ("FGVCAircraft", {"annotation_level": "wing"}, "cannot read FGVCAircraft .*'wing'.*family"),
        ("CIFAR10", {"seed": "3"}, "unknown key 'seed'"),
    ],
)
def test_wrong_options_are_answered(name, options, message, tmp_path):
    (tmp_path / SOURCES[name].content).mkdir()
    with pytest.raises(ValueError, match=message):
        make_dataset(dataset_str=dataset_str(name, tmp_path, "TRAIN", **options))


def test_options_of_other_sets_are_refused():
    with pytest.raises(ValueError, match="DTD has no option folds; it has partition"):
        TorchvisionSet("DTD", root="/data", split="TRAIN", folds=1)
    with pytest.raises(ValueError, match="unknown dataset 'CIFAR'; known: CIFAR10, CIFAR100"):
        TorchvisionSet("CIFAR", root="/data")


# --- Our own division of undivided sets ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, source in SOURCES.items() if not source.splits])
def test_split_samples_divides_every_class(name, tmp_path):
    truth = write(name, tmp_path)
    train, test = (make_dataset(dataset_str=dataset_str(name, tmp_path, split)) for split in ("TRAIN", "TEST"))
    assert sorted(content(train) + content(test)) == expected(truth[None])
    sizes = np.bincount([label for _, label in truth[None]])
    assert np.bincount(train.get_targets()).tolist() == [max(1, size * 4 // 5) if size else 0 for size in sizes]
    assert train.classes == test.classes


def test_split_samples_depends_on_names_and_seed_alone():
    names = [f"{label}/{number}.jpg" for label in "ab" for number in range(50)]
    labels = np.repeat([0, 1], 50)
    train = {names[index] for index in split_samples(names, labels, "TRAIN", seed=0)}
    assert len(train) == 80
    shuffled = np.random.default_rng(0).permutation(100)
    again = split_samples([names[index] for index in shuffled], labels[shuffled], "TRAIN", seed=0)
    assert {names[shuffled[index]] for index in again} == train
    assert {names[index] for index in split_samples(names, labels, "TRAIN", seed=1)} != train
    # For ever: another result would make results incomparable.
    assert split_samples(names[:10], labels[:10], "TEST", seed=0) == [0, 8]


def test_a_seed_without_a_division_is_an_error():
    with pytest.raises(ValueError, match="seed=1 needs a split"):
        make_dataset(dataset_str="EuroSAT:root=/data:seed=1")
