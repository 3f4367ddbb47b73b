"""A run on images of five bands, from the training over resuming to evaluations, figures and export."""

import contextlib
import json
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from tiny import ROOT, assert_same_end, killed_after, metrics, run_train, write_images

import dinov2
from dinov2 import config
from dinov2.config import ConfigError
from dinov2.report import page
from dinov2.visualization import __main__ as visualization

BANDS = [
    "images.bands=[0,1,2,3,4]",
    "images.shown_bands=[3,1,0]",
    "optim.epochs=2",
    "evaluation.eval_period_iterations=4",
]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of 16-bit images whose last band tells them apart."""
    root, rng = tmp_path_factory.mktemp("bands"), np.random.default_rng(0)
    for label, name in enumerate(("land", "water")):
        (root / name).mkdir()
        for number in range(16):
            file = root / name / f"{number}.tif"
            pixels = 2000 + 300 * rng.normal(size=(5, 8, 8)).repeat(4, 1).repeat(4, 2)
            pixels[4] += 4000 * label
            tifffile.imwrite(file, pixels.clip(0).astype(np.uint16), photometric="minisblack", planarconfig="separate")
    return root


@pytest.fixture(scope="module")
def run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("run")
    run_train(output, f"train.dataset_path=ImageFolder:root={images}", *BANDS)
    return output


def test_what_is_measured_is_recorded(run: Path) -> None:
    cfg = config.load(run / "config.yaml")
    assert cfg.images.value_range == ((0.0, 4095.0),) * 4 + ((0.0, 8191.0),)
    np.testing.assert_allclose(cfg.augmentation.mean, [2000 / 4095] * 4 + [4000 / 8191], atol=0.01)
    np.testing.assert_allclose(cfg.augmentation.std[:4], [300 / 4095] * 4, atol=0.005)
    assert cfg.augmentation.std[4] == pytest.approx((2000**2 + 300**2) ** 0.5 / 8191, abs=0.005)
    found = json.loads((run / "training_metrics.json").read_text().splitlines()[-1])
    assert found["knn"] == 100 and found["total_loss"] > 0
    assert np.load(run / "health" / "images.npz")["images"].shape[1:] == (3, 28, 28)


def test_a_killed_run_resumes_exactly(run: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [f"train.dataset_path=ImageFolder:root={images}", *BANDS]
    with killed_after(2, monkeypatch):
        run_train(tmp_path, *words)
    run_train(tmp_path, *words)
    assert_same_end(run, tmp_path, 3)


def test_a_run_is_not_resumed_with_other_bands(run: Path, images: Path) -> None:
    words = [f"train.dataset_path=ImageFolder:root={images}", "images.bands=[4,3,2,1,0]", *BANDS[1:], "optim.epochs=3"]
    with pytest.raises(ValueError, match=r"was trained with images.bands = \[0, 1, 2, 3, 4\], not \[4, 3, 2, 1, 0\]"):
        run_train(run, *words)


def test_the_device_augments_alike(run: Path, images: Path, tmp_path: Path) -> None:
    run_train(tmp_path, f"train.dataset_path=ImageFolder:root={images}", *BANDS, "train.augment_on=device")
    first, second = metrics(run)[0], metrics(tmp_path)[0]
    assert first["total_loss"] == pytest.approx(second["total_loss"], rel=1e-4)


@pytest.mark.parametrize("kind", ["knn", "linear", "log_regression"])
def test_evaluations(run: Path, images: Path, tmp_path: Path, kind: str) -> None:
    more = {"linear": ["--epochs", "1", "--epoch-length", "3", "--batch-size", "8"]}.get(kind, [])
    weights = run / "eval" / "training_3" / "teacher_checkpoint.pth"
    evaluate(kind, images, tmp_path, "--config-file", run / "config.yaml", "--pretrained-weights", weights, *more)
    [results] = tmp_path.glob("results_eval_*.json")
    assert "100.0" in results.read_text()


def evaluate(kind: str, images: Path, output: Path, *words: str | Path) -> None:
    """An evaluation that is trained and tested on the same images."""
    module, data = import_module(f"dinov2.eval.{kind}"), f"ImageFolder:root={images}"
    flags = ["--train-dataset", data, "--val-dataset", data, "--num-workers", "0", "--output-dir", str(output)]
    module.main(module.get_args_parser().parse_args([*flags, *map(str, words)]))


def test_features_and_pictures(run: Path, images: Path, tmp_path: Path) -> None:
    teacher = str(run / "eval" / "training_3")
    features = dinov2.extract_features(images, pretrained_weights=teacher)
    assert features.class_token.shape == (32, 32) and torch.isfinite(features.class_token).all()
    sheet = tmp_path / "pca.png"
    flags = ["--pretrained-weights", teacher, "--num-images", "2"]
    visualization.main(["pca", *flags, "--images", str(images / "land"), "--output", str(sheet)])
    explorer = tmp_path / "page.html"
    visualization.main(["similarity", *flags, "--images", str(images), "--html", str(explorer)])
    page.write_report([run], tmp_path / "report.html", None)
    assert all(each.stat().st_size > 1000 for each in (sheet, explorer, tmp_path / "report.html"))


def test_weights_of_rgb_are_adapted_by_the_stated_rule(run: Path, images: Path, tmp_path: Path) -> None:
    run_train(
        tmp_path / "rgb", f"train.dataset_path=ImageFolder:root={write_images(tmp_path / 'i', 8)}", "optim.epochs=2"
    )
    source = tmp_path / "rgb" / "eval" / "training_3" / "teacher_checkpoint.pth"
    words = [f"train.dataset_path=ImageFolder:root={images}", *BANDS, f"student.pretrained_weights={source}"]
    run_train(tmp_path / "bands", *words, "optim.base_lr=0")
    start = torch.load(tmp_path / "bands" / "eval" / "start" / "teacher_checkpoint.pth", weights_only=True)
    name = "backbone.patch_embed.proj.weight"
    rgb = torch.load(source, weights_only=True)["teacher"][name]
    assert torch.allclose(start["teacher"][name], rgb[:, [0, 1, 2, 0, 1]] * 3 / 5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["images.bands=[0,1]", "images.value_range=[[0,1]]"], "images.value_range has a range for each of 1 bands"),
        (
            ["images.bands=[0,1]", "augmentation.mean=[0.5]"],
            r"augmentation.mean has 1 values.*gives 2 channels: give as",
        ),
        (["augmentation.mean=[0.5,0.5]"], "augmentation.mean has 2 values, but images.bands = null gives 3 channels"),
        (
            ["images.bands=[0,1]", "images.shown_bands=[2]"],
            "images.shown_bands = .2. must be three or one of",
        ),
        (["images.bands=[0,1]", "augmentation.implementation=pil"], "pil is for images of three channels"),
        (["images.pages=bands"], "images.pages = bands needs images.bands"),
        (["images.bands=[]"], "images.bands: expected a list"),
        (["images.bands=[-1]"], "images.bands: expected a list .each an integer, at least 0."),
        (["images.value_range=[1,0]"], "images.value_range: expected a list of 2 values"),
    ],
)
def test_contradictions_are_named(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.load(None, words)


def test_too_few_bands_end_the_run_at_the_start(images: Path, tmp_path: Path) -> None:
    with pytest.raises((ValueError, SystemExit), match="it has 5 band"):
        run_train(tmp_path, f"train.dataset_path=ImageFolder:root={images}", "images.bands=[0,7]")


def test_an_evaluation_without_the_normalization_of_the_bands_is_refused(images: Path, tmp_path: Path) -> None:
    words = ["--config-file", "train/vitl16_short", "--random-init", "--opts", "images.bands=[0,1]"]
    with pytest.raises(ConfigError, match="augmentation.std of these bands are not given"):
        evaluate("knn", images, tmp_path, *words)


def test_the_example_of_the_docs_runs(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "bands.md").read_text()
    blocks = dict(re.findall(r"^```(\w+)\n(.*?)^```", text[text.index("## An example") :], re.MULTILINE | re.DOTALL))
    with contextlib.chdir(tmp_path):
        exec(compile(blocks["python"], "docs/bands.md", "exec"), {})
    commands = blocks["shell"].replace("=20", "=2").replace("python ", f"{sys.executable} ")
    commands = commands.replace(" dinov2/", f" {ROOT}/dinov2/")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-e"], input=commands, text=True, capture_output=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "100.0" in (tmp_path / "OUT" / "knn" / "results_eval_knn.json").read_text()
    with Image.open(tmp_path / "soil.png") as sheet:
        assert min(sheet.size) > 300
