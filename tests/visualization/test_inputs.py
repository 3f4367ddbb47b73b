"""Inputs: files, folders, globs, datasets and videos; what cannot be read is named."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov2.visualization.inputs import TransformedImages, list_inputs, load_images
from dinov2.visualization.video import writing_video


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images 0.png to 5.png whose red is 10 times their number."""
    for number in range(6):
        Image.new("RGB", (4, 4), (10 * number, 0, 0)).save(tmp_path / f"{number}.png")
    return tmp_path


def reds(sources: Sequence[str], num_images: int | None = None) -> list[int]:
    return [image.image.getpixel((0, 0))[0] for image in load_images(list_inputs(sources, num_images))]


def test_files_folders_globs_and_datasets_can_be_mixed(folder: Path) -> None:
    assert reds([str(folder / "5.png"), str(folder), str(folder / "[13].png")]) == [50, 0, 10, 20, 30, 40, 50, 10, 30]
    assert reds([f"ImageFolder:root={folder}"]) == [0, 10, 20, 30, 40, 50]
    assert len(reds(["FashionMNIST:split=VAL", str(folder / "5.png")], 3)) == 4


def test_some_of_many_are_evenly_spaced_and_announced(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    assert reds([str(folder), str(folder / "*.png")], 3) == [0, 20, 40] * 2
    message = "3 of 6 images are used, evenly spaced (--num-images, for queries --num-queries)"
    assert caplog.messages.count(message) == 2
    assert reds([str(folder)], 100) == reds([str(folder)])
    assert caplog.messages.count(message) == 2


def test_a_file_whose_name_looks_like_a_glob_is_itself(folder: Path) -> None:
    (folder / "5.png").rename(folder / "[1].png")
    assert reds([str(folder / "[1].png")]) == [50]


def test_images_have_short_names_and_full_paths(folder: Path) -> None:
    images = list_inputs([str(folder), "FashionMNIST:split=VAL"], 2)
    assert [image.name for image in images] == ["0.png", "3.png", "image 0", "image 1000"]
    assert images[1].path == str(folder / "3.png")


def test_videos_and_moving_gifs_give_frames_and_other_gifs_an_image(folder: Path) -> None:
    for name in ("clip.mp4", "clip.gif"):
        with writing_video(folder / name, Fraction(4)) as write:
            for number in range(12):
                write(np.full((16, 32, 3), (20 * number, 0, 0), np.uint8))
    Image.new("P", (4, 4)).save(folder / "still.gif")
    for name in ("clip.mp4", "clip.gif"):
        assert reds([str(folder / name)], 3) == pytest.approx([0, 80, 160], abs=6)
        assert len(reds([str(folder / name)])) == 12
    assert reds([str(folder / "[05c]*p[4n]*")], 2) == pytest.approx([0, 50, 0, 120], abs=6)
    names = [image.name for image in list_inputs([str(folder / "clip.mp4"), str(folder / "still.gif")], 3)]
    assert names == ["clip.mp4, 0.0 s", "clip.mp4, 1.0 s", "clip.mp4, 2.0 s", "still.gif"]


def test_images_that_cannot_be_read_are_left_out_and_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "3.png").write_bytes(b"no image")
    (folder / "4.png").write_bytes((folder / "4.png").read_bytes()[:50])
    for source in (folder, folder / "*.png"):
        caplog.clear()
        assert reds([str(source)]) == [0, 10, 20, 50]
        warnings = [record.getMessage() for record in caplog.records if record.name.endswith("inputs")]
        assert len(warnings) == 2 and str(folder / "3.png") in warnings[0] and str(folder / "4.png") in warnings[1]


def test_a_dataset_for_loaders_gives_positions_and_none_for_what_cannot_be_read(folder: Path) -> None:
    (folder / "1.png").write_bytes(b"no image")
    images = TransformedImages(list_inputs([str(folder)]), lambda image: image.getpixel((0, 0))[0])
    assert [images[index] for index in range(len(images))] == [(0, 0), None, (2, 20), (3, 30), (4, 40), (5, 50)]


def test_the_only_image_must_be_readable(folder: Path) -> None:
    (folder / "3.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"cannot read the image .*3\.png: 8 bytes in no supported image format"):
        reds([str(folder / "3.png")])


def test_if_none_can_be_read_that_is_an_error(folder: Path) -> None:
    for path in folder.iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(ValueError, match="none of 6 images can be read"):
        reds([str(folder)])


def test_missing_inputs_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such images: 'nowhere'"):
        list_inputs(["nowhere"])
    with pytest.raises(FileNotFoundError, match=r"no file matches '.*/\*\.jpg'"):
        list_inputs([str(tmp_path / "*.jpg")])
    with pytest.raises(FileNotFoundError, match=f"no images under {tmp_path}"):
        list_inputs([str(tmp_path)])
    with pytest.raises(ValueError, match="unknown split 'TEST'"):
        list_inputs(["FashionMNIST:split=TEST"])
