"""Image files that must not hang a run, start a program or fill the memory, and paths that are no image files."""

import io
import os
import struct
import tarfile
import time
import zlib
from contextlib import suppress
from importlib.util import find_spec

import numpy as np
import pytest
import tifffile
from PIL import Image

from dinov2.data.datasets import ImageFolder, ImageList, ImageNet22k, file_list, image_net_22k, make_dataset
from dinov2.data.images import BadImageError, ImageDecodeError, ImageOptions, decode_image, open_image

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path):
    (tmp_path / "images").mkdir()
    for index in range(3):
        Image.new("RGB", (8, 8), (index, 9, 9)).save(tmp_path / "images" / f"{index}.png")
    return tmp_path / "images"


def encode(image, file_format, **options):
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def jpeg_of_scans(count, side):
    data = encode(NOISE, "JPEG", progressive=True)
    last, frame = data.rindex(b"\xff\xda"), data.index(b"\xff\xc2")
    size = struct.pack(">HH", side, side)
    return data[: frame + 5] + size + data[frame + 9 : -2] + data[last:-2] * count + b"\xff\xd9"


def tiff_whose_tags_share(num_tags, size):
    """Each tag points to the same bytes: a library that copies them needs num_tags * size bytes."""
    entries = b"".join(struct.pack("<HHII", 1000 + index, 7, size, 0) for index in range(num_tags))
    return b"II*\0" + struct.pack("<IH", 8, num_tags) + entries + bytes(4 + size)


JPEG, PNG = encode(NOISE, "JPEG"), encode(NOISE, "PNG")
SLOW = {
    "3,000 scans": (jpeg_of_scans(3000, 8000), "8000 x 8000 pixels in 3,0.. scans"),
    "50 scans of a huge image": (jpeg_of_scans(50, 13000), "scans"),
    "padding before a marker": (JPEG[:2] + b"\xff" * 10**7 + JPEG[2:], "10,000 segments"),
    "empty segments": (JPEG[:2] + b"\xff\xe1\0\2" * 10**6 + JPEG[2:], "10,000 segments"),
    "empty chunks": (PNG[:33] + chunk(b"teST", b"") * 10**6 + PNG[33:], "200,000 chunks"),
    "comments": (b"GIF89a" + bytes(7) + (b"\x21\xfe" + (b"\xff" + bytes(255)) * 20_000 + b"\0"), "comments"),
    "extensions": (b"GIF89a" + bytes(7) + b"\x21\xfe\0" * 10**6, "10,000 blocks"),
    "tags that share a value": (tiff_whose_tags_share(4000, 2**22), "tags claim"),
    "too many tags": (b"II*\0" + struct.pack("<IH", 8, 65535) + bytes(12 * 65535 + 4), "65,535 tags"),
    "plain text": (b"P3\n4000 4000\n255\n" + b"1 2 3 " * 6 * 10**6, "plain text"),
}


@pytest.mark.parametrize("name", SLOW)
def test_a_file_that_would_take_minutes_is_refused_at_once(name):
    data, reason = SLOW[name]
    started = time.process_time()
    with pytest.raises(ImageDecodeError, match=reason):
        decode_image(data)
    assert time.process_time() - started < 2


def test_a_tiff_of_a_million_strips_is_refused():
    tags = [(256, 4, 1, 1), (257, 4, 1, 10**6), (273, 4, 10**6, 100), (279, 4, 10**6, 100)]
    data = b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
    with pytest.raises(ImageDecodeError, match="1,000,000 strips"):
        decode_image(data + bytes(4 * 10**6))


@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP"])
def test_a_text_that_unzips_to_gigabytes_is_not_unzipped(kind):
    data = PNG[:33] + chunk(kind, b"a\0\0" + zlib.compress(bytes(3 * 10**8), 1)) + PNG[33:]
    started = time.process_time()
    with suppress(ImageDecodeError):  # depends on the version of Pillow
        decode_image(data)
    assert time.process_time() - started < 0.2


def test_a_large_exif_block_is_not_multiplied():
    exif = tiff_whose_tags_share(4000, 2**22)
    image = open_image(PNG[:33] + chunk(b"eXIf", exif) + PNG[33:])
    assert image.load().size == (64, 64)


def test_ordinary_progressive_files_are_read():
    assert decode_image(encode(NOISE.resize((2000, 2000)), "JPEG", progressive=True)).size == (2000, 2000)


def test_the_first_frame_of_thousands_is_read_at_once():
    frames = [Image.new("L", (8, 8), index % 255) for index in range(2000)]
    image = open_image(encode(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert image.has_more_frames
    assert image.load().getpixel((0, 0)) == (0, 0, 0)


@pytest.mark.parametrize("file_format", ["EPS", "PDF", "TGA", "PCX", "ICO", "SGI"])
def test_formats_that_are_not_on_the_list_are_not_opened(file_format):
    with pytest.raises(ImageDecodeError, match="no supported image format .JPEG, PNG"):
        decode_image(encode(NOISE.convert("RGB"), file_format))


def test_an_eps_file_named_jpg_starts_no_program(root, tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (tmp_path / "bin" / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin", prepend=os.pathsep)
    (root / "x.jpg").write_bytes(encode(NOISE, "EPS"))
    with pytest.raises(BadImageError, match=r"x\.jpg.*it is PostScript"):
        ImageFolder(root=root).get_image(3)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "data, what",
    [
        (b"<!DOCTYPE html>", "failed download"),
        (bytes(4) + b"ftypheic" + bytes(40), "HEIC: convert"),
        (bytes(128) + b"DICM", "DICOM"),
        (bytes(1000), "only zero bytes"),
        (b"\xff\xd8\xff\xe0", "4 bytes: they end within the header"),
        (b"GIF89a", "6 bytes: they end within the header"),
        (b"", "empty"),
        (b"PK\x03\x04" + bytes(40), "zip archive"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ],
)
def test_the_error_names_the_kind_of_a_file_that_is_not_an_image(data, what):
    with pytest.raises(ImageDecodeError, match=what):
        decode_image(data)


@pytest.mark.parametrize("file_format", ["JPEG2000", "AVIF", "WEBP", "BMP", "GIF", "PPM", "TIFF", "PNG", "JPEG", "MPO"])
def test_formats_on_the_list_are_read(file_format):
    if file_format == "AVIF" and not find_spec("PIL.AvifImagePlugin"):
        pytest.skip("AVIF needs Pillow 11.3")
    image = decode_image(encode(Image.new("RGB", (16, 16), (200, 100, 50)), file_format))
    assert np.abs(np.asarray(image, int) - (200, 100, 50)).max() <= 4


def test_too_many_pixels_name_number_limit_and_key():
    data = encode(Image.new("L", (200, 95)), "PNG")
    assert decode_image(data, ImageOptions(max_pixels=19_000)).size == (200, 95)
    with pytest.raises(ImageDecodeError, match=r"19,000 pixels \(200 x 95\), limit 18,999 \(images.max_pixels\)"):
        decode_image(data, ImageOptions(max_pixels=18_999))


def test_the_limit_on_pixels_may_be_above_pillows(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert decode_image(encode(Image.new("L", (200, 95)), "PNG")).size == (200, 95)


def test_a_file_above_the_limit_is_not_read(root):
    with (root / "huge.png").open("wb") as file:
        file.truncate(3 * 2**20)  # sparse
    dataset = make_dataset(dataset_str=f"ImageFolder:root={root}", image_options=ImageOptions(max_file_size=2))
    with pytest.raises(BadImageError, match=r"huge.png has 3 MiB, limit 2 \(images.max_file_size\)"):
        dataset.get_image(3)


# --- What lies in folders ---


def test_what_is_no_regular_file_is_passed_over_and_counted(root):
    os.mkfifo(root / "a.jpg")
    (root / "zero.jpg").symlink_to("/dev/zero")
    (root / "b.jpg").mkdir()
    dataset = ImageFolder(root=root)
    assert len(dataset) == 3
    assert dataset.notes_on_files() == [f"{root}: ignored 2 other file(s): 1 a device, 1 a named pipe"]


def test_links_to_nothing_and_to_themselves_are_unreadable_images(root):
    (root / "d.jpg").symlink_to("nowhere.jpg")
    (root / "self.jpg").symlink_to("self.jpg")
    dataset = ImageFolder(root=root)
    assert len(dataset) == 5
    for index in (3, 4):
        with pytest.raises(BadImageError, match="No such file|Too many levels"):
            dataset.get_image(index)


def test_links_that_multiply_folders_end(root, monkeypatch):
    monkeypatch.setattr(file_list, "_MAX_VISITS", 20)
    for name in "abcdef":
        (root / name).mkdir()
        for other in "abcdef":
            (root / name / other).symlink_to(root / other)
    with pytest.raises(OSError, match="more than 20 times"):
        ImageFolder(root=root)


def test_a_named_pipe_in_a_list_is_an_unreadable_image(root):
    os.mkfifo(root / "pipe.png")
    (root / "list.txt").write_text("0.png\npipe.png\n")
    with pytest.raises(BadImageError, match="pipe.png is a named pipe"):
        ImageList(file=root / "list.txt").get_image(1)


def test_a_folder_in_a_list_is_an_unreadable_image(root):
    (root / "list.txt").write_text("0.png\n../images\n")
    with pytest.raises(BadImageError, match=r"\.\./images is a folder, not a regular file"):
        ImageList(file=root / "list.txt").get_image(1)


def test_other_files_are_counted_by_suffix_also_from_the_stored_list(root, caplog):
    caplog.set_level("INFO")
    for name in ("a.txt", "b.txt", "c.HEIC", "README"):
        (root / name).touch()
    os.utime(root, (1_000_000, 1_000_000))
    for listed in ("found in", "as listed in"):
        caplog.clear()
        make_dataset(dataset_str=f"ImageFolder:root={root}")
        assert f"{root}: ignored 4 other file(s): 2 .txt, 1 .heic, 1 without suffix" in caplog.messages
        assert any(listed in message for message in caplog.messages)


@pytest.mark.parametrize("suffix", ["jfif", "jp2", "avif", "JPE", "apng", "pbm"])
def test_all_suffixes_of_the_formats_are_images(root, suffix):
    (root / f"x.{suffix}").write_bytes(PNG)
    assert len(ImageFolder(root=root)) == 4


# --- Paths that are no folders ---


def make_tar(path):
    with tarfile.open(path, "w") as tar:
        tar.addfile(tarfile.TarInfo("0.png"))


@pytest.mark.parametrize(
    "name, make, what",
    [
        ("shard.tar", make_tar, "a tar archive: write Tar:files=..."),
        ("shard-without-suffix", make_tar, "a tar archive: write Tar:files=..."),
        ("x.zip", lambda path: path.write_bytes(b"PK\x03\x04"), "a zip archive: write Zip:files=..."),
        ("x.tar.gz", lambda path: path.touch(), "a compressed tar archive: unpack it"),
        ("one.png", lambda path: path.write_bytes(PNG), "a single image: give its folder"),
        ("list.txt", lambda path: path.touch(), "write ImageList:file="),
        ("other", lambda path: path.touch(), "a file, not a folder$"),
        ("pipe", os.mkfifo, "a named pipe, not a folder"),
    ],
)
def test_the_error_names_the_kind_of_a_root_that_is_not_a_folder(tmp_path, name, make, what):
    make(tmp_path / name)
    with pytest.raises(NotADirectoryError, match=f"root={tmp_path / name} is .*{what}"):
        make_dataset(dataset_str=f"ImageFolder:root={tmp_path / name}")


def test_a_pattern_for_files_is_no_root(root):
    with pytest.raises(FileNotFoundError, match=r"no folder matches root=.*png, but files do, such as .*0.png"):
        make_dataset(dataset_str=f"ImageFolder:root={root}/*.png")
    with pytest.raises(FileNotFoundError, match="patterns are not expanded in root= of this dataset"):
        make_dataset(dataset_str=f"SegmentationFolder:root={root}/*.png")


# --- Names of images ---


def test_other_suffixes_are_read_when_they_are_given(root):
    for number, name in enumerate(["a.IMG", "deep/b.dat", "c.img.txt"]):
        path = root / name
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (50 + number, 9, 9)).save(path, "PNG")
    dataset = make_dataset(dataset_str=f"ImageFolder:root={root}:suffixes=.img,.dat")
    assert [dataset.get_image(i).getpixel((0, 0))[0] for i in range(len(dataset))] == [50, 51]
    assert dataset.notes_on_files() == [f"{root}: ignored 4 other file(s): 3 .png, 1 .txt"]
    assert len(make_dataset(dataset_str=f"ImageFolder:root={root}")) == 3  # the lists are cached separately


def test_content_decides_when_any_suffix_will_do(root):
    with pytest.raises(FileNotFoundError, match=r"1 without suffix \(if they are images, add :suffixes=any"):
        (root / "other").mkdir()
        (root / "other" / "0001").write_bytes(JPEG)
        make_dataset(dataset_str=f"ImageFolder:root={root}/other")
    for file_format in ("PNG", "TIFF", "WEBP", "BMP", "GIF", "PPM", "JPEG2000"):
        (root / "other" / file_format.lower()).write_bytes(encode(NOISE, file_format))
    (root / "other" / "notes").write_bytes(b"P.S.: no image")
    (root / "other" / "empty").touch()
    (root / "other" / "broken.png").write_bytes(b"no image, but called one")
    dataset = make_dataset(dataset_str=f"ImageFolder:root={root}:suffixes=any")
    assert len(dataset) == 3 + 8 + 1
    assert dataset.notes_on_files() == [f"{root}: ignored 2 other file(s): 2 without suffix"]
    assert sum(path == f"{root}/other/broken.png" for path, _ in dataset.survey().unreadable) == 1
    with pytest.raises(FileNotFoundError, match=r"or begin as an image; found 1 without suffix"):
        (root / "more").mkdir()
        (root / "more" / "text").write_bytes(b"text")
        make_dataset(dataset_str=f"ImageFolder:root={root}/more:suffixes=any")


@pytest.mark.parametrize("suffixes", ["img", ".img,", "any,.img", "."])
def test_suffixes_begin_with_a_dot(suffixes, root):
    with pytest.raises(ValueError, match=f"suffixes must be any, or begin with dots .*, got '{suffixes}'"):
        make_dataset(dataset_str=f"ImageFolder:root={root}:suffixes={suffixes}")


@pytest.mark.parametrize("name", [" set", "set ", "a\nb", "a\0b"])
def test_a_missing_folder_whose_name_one_would_not_see_is_named_in_quotes(root, name):
    with pytest.raises(FileNotFoundError, match="no folder '.*'; .*folders in"):
        ImageFolder(root=f"{root}/{name}")


def test_the_missing_part_of_a_path_is_named_with_its_neighbors(tmp_path):
    for name in ("imagenet", *(f"other{number}" for number in range(10))):
        (tmp_path / name).mkdir()
    with pytest.raises(FileNotFoundError) as caught:
        make_dataset(dataset_str=f"ImageFolder:root={tmp_path}/imagnet/train")
    assert str(caught.value) == (
        f"no folder {tmp_path}/imagnet/train; did you mean {tmp_path}/imagenet? folders in {tmp_path}: imagenet, "
        "other0, other1, other2, other3, other4, other5, other6 and 3 more"
    )
    with pytest.raises(FileNotFoundError, match=f"no folder {tmp_path}/x; folders in {tmp_path}: imagenet, "):
        make_dataset(dataset_str=f"ImageFolder:root={tmp_path}/x")


def test_a_folder_of_tars_raises_an_error_with_a_remedy(tmp_path):
    for index in range(4):
        (tmp_path / f"{index}.tar").touch()
    with pytest.raises(FileNotFoundError, match=r"found 4 \.tar \(a tar archive: write Tar:files=.*ImageNet22k"):
        ImageFolder(root=tmp_path)


# --- Archives ---


def test_a_zipped_image_that_expands_without_proportion_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(image_net_22k, "_MAX_EXPANSION", 1)
    bomb, image = zlib.compress(bytes(10**7), wbits=31), zlib.compress(PNG, wbits=31)
    with tarfile.open(tmp_path / "n1.tar", "w") as tar:
        for name, data in (("bomb.JPEG", bomb), ("image.JPEG", image), ("link.JPEG", b"")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            member.type = tarfile.REGTYPE if data else tarfile.LNKTYPE
            member.linkname = "" if data else "image.JPEG"
            tar.addfile(member, io.BytesIO(data))
    ImageNet22k(root=tmp_path, extra=tmp_path).dump_extra()
    dataset = ImageNet22k(root=tmp_path, extra=tmp_path)
    assert len(dataset) == 2, "a link is no image"
    assert dataset.get_image(1).size == (64, 64)
    with pytest.raises(BadImageError, match="expand to more than"):
        dataset.get_image(0)


def test_kinds_of_tiff_that_cannot_be_used_name_bands_bits_and_compression():
    file = io.BytesIO()
    tifffile.imwrite(file, np.ones((8, 8), np.complex64))
    with pytest.raises(ImageDecodeError, match=r"1 band\(s\) x 64 bits, complex numbers, no compression"):
        decode_image(file.getvalue())
    file = io.BytesIO()
    tifffile.imwrite(file, np.ones((8, 8, 4), np.uint16), photometric="minisblack", planarconfig="contig")
    lerc = file.getvalue().replace(struct.pack("<HHII", 259, 3, 1, 1), struct.pack("<HHII", 259, 3, 1, 34887))
    with pytest.raises(ImageDecodeError, match=r"4 band\(s\) x 16 bits, .* LERC compression, .*convert it"):
        decode_image(lerc)
