"""A run reads its images in one way: the range of pixel values that it measures is part of its record."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import CONFIG_FILE, run_train

from dinov2 import config
from dinov2.data.images import ImageOptions
from dinov2.eval import setup
from dinov2.train import train


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write_deep(folder: Path, high: int, number: int = 6) -> Path:
    """Gray images of 16 bits in two classes."""
    generator = np.random.default_rng(0)
    for index in range(number):
        (folder / "ab"[index % 2]).mkdir(parents=True, exist_ok=True)
        values = generator.integers(0, high, (28, 28), np.uint16, endpoint=True)
        Image.fromarray(values).save(folder / "ab"[index % 2] / f"{index}.png")
    return folder


def recorded_range(output: Path) -> tuple[float, float] | None:
    return config.load(output / "config.yaml").images.value_range


def test_a_measured_range_is_recorded_and_used_by_resumed_runs_and_evaluations(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images, output = write_deep(tmp_path / "images", 4000), tmp_path / "out"
    words = [f"train.dataset_path=ImageFolder:root={images}", "health.period=0"]
    run_train(output, *words, "optim.epochs=2")
    assert recorded_range(output) == (0, 4095)

    write_deep(images, 60000)  # other images under the same names: a range measured now would be another
    run_train(output, *words, "optim.epochs=3")
    assert recorded_range(output) == (0, 4095)
    assert "resuming with other settings than before: optim.epochs: 2 -> 3" in caplog.text, "the range has not changed"

    run_train(output, *words, "optim.epochs=2", "--no-resume")
    assert recorded_range(output) == (0, 65535)
    cfg = config.load(output / "config.yaml")
    assert setup.image_options(cfg) == ImageOptions(value_range=(0, 65535))


def test_another_dataset_is_measured_anew(tmp_path: Path) -> None:
    output = tmp_path / "out"
    for name, high in (("one", 4000), ("other", 900)):
        images = write_deep(tmp_path / name, high)
        cfg = config.load(CONFIG_FILE, [f"train.dataset_path=ImageFolder:root={images}", f"train.output_dir={output}"])
        cfg, dataset = train.open_dataset(cfg, resume=True)
        output.mkdir(exist_ok=True)
        config.save(cfg, output / "config.yaml")
        assert dataset.image_options.value_range == cfg.images.value_range == (0, 2 ** high.bit_length() - 1)


def test_what_has_not_trained_decides_no_range(tmp_path: Path) -> None:
    words = [f"train.dataset_path=ImageFolder:root={write_deep(tmp_path / 'x', 4000)}", f"train.output_dir={tmp_path}"]
    config.save(config.load(CONFIG_FILE, [*words, "images.value_range=[0,7]"]), tmp_path / "config.yaml")
    cfg, _ = train.open_dataset(config.load(CONFIG_FILE, words), resume=True)
    assert cfg.images.value_range == (0, 4095)


def test_plain_images_leave_the_range_open(tmp_path: Path) -> None:
    cfg, dataset = train.open_dataset(config.load(CONFIG_FILE), resume=True)
    assert cfg.images.value_range is dataset.image_options.value_range is None


def test_the_dry_run_reports_ranges_dropped_parts_and_unreadable_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = write_deep(tmp_path / "images", 4000)
    Image.new("L", (200, 95)).save(images / "a" / "slide.png")
    Image.new("RGBA", (28, 28)).save(images / "a" / "clear.png")
    (images / "notes.txt").touch()
    shutil.copy(images / "a" / "0.png", images / "a" / "cut.png")
    (images / "a" / "cut.png").write_bytes((images / "a" / "cut.png").read_bytes()[:500])
    words = [
        f"train.dataset_path=ImageFolder:root={images}",
        "images.max_pixels=18000",
        "train.max_bad_image_share=0.5",
    ]
    run_train(tmp_path / "out", "--dry-run", *words)
    out = capsys.readouterr().out
    for expected in (
        f"note: {images}: ignored 1 other file(s): 1 .txt",
        "0 to 4,095 is mapped to 0..255 (images.value_range sets this)",
        "note: 1 of 9 images sampled are transparent: transparency is dropped",
        "note: 2 of 9 images sampled cannot be read: ",
        "slide.png: cannot decode",
        "19,000 pixels (200 x 95), limit 18,000 (images.max_pixels)",
        "cut.png: cannot decode",
    ):
        assert expected in out


@pytest.mark.parametrize("words", ["images.value_range=[5,5]", "images.background=[0,0,256]", "images.max_pixels=0"])
def test_impossible_options_are_errors(words: str) -> None:
    with pytest.raises(config.ConfigError, match=words.partition("=")[0]):
        config.load(CONFIG_FILE, [words])
