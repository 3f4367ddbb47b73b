"""ImageNet22k reads images in place from tarballs, wherever their positions come from."""

import gzip
import io
import pickle
import shutil
import subprocess
import tarfile

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from dinov2.data.datasets import ImageNet22k, make_dataset
from dinov2.data.images import BadImageError


def gray_png(value):
    file = io.BytesIO()
    Image.new("L", (8, 8), value).save(file, "PNG")
    return file.getvalue()


# The second class has a longer name, a zipped image and the one that is known to be undecodable.
CLASSES = {
    "n001": {"n001_1.JPEG": gray_png(10), "n001_22.JPEG": gray_png(20)},
    "n06470073": {
        "n06470073_1.JPEG": gzip.compress(gray_png(30)),
        "n06470073_47249.JPEG": b"undecodable",
        "n06470073_3.JPEG": gray_png(40),
    },
    "n900": {"n900_" + "long" * 40 + ".JPEG": gray_png(50)},  # too long for the plain tar header
}
GREYS, TARGETS = [10, 20, 30, 40, 50], [0, 0, 1, 1, 2]


@pytest.fixture
def root(tmp_path):
    for class_id, images in CLASSES.items():
        with tarfile.open(tmp_path / f"{class_id}.tar", "w", format=tarfile.GNU_FORMAT) as tarball:
            for name, data in images.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tarball.addfile(member, io.BytesIO(data))
    return tmp_path


def gray(image):
    return np.asarray(image)[0, 0].tolist()[0]


def dumped(root, **options):
    dataset = ImageNet22k(root=root, extra=root / "extra", transform=gray, **options)
    dataset.dump_extra()
    return dataset


def write_logs(root, class_ids):
    (root / "blocks").mkdir()
    for class_id in class_ids:
        listing = subprocess.run(
            ["tar", "--list", "--block-number", "--file", root / f"{class_id}.tar"], capture_output=True, check=True
        )
        (root / "blocks" / f"{class_id}.log").write_bytes(listing.stdout)


def test_images_and_classes_from_the_headers(root):
    dataset = dumped(root)
    assert list(dataset) == list(zip(GREYS, TARGETS, strict=True))
    assert dataset.get_targets().tolist() == TARGETS
    assert dataset.get_class_ids().tolist() == ["n001"] * 2 + ["n06470073"] * 2 + ["n900"]
    assert (dataset.get_class_id(4), dataset.find_class_id(1)) == ("n900", "n06470073")
    assert dataset.describe(1) == f"{root / 'n001.tar'}: n001_22.JPEG"


@pytest.mark.skipif(shutil.which("tar") is None, reason="needs GNU tar")
def test_listings_by_tar_give_the_same_table(root):
    dumped(root)
    from_headers = np.load(root / "extra" / "entries.npy")
    write_logs(root, ["n001", "n06470073"])
    (root / "n001.tar").rename(root / "hidden")  # the listing is enough ...
    (root / "n001.tar").touch()
    dumped(root)
    assert (np.load(root / "extra" / "entries.npy") == from_headers).all()
    (root / "hidden").rename(root / "n001.tar")  # ... but for reading
    assert [image for image, _ in dumped(root)] == GREYS


def test_offsets_are_of_64_bits_and_files_with_32_are_read(root):
    dataset = dumped(root)
    path = root / "extra" / "entries.npy"
    entries = np.load(path)
    assert {entries.dtype[field].str for field in ("start_offset", "end_offset")} == {"<u8"}
    published = [(name, "<u4" if name.endswith("offset") else entries.dtype[name]) for name in entries.dtype.names]
    np.save(path, entries.astype(published))
    assert [image for image, _ in ImageNet22k(root=root, extra=root / "extra", transform=gray)] == GREYS
    assert dataset.get_image_data(0).startswith(gray_png(10))


def test_an_offset_beyond_4_gib_is_read(root):
    start = 2**32 + 1024
    with (root / "n001.tar").open("r+b") as file:  # a sparse file: takes no space
        file.seek(start)
        member = tarfile.TarInfo("n001_1.JPEG")
        member.size = len(gray_png(99))
        file.write(member.tobuf() + gray_png(99).ljust(1024, b"\0"))
    dataset = dumped(root)
    entries = np.load(root / "extra" / "entries.npy")
    entries["start_offset"][0], entries["end_offset"][0] = start, start + 512 + -(-len(gray_png(99)) // 512) * 512
    np.save(root / "extra" / "entries.npy", entries)
    dataset = ImageNet22k(root=root, extra=root / "extra", transform=gray)
    assert dataset[0] == (99, 0)


def test_the_cache_of_maps_is_bounded_and_drops_the_oldest(root):
    dataset = dumped(root, mmap_cache_size=2)
    for index in (0, 2, 1, 4):  # classes 0, 1, 0, 2
        assert dataset[index] == (GREYS[index], TARGETS[index])
    assert list(dataset._maps) == ["n001", "n900"]
    with pytest.raises(ValueError, match="mmap_cache_size is 0"):
        ImageNet22k(root=root, extra=root, mmap_cache_size=0)


def test_a_pickled_copy_makes_its_own_maps(root):
    dataset = dumped(root)
    assert dataset[0] == (10, 0)
    assert list(pickle.loads(pickle.dumps(dataset))) == list(dataset)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_worker_reads_the_same(root, method):
    dataset = dumped(root)
    assert dataset[0] == (10, 0)  # opens a map before the workers start
    loader = DataLoader(dataset, batch_size=None, num_workers=1, multiprocessing_context=method)
    assert [tuple(sample) for sample in loader] == list(zip(GREYS, TARGETS, strict=True))


def test_the_error_for_missing_tables_names_the_command(root):
    with pytest.raises(FileNotFoundError, match=r"(?s)entries.npy; create .*python -c .*ImageNet22k.*dump_extra\(\)"):
        make_dataset(dataset_str=f"ImageNet22k:root={root}:extra={root}")


def test_a_missing_tarball_names_the_image(root):
    dataset = dumped(root)
    (root / "n900.tar").unlink()
    with pytest.raises(BadImageError, match="sample 4 .*n900.tar: n900_long"):
        dataset[4]


def test_no_tarballs_and_broken_ones_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no tarballs <wnid>.tar in {tmp_path}"):
        dumped(tmp_path)
    (tmp_path / "n1.tar").write_bytes(b"not a tarball" * 100)
    with pytest.raises(ValueError, match="cannot read the tarball .*n1.tar"):
        dumped(tmp_path)


@pytest.mark.parametrize("log", ["", "block 0: n001_1.JPEG\n", "tar: error\nblock 3: ** Block of NULs **\n"])
def test_an_incomplete_listing_is_an_error(root, log):
    (root / "blocks").mkdir()
    (root / "blocks" / "n001.log").write_text(log)
    with pytest.raises(ValueError, match="n001.log is not a complete listing"):
        dumped(root)
