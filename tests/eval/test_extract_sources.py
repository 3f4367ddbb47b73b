"""Sources of images: one dataset of folders, files, globs, lists, dataset strings and videos, in the order given."""

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from eval_images import tiny_backbone
from PIL import Image

import dinov2
from dinov2.data.images import DEFAULT_OPTIONS, BadImageError
from dinov2.eval.extract.sources import VideoFrames, check_sources, open_sources, sample_frames
from dinov2.visualization.video import writing_video


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images 0.png to 5.png whose red is 10 times their number."""
    (tmp_path / "images").mkdir()
    for number in range(6):
        Image.new("RGB", (16, 16), (10 * number, 0, 0)).save(tmp_path / "images" / f"{number}.png")
    return tmp_path / "images"


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """A video of 12 frames, 4 a second, whose red is 20 times their number."""
    with writing_video(tmp_path / "clip.mp4", Fraction(4)) as write:
        for number in range(12):
            write(np.full((16, 32, 3), (20 * number, 0, 0), np.uint8))
    return tmp_path / "clip.mp4"


def reds(*sources: object, fps: float | None = None) -> list[int]:
    dataset = open_sources([str(source) for source in sources], DEFAULT_OPTIONS, fps)
    return [dataset.get_image(index).getpixel((0, 0))[0] for index in range(len(dataset))]


def test_sources_can_be_mixed_and_keep_their_order(folder: Path) -> None:
    (folder / "few.txt").write_text("3.png\n1.png\n")
    (folder / "labels.csv").write_text("path,label\n4.png,cat\n2.png,dog\n")
    assert reds(folder / "5.png", folder / "2.png", folder) == [50, 20, 0, 10, 20, 30, 40, 50]
    assert reds(folder / "few.txt", f"ImageFolder:root={folder}", folder / "[05].png") == [
        30,
        10,
        *range(0, 60, 10),
        0,
        50,
    ]
    labeled = open_sources([str(folder / "labels.csv")], DEFAULT_OPTIONS)
    assert [labeled.get_target(0), labeled.get_target(1)] == [0, 1]


def test_names_are_the_paths_as_given(folder: Path, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    dataset = open_sources(["images/5.png", "images", "clip.mp4", "FashionMNIST:split=VAL"], DEFAULT_OPTIONS, 1.0)
    names = [dataset.describe(index) for index in range(11)]
    assert names[:2] == ["images/5.png", "images/0.png"]
    assert names[7:] == ["clip.mp4#0", "clip.mp4#4", "clip.mp4#8", "FashionMNIST VAL image 0"]


def test_frames_of_a_video_are_all_or_some_per_second(clip: Path) -> None:
    assert reds(clip) == pytest.approx([20 * number for number in range(12)], abs=6)
    assert reds(clip, fps=2) == pytest.approx([0, 40, 80, 120, 160, 200], abs=6)
    assert reds(clip, fps=100) == reds(clip)


@pytest.mark.parametrize(
    ("times", "fps", "expected"),
    [
        ([5.0, 5.1, 5.2, 5.9, 6.0, 6.1], 1.0, [0, 4]),
        ([0.0, 0.1, 2.5, 2.6, 3.0], 1.0, [0, 2, 4]),  # a pause has no frames
        ([0.0, 0.1, 0.2, 0.3], None, [0, 1, 2, 3]),
        ([index / 30 for index in range(90)], 10.0, list(range(0, 90, 3))),
        ([], 1.0, []),
    ],
)
def test_the_first_frame_of_each_interval_is_used(times: list[float], fps: float | None, expected: list[int]) -> None:
    assert list(sample_frames(times, fps)) == expected


def test_frames_can_be_read_in_any_order(clip: Path) -> None:
    frames = VideoFrames(clip)
    found = [frames.get_image(index).getpixel((0, 0))[0] for index in (3, 4, 9, 2, 2, 11)]
    assert found == pytest.approx([60, 80, 180, 40, 40, 220], abs=6)


def test_a_video_gives_the_same_features_from_workers_and_shards(clip: Path, tmp_path: Path) -> None:
    model = tiny_backbone()
    expected = dinov2.extract_features(clip, model=model, tokens="both", batch_size=5)
    assert expected.names[3] == f"{clip}#3" and len(expected.names) == 12
    for workers in (0, 2):
        output = tmp_path / str(workers)
        dinov2.extract_features(
            clip, model=model, tokens="both", batch_size=5, shard_size=5, num_workers=workers, output=output
        )
        found = dinov2.load_features(output)
        assert found.names == expected.names
        torch.testing.assert_close(found.class_token, expected.class_token)
    assert [json.loads(line)["name"] for line in (output / "names.jsonl").read_text().splitlines()] == expected.names
    every_second = dinov2.extract_features(clip, model=model, fps=2)
    torch.testing.assert_close(every_second.class_token, expected.class_token[::2])


def test_one_range_maps_deep_images_and_is_recorded(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for number in range(3):
        pixels = np.full((16, 16), 10_000 * (number + 1), np.uint16)
        pixels[0] = 0
        Image.fromarray(pixels).save(tmp_path / "deep" / f"{number}.png")
    output = dinov2.extract_features(tmp_path / "deep", model=tiny_backbone(), output=tmp_path / "out")
    [options] = json.loads((output / "metadata.json").read_text())["settings"]["image_options"]
    assert options["value_range"][1] > 20_000
    files = dinov2.extract_features(sorted((tmp_path / "deep").iterdir()), model=tiny_backbone())
    torch.testing.assert_close(files.class_token, dinov2.load_features(output).class_token)


def test_missing_sources_are_named_before_anything_is_read(folder: Path, tmp_path: Path) -> None:
    for source, message in (
        ("nowhere", r"no such images: 'nowhere'; give a folder, .* or a dataset string of ImageNet, "),
        ("Imagefolder:root=x", "no such images: 'Imagefolder:root=x'"),
        (str(tmp_path / "*.jpg"), r"no file matches '.*/\*\.jpg'"),
        ("FashionMNIST:split=TEST", "unknown split 'TEST'"),
        (f"ImageFolder:root={tmp_path / 'none'}", "no folder .*none"),
    ):
        with pytest.raises((FileNotFoundError, ValueError), match=message):
            check_sources([str(folder), source])
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match=r"cannot read the video .*bad\.mp4"):
        open_sources([str(tmp_path / "bad.mp4")], DEFAULT_OPTIONS)


def test_a_file_that_is_no_image_is_an_unreadable_one(folder: Path) -> None:
    (folder / "notes").write_text("no image")
    dataset = open_sources([str(folder / "0.png"), str(folder / "notes")], DEFAULT_OPTIONS)
    with pytest.raises(BadImageError, match="notes"):
        dataset.get_image(1)
