"""The command: four kinds of figures from any images, and errors before the work rather than after."""

import json
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from dinov2 import config
from dinov2.eval.extract.video import Video
from dinov2.models import build_model
from dinov2.visualization import __main__ as visualize
from dinov2.visualization.video import writing_video

CONFIG = """
student: {arch: vit_small, patch_size: 8, embed_dim: 24, depth: 2, num_heads: 3, init_std: 0.3}
crops: {global_crops_size: 32, local_crops_size: 8}
"""


@pytest.fixture
def model(tmp_path: Path) -> list[str]:
    """The flags of a small untrained model."""
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    return ["--config-file", str(tmp_path / "tiny.yaml"), "--random-init"]


@pytest.fixture
def figures(tmp_path: Path) -> Path:
    """A folder of six figures of different sizes; f.png shows what a.png does."""
    folder = tmp_path / "figures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, (width, height) in zip("abcde", [(40, 30), (64, 64), (32, 48), (100, 33), (48, 48)], strict=True):
        pixels = rng.integers(0, 255, (3, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{name}.png")
    with Image.open(folder / "a.png") as image:
        image.save(folder / "f.png")
    return folder


def run(*words: object) -> None:
    assert visualize.main([str(word) for word in words]) == 0


def num_colors(path: Path) -> int:
    with Image.open(path) as sheet:
        return len(sheet.convert("RGB").getcolors(10**7))


@pytest.mark.parametrize("command", [["pca"], []], ids=["pca", "no command"])
def test_pca_draws_images_of_different_sizes(model: list[str], figures: Path, command: list[str]) -> None:
    output = figures.parent / "new" / "pca.png"
    run(*command, *model, "--images", figures, "--output", output, "--npy")
    assert num_colors(output) > 100
    tokens = [np.load(output.with_name(f"pca.tokens.{index}.npy")) for index in range(6)]
    # Shorter sides of 32 pixels, longer sides to multiples of 8: 40 x 30 becomes 40 x 32.
    assert [array.shape[:2] for array in tokens] == [(4, 5), (4, 4), (6, 4), (4, 12), (4, 4), (4, 5)]
    colors = np.load(output.with_name("pca.colors.0.npy"))
    assert np.array_equal(colors, np.load(output.with_name("pca.colors.5.npy"))), "one basis for all"


def test_the_former_command_still_works(tmp_path: Path) -> None:
    command = ["--config-file", "train/fashion_mnist", "--random-init", "--images", "FashionMNIST:split=VAL"]
    output = tmp_path / "new" / "pca.png"
    run(*command, "--num-images", 4, "--size", 56, "--foreground", "--shifts", 7, "--output", output)
    assert num_colors(output) > 20


def test_numbers_of_images_of_one_size_are_one_array(model: list[str], tmp_path: Path) -> None:
    output = tmp_path / "a.jpg"
    run("attention", *model, "--images", "FashionMNIST:split=VAL", "--num-images", 5, "--output", output, "--npy")
    assert np.load(tmp_path / "a.attention.npy").shape == (5, 3, 4, 4)
    assert num_colors(output) > 100


def test_the_size_of_images_can_be_kept_or_chosen(
    model: list[str], figures: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for size, shape in (("original", (4, 12)), ("16", (2, 6))):
        with caplog.at_level("INFO"):
            run("pca", *model, "--images", figures / "d.png", "--size", size, "--output", figures / "o.png", "--npy")
        assert np.load(figures / "o.tokens.npy").shape == (1, *shape, 24)
    assert "resized to multiples of the patch (8 pixels): 100 x 33 to 96 x 32" in caplog.text


def test_similarity_draws_a_row_for_each_point(model: list[str], figures: Path) -> None:
    output = figures.parent / "s.webp"
    images = [figures / name for name in ("a.png", "f.png", "b.png")]
    run("similarity", *model, "--images", *images, "--point", "39,0", "0.5,0.5", "--output", output, "--npy")
    assert num_colors(output) > 100
    own, same, other = (np.load(output.with_name(f"s.similarity.{index}.npy")) for index in range(3))
    assert own.shape == (2, 4, 5) and other.shape == (2, 4, 4)
    assert own[0, 0, 4] == pytest.approx(1) and own[1, 2, 2] == pytest.approx(1)
    np.testing.assert_allclose(same, own, atol=1e-5)


def test_neighbors_find_the_duplicate_but_not_the_query(model: list[str], figures: Path) -> None:
    output = figures.parent / "n.png"
    words = ["--query", figures / "a.png", "--images", figures, "--k", 3, "--output", output, "--npy"]
    run("neighbors", *model, *words)
    (found,) = json.loads(output.with_suffix(".json").read_text())
    assert found["query"] == str(figures / "a.png")
    assert Path(found["neighbors"][0]["image"]).name == "f.png"
    cosines = [entry["cosine"] for entry in found["neighbors"]]
    assert len(cosines) == 3 and cosines[0] == pytest.approx(1) and cosines == sorted(cosines, reverse=True)
    tokens = torch.from_numpy(np.load(output.with_name("n.class_tokens.npy")))
    similarity = functional.cosine_similarity(tokens[:1], tokens[1:])
    np.testing.assert_allclose(sorted(similarity.tolist(), reverse=True)[:3], cosines, atol=1e-5)
    assert num_colors(output) > 100


def test_neighbors_leave_out_what_cannot_be_read(
    model: list[str], figures: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (figures / "b.png").write_bytes(b"no image")
    output = figures.parent / "n.png"
    caplog.set_level("INFO")
    words = ["--query", figures / "a.png", "--images", figures, "--k", 50, "--num-workers", 0, "--output", output]
    run("neighbors", *model, *words)
    (found,) = json.loads(output.with_suffix(".json").read_text())
    names = [Path(entry["image"]).name for entry in found["neighbors"]]
    assert sorted(names) == ["c.png", "d.png", "e.png", "f.png"]
    assert "left out" in caplog.text and "b.png" in caplog.text
    assert "--k 50: there are only 4 other images" in caplog.text
    assert "1 query, the 4 nearest of 5 images" in caplog.text


def test_the_former_module_and_the_british_spelling_of_the_command_still_work() -> None:
    command = [sys.executable, "-m", "dinov2.eval.visualize", "neighbours", "--help"]
    assert "--num-queries" in subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_queries_of_a_dataset_are_evenly_spaced(model: list[str], tmp_path: Path) -> None:
    output = tmp_path / "n.png"
    words = ["--query", "FashionMNIST:split=VAL", "--images", "FashionMNIST:split=VAL", "--num-images", 4]
    for flags, count in (([], 10), (["--num-queries", 3], 3)):
        run("neighbors", *model, *words, *flags, "--k", 1, "--output", output)
        assert len(json.loads(output.with_suffix(".json").read_text())) == count


def test_default_sizes_and_assumptions_are_logged(
    model: list[str], figures: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = [*model, "--images", figures / "a.png", "--output", figures / "o.png"]
    with caplog.at_level("INFO"):
        run("pca", *words, "--foreground")
    assert "trained on images of 32 pixels: shorter side 32; --size N for more patches" in caplog.text
    assert "--foreground assumes" in caplog.text
    caplog.clear()
    with caplog.at_level("INFO"):
        run("pca", *words, "--size", 64)
    assert "trained on images" not in caplog.text and "assumes" not in caplog.text


def test_a_video_becomes_a_video_or_a_sheet(model: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with writing_video(Path("clip.mp4"), Fraction(12)) as write:
        for number in range(12):
            write(np.roll(np.full((32, 48, 3), np.arange(48)[:, None] * 5, np.uint8), number, axis=1))
    run("pca", *model, "--images", "clip.mp4", "--npy")
    assert Video("pca.mp4").count_frames() == 12 and np.load("pca.tokens.npy").shape == (12, 4, 6, 24)
    run("pca", *model, "--images", "clip.mp4", "--every", 4, "--output", "pca.gif")
    assert Video("pca.gif").count_frames() == 3
    run("pca", *model, "--images", "clip.mp4", "--num-images", 3, "--output", "frames.png")
    run("attention", *model, "--images", "clip.mp4", "--num-images", 2)
    assert num_colors(Path("frames.png")) > 50 and Path("attention.png").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pca", "--output", "pca.txt"], r"--output pca\.txt must end in one of \.png, .*\.mp4, \.gif"),
        (["attention", "--output", "a.mp4"], r"--output a\.mp4 must end in one of \.png, \.jpg, \.jpeg, \.webp"),
        (["pca", "--output", "pca.mp4"], r"--images must be one video file \(\.avi, .*\), not a\.png"),
        (["similarity", "--point", "400,10"], r"the point 400,10 is outside the image of 40 x 30 pixels"),
        (["similarity", "--point", "middle"], r"a point is x,y"),
        (["pca", "--output", "a.png/new/pca.png"], r"cannot make the folder of --output: .*: 'a\.png/new'"),
        (["pca", "--shifts", "3"], r"shifts = 3 must divide the patch size 8"),
        (["neighbors", "--query", "a.png", "--size", "original"], r"--size original cannot be used with neighbors"),
        (["neighbors", "--query", "nowhere.png"], r"no such images: 'nowhere\.png'"),
    ],
)
def test_impossible_requests_are_refused(
    model: list[str], figures: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(figures)
    with pytest.raises((ValueError, OSError), match=message):
        run(*words, *model, "--images", "a.png")


@pytest.mark.parametrize(
    "words", [["pca"], ["attention"], ["similarity", "--point", "1,1"], ["neighbors", "--query", "a.png"]]
)
def test_features_that_are_not_finite_are_not_drawn(
    model: list[str], figures: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.chdir(figures)
    cfg = config.load(model[1])
    backbone = build_model(**config.backbone_arguments(cfg))
    backbone.patch_embed.proj.weight.data *= 1e38  # finite, but nothing computed with them is
    torch.save(backbone.state_dict(), "large.pth")
    model = [*model[:2], "--pretrained-weights", "large.pth"]
    with pytest.raises(ValueError, match=r"the features of a\.png are NaN or infinite"):
        run(*words, *model, "--images", "a.png", "b.png", "--output", "drawn.png")
    assert not Path("drawn.png").exists() and not Path("drawn.json").exists()


def test_when_no_image_can_be_read_the_reason_is_given(
    model: list[str], figures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(figures)
    for name in ("a.png", "b.png"):
        Path(name).write_bytes(b"no image")
    for words in (["pca"], ["neighbors", "--query", "c.png"]):
        with pytest.raises(
            ValueError, match=r"none of 2 images can be read; the first: .*a\.png.*no supported image format"
        ):
            run(*words, *model, "--images", "a.png", "b.png", "--output", "drawn.png")


def test_a_wrong_command_line_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        ([], "no command; choose from pca, attention"),
        (["similarity", "--images", "x"], "--point"),
        (["similarity", "--images", "x", "--point", "-1,50"], "the point -1,50 is outside of any image"),
        (["similarity", "--images", "x", "--point", "5,5", "-.5,0.5"], "the point -.5,0.5 is outside of any image"),
        (["foo", "--model", "dinov2_vits14"], "unknown command 'foo'; choose from pca, attention, similarity, neigh"),
        (["similiarity", "--point", "1,1"], "unknown command 'similiarity'; choose from"),
    ):
        with pytest.raises(SystemExit):
            visualize.main(words)
        assert message in capsys.readouterr().err


def test_errors_take_one_line_and_the_file_runs_by_its_path(tmp_path: Path) -> None:
    script = Path(visualize.__file__)
    words = ["--model", "dinov2_vits14", "--random-init", "--images", str(tmp_path / "none.png")]
    result = subprocess.run([sys.executable, str(script), *words], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: no such images: '{tmp_path}/none.png'; give image files, folders, ")
    assert result.stderr.count("\n") == 1


def test_an_output_is_complete_or_absent(model: list[str], figures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = figures.parent / "pca.png"
    output.write_bytes(b"former")

    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fails)
    with pytest.raises(OSError, match="cannot write"):
        run("pca", *model, "--images", figures / "a.png", "--output", output)
    assert output.read_bytes() == b"former" and not list(output.parent.glob(".pca*"))
