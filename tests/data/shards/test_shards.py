"""Tar shards and zip files: every image with its bytes and label, wherever it is; what is odd or broken is named."""

import json
import logging
import os
import subprocess
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from archive_files import image_bytes, levels, write_tar
from PIL import Image

from dinov2.data.datasets import make_dataset
from dinov2.data.datasets.base import ChangedDataError
from dinov2.data.images import BadImageError
from dinov2.data.shards.archives import ArchiveError
from dinov2.data.shards.names import expand

LONG = "a_very_long_folder_name/" * 12 + "and_a_very_long_name_" * 4  # GNU and pax need more than one header for it


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dinov2" / "shards"


def age(*paths: Path) -> None:
    """Make files old enough that changing them shows in their time, so that their index is cached."""
    for path in paths:
        os.utime(path, (1e9, 1e9))


def dataset_of(text: str):
    return make_dataset(dataset_str=text)


# --- Formats ---------------------------------------------------------------------------------------------------------


def test_shards_of_the_webdataset_library(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    level = 0
    for shard in range(3):
        with webdataset.TarWriter(str(tmp_path / f"shard-{shard:04d}.tar")) as writer:
            for sample in range(4):
                row = {"__key__": f"{shard}/{sample:05d}", "png": image_bytes(level), "cls": level % 3}
                writer.write(row | {"json": {"name": "abc"[level % 3], "id": level}})
                level += 1
    dataset = dataset_of(f"Tar:files={tmp_path}/shard-{{0000..0002}}.tar")
    assert levels(dataset) == list(range(12))
    assert dataset.get_targets().tolist() == [level % 3 for level in range(12)]
    assert dataset.describe(5) == f"{tmp_path}/shard-0001.tar: 1/00001.png"
    named = dataset_of(f"Tar:files={tmp_path}/*.tar:label=json:name")
    assert named.classes == ["a", "b", "c"] and named.get_targets().tolist() == dataset.get_targets().tolist()
    assert named.get_class_name(4) == "b"


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_may_be_long(form: int, tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [(f"{LONG}{i}.png", image_bytes(i)) for i in range(3)], form)
    dataset = dataset_of(f"Tar:files={tmp_path}/a.tar")
    assert levels(dataset) == [0, 1, 2] and dataset.describe(1).endswith(f"{LONG}1.png")


def test_a_folder_packed_by_gnu_tar_has_its_folders_as_classes(tmp_path: Path) -> None:
    for index, name in enumerate(["cat/a.b.png", "cat/c.png", "dog/deep/e.png", "dog/.hidden.png", "dog/text.md"]):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image_bytes(index))
    for words in (["images"], ["-C", "images", "."]):
        subprocess.run(["tar", "--sort=name", "-cf", "all.tar", *words], cwd=tmp_path, check=True)
        dataset = dataset_of(f"Tar:files={tmp_path}/all.tar")
        assert (levels(dataset), dataset.classes) == ([0, 1, 2], ["cat", "dog"])
        assert dataset.get_targets().tolist() == [0, 0, 1]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zip_files(method: int, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", method) as archive:
        archive.mkdir("train")
        for index in range(5):
            archive.writestr(f"train/{'xy'[index % 2]}/{index}.png", image_bytes(index))
    dataset = dataset_of(f"Zip:files={tmp_path}")
    assert levels(dataset) == [0, 1, 2, 3, 4] and dataset.get_targets().tolist() == [0, 1, 0, 1, 0]


def test_one_of_several_images_of_a_sample_is_chosen(tmp_path: Path) -> None:
    files = [(f"{i}.{name}.png", image_bytes(10 * i + j)) for i in range(2) for j, name in enumerate(("left", "right"))]
    path = write_tar(tmp_path / "a.tar", [*files, ("0.txt", b"cat"), ("1.txt", b"ant\n")])
    with pytest.raises(ArchiveError, match=r"sample 0 has several images, left.png and right.png: .*:image=right.png"):
        dataset_of(f"Tar:files={path}")
    dataset = dataset_of(f"Tar:files={path}:image=right.png:label=txt")
    assert levels(dataset) == [1, 11] and dataset.classes == ["ant", "cat"] and dataset.get_targets().tolist() == [1, 0]


def test_links_in_an_archive_are_the_files_that_they_lead_to(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
    (folder / "a" / "0.png").write_bytes(image_bytes(7))
    os.link(folder / "a" / "0.png", folder / "b" / "1.png")
    (folder / "b" / "2.png").symlink_to("../a/0.png")
    (folder / "b" / "3.png").symlink_to("/elsewhere.png")
    subprocess.run(["tar", "--sort=name", "-C", "images", "-cf", "all.tar", "."], cwd=tmp_path, check=True)
    dataset = dataset_of(f"Tar:files={tmp_path}/all.tar")
    assert levels(dataset) == [7, 7, 7] and dataset.get_targets().tolist() == [0, 1, 1]
    assert "1 of 3 link(s) lead to no file in the archive" in dataset.notes_on_files()[0]


def test_dots_in_names_make_no_samples_of_plain_images(tmp_path: Path) -> None:
    files = [("x/a.v1.png", image_bytes(1)), ("x/a.v2.png", image_bytes(2)), ("README.md", b"two")]
    dataset = dataset_of(f"Tar:files={write_tar(tmp_path / 'a.tar', files)}")
    assert levels(dataset) == [1, 2]


# --- Faults ----------------------------------------------------------------------------------------------------------


def test_a_truncated_archive_is_named_with_what_it_holds(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [(f"{i}.png", image_bytes(i)) for i in range(9)])
    content = path.read_bytes()
    path.write_bytes(content[: 7 * 1024 + 700])
    with pytest.raises(ArchiveError, match=r"a.tar is no tar archive, or is damaged or truncated after 8 files"):
        dataset_of(f"Tar:files={path}")
    path.write_bytes(content[: 7 * 1024])  # between two files, which tar itself does not notice
    dataset = dataset_of(f"Tar:files={path}")
    assert len(dataset) == 7 and "no mark at its end after 7 files" in dataset.notes_on_files()[0]


def test_a_damaged_header_or_a_hole_hides_no_files(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [(f"{i}.png", image_bytes(i)) for i in range(9)])
    content = bytearray(path.read_bytes())
    for start, damage in ((4 * 1024 + 150, b"x"), (4 * 1024, bytes(2048))):
        path.write_bytes(content[:start] + damage + content[start + len(damage) :])
        with pytest.raises(ArchiveError, match=r"a.tar goes on after .* after 4 files"):
            dataset_of(f"Tar:files={path}")
    path.write_bytes(2 * bytes(content))
    with pytest.raises(ArchiveError, match="after 9 files; several archives in one file"):
        dataset_of(f"Tar:files={path}")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["gzip", "-k", "a.tar"], r"a.tar.gz is compressed \(gzip\).*decompress it first"),
        (["cp", "a.png", "a.tar.gz"], "no tar archive"),
    ],
)
def test_other_files_are_no_tar_archives(command: list[str], message: str, tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("a.png", image_bytes(1))])
    (tmp_path / "a.png").write_bytes(image_bytes(1))
    subprocess.run(command, cwd=tmp_path, check=True)
    with pytest.raises(ArchiveError, match=message):
        dataset_of(f"Tar:files={tmp_path}/a.tar.gz")


def test_a_zip_file_that_is_cut_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.png", image_bytes(0))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ArchiveError, match="a.zip is no zip archive, or is damaged or truncated"):
        dataset_of(f"Zip:files={path}")


def test_a_name_that_comes_twice_counts_once_and_is_reported(tmp_path: Path) -> None:
    files = [("a.png", image_bytes(1)), ("b.png", image_bytes(2)), ("a.png", image_bytes(3))]
    path = write_tar(tmp_path / "a.tar", files)
    dataset = dataset_of(f"Tar:files={path}")
    assert levels(dataset) == [3, 2]
    assert "1 file(s) have the name of an earlier one, such as a.png" in dataset.notes_on_files()[0]


def test_missing_labels_are_counted_and_labels_are_not_used(tmp_path: Path) -> None:
    files = [(f"{i}.png", image_bytes(i)) for i in range(3)] + [("0.cls", b"4"), ("2.cls", b"7")]
    dataset = dataset_of(f"Tar:files={write_tar(tmp_path / 'a.tar', files)}")
    assert dataset.get_targets() is None and len(dataset) == 3
    assert f"1 of 3 samples have no label, such as {tmp_path}/a.tar: 1.png" in dataset.notes_on_files()[0]


def test_an_image_that_is_broken_is_one_bad_image(tmp_path: Path) -> None:
    files = [("a.png", image_bytes(1)), ("b.png", image_bytes(2)[:40]), ("c.png", image_bytes(3))]
    dataset = dataset_of(f"Tar:files={write_tar(tmp_path / 'a.tar', files)}")
    with pytest.raises(BadImageError, match=r"sample 1 \(.*a.tar: b.png\)"):
        dataset.get_image(1)
    assert dataset.get_image(2).getpixel((0, 0))[0] == 3


@pytest.mark.parametrize("new_file", [False, True])
def test_an_archive_that_changes_ends_the_run(new_file: bool, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [(f"{i}.png", image_bytes(i)) for i in range(3)])
    dataset = dataset_of(f"Tar:files={path}")
    other = write_tar(tmp_path / "b.tar", [(f"{i}.png", image_bytes(9 - i)) for i in range(3)]).read_bytes()
    if new_file:
        path.unlink()
        dataset._descriptors.clear()  # as in another process
    path.write_bytes(other)
    with pytest.raises(ChangedDataError, match=r"a.tar has changed since its files were listed"):
        dataset.get_image(0)


def test_an_archive_that_is_deleted_ends_the_run(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.png", image_bytes(1))])
    dataset = dataset_of(f"Tar:files={path}")
    dataset._descriptors.clear()  # as in another process
    path.unlink()
    with pytest.raises(ChangedDataError, match=r"a.tar is gone since its files were listed"):
        dataset.get_image(0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("files=FOLDER/missing.tar", "no such file or folder"),
        ("files=FOLDER/*.tgz", "no such file or folder"),
        ("files=FOLDER/{3..1}.tar", "range {3..1} in files=.* has 0 numbers"),
        ("files=FOLDER/a.tar,FOLDER/*.tar", "names .*a.tar twice"),
        ("files=FOLDER/a.tar:label=json", "label must be cls, txt or json:KEY, got 'json'"),
        ("files=FOLDER/a.tar:image=webp", r"no images \*.webp in .*a.tar; it holds: 1 png, 1 json"),
        ("files=FOLDER/a.tar:label=txt", "label=txt: no sample has it, such as .*a.tar: a.png"),
        ("files=FOLDER/a.tar:label=json:x", "the JSON of a.png is malformed"),
    ],
)
def test_wrong_keys(text: str, message: str, tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("a.png", image_bytes(1)), ("a.json", b"{")])
    with pytest.raises((ValueError, OSError), match=message):
        dataset_of(f"Tar:{text.replace('FOLDER', str(tmp_path))}")


# --- The index -------------------------------------------------------------------------------------------------------


def test_an_index_is_made_once_and_again_when_its_archive_changes(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.png", image_bytes(1)), ("a.cls", b"5"), ("a.png", image_bytes(2))])
    age(path)
    first = dataset_of(f"Tar:files={path}")
    (stored,) = cache.iterdir()
    content = path.read_bytes()
    path.write_bytes(bytes(len(content)))  # were it listed again, it would be refused
    age(path)
    again = dataset_of(f"Tar:files={path}")
    assert (again.fingerprint(), again.notes_on_files()) == (first.fingerprint(), first.notes_on_files())
    assert again.get_targets().tolist() == [5]
    stored.write_bytes(stored.read_bytes()[:50])
    path.write_bytes(content)
    age(path)
    with caplog.at_level(logging.INFO):
        assert levels(dataset_of(f"Tar:files={path}")) == [2]
    assert "is damaged and is rebuilt" in caplog.text


def test_patterns(tmp_path: Path) -> None:
    for name in ("a-08", "a-09", "a-10", "b-x", "b-y"):
        (tmp_path / f"{name}.tar").touch()

    def names(pattern: str) -> str:
        return " ".join(Path(str(path)).stem for path in expand(pattern.replace("F", str(tmp_path)), ".tar"))

    assert names("F/a-{08..10}.tar") == "a-08 a-09 a-10"
    assert names("F/b-{y,x}.tar,F/a-1*.tar") == "b-y b-x a-10"
    assert names("F") == "a-08 a-09 a-10 b-x b-y"


def test_samples_are_those_of_the_same_images_in_a_folder(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for index in range(12):
        path = tmp_path / "images" / f"class{index % 3}" / f"{index:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(path)
    subprocess.run(["tar", "--sort=name", "-C", "images", "-cf", "all.tar", "."], cwd=tmp_path, check=True)
    folder, shards = dataset_of(f"ImageFolder:root={tmp_path}/images"), dataset_of(f"Tar:files={tmp_path}/all.tar")
    assert shards.classes == folder.classes and (shards.get_targets() == folder.get_targets()).all()
    assert all(shards.get_image_data(i) == folder.get_image_data(i) for i in range(12))
    assert json.dumps([*shards.image_files()]) == json.dumps([f"{tmp_path}/all.tar"] * 12)
