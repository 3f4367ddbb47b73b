"""`dinov2_fashion`: real weights in the package, by name in every command, and what its features are worth."""

import argparse
import json
from pathlib import Path

import pytest
import torch

import dinov2
from dinov2 import config
from dinov2.eval import knn
from dinov2.eval.extract.frozen_backbone import load_frozen_backbone
from dinov2.hub.fashion import MEAN, STD, dinov2_fashion
from dinov2.models import build_model
from dinov2.models.published import PACKAGED, weights_url_or_path
from dinov2.models.weights import load_backbone
from dinov2.train import train

RECIPE = config.load(PACKAGED["dinov2_fashion"])
TRAIN = RECIPE.train.dataset_path
VAL = TRAIN.replace("split=TRAIN", "split=VAL")
FILE = Path(weights_url_or_path("dinov2_fashion"))
FEATURES = [-1.21059, 0.27968, -0.71312, -0.49349]  # the first of a fixed image, on a CPU


def test_its_network_and_images_are_those_of_the_recipe() -> None:
    ours, recipes = dinov2_fashion(), build_model(**config.backbone_arguments(RECIPE))
    assert (tuple(RECIPE.augmentation.mean), tuple(RECIPE.augmentation.std)) == (MEAN, STD)
    images = torch.randn(2, 3, 28, 35)  # another grid of positions, too
    assert torch.equal(ours(images), load_backbone(recipes, "dinov2_fashion")(images))
    assert dinov2_fashion(pretrained=False, in_chans=4).patch_embed.proj.weight.shape[1] == 4
    assert ours.training and not torch.equal(dinov2_fashion(pretrained=False)(images), ours(images))


def test_its_file_is_small_and_finite() -> None:
    assert FILE.stat().st_size < 4e6
    assert all(value.isfinite().all() for value in dinov2_fashion().state_dict().values())


def test_its_features_are_those_that_were_recorded() -> None:
    images = torch.linspace(-2, 2, 3 * 28 * 28).sin().reshape(1, 3, 28, 28)
    features = dinov2_fashion().eval()(images).detach()
    torch.testing.assert_close(features[0, :4], torch.tensor(FEATURES), rtol=1e-4, atol=1e-5)


def test_evaluations_take_its_name(tmp_path: Path) -> None:
    accuracies = {}
    for name, weights in {"it": ["--pretrained-weights", "dinov2_fashion"], "untrained": ["--random-init"]}.items():
        words = ["--config-file", "train/quickstart", "--output-dir", str(tmp_path / name), "--num-workers", "0"]
        words += ["--train-dataset", f"{TRAIN}:length=3000", "--val-dataset", f"{VAL}:length=600", *weights]
        knn.main(knn.get_args_parser().parse_args(words))
        results = json.loads((tmp_path / name / knn.RESULTS_FILE).read_text())
        accuracies[name] = results["metrics"]["full"]["10"]["top-1"]
    assert results["weights"] is None
    assert accuracies["it"] > 55 and accuracies["untrained"] < 25  # documented with 10,000 and 2,000 scenes


def test_features_are_extracted_by_its_name_as_it_was_trained() -> None:
    by_name = dinov2.extract_features(f"{VAL}:length=8", model="dinov2_fashion", num_workers=0)
    by_weights = dinov2.extract_features(f"{VAL}:length=8", pretrained_weights="dinov2_fashion", num_workers=0)
    assert torch.equal(by_name.class_token, by_weights.class_token) and by_name.class_token.shape == (8, 128)
    selected = argparse.Namespace(
        model="dinov2_fashion", pretrained_weights=None, config_file=None, random_init=False, num_heads=None, opts=[]
    )
    backbone = load_frozen_backbone(selected)
    assert (backbone.name, backbone.shorter_side, tuple(backbone.mean)) == ("dinov2_fashion", 28, MEAN)


def test_a_name_that_is_nearly_its_own_gets_a_hint() -> None:
    with pytest.raises(FileNotFoundError, match="did you mean dinov2_fashion"):
        load_backbone(dinov2_fashion(pretrained=False), "dinov2_fashon")
    with pytest.raises(ValueError, match=r"unknown --model 'dinov2_fashon'; did you mean dinov2_fashion"):
        dinov2.extract_features(VAL, model="dinov2_fashon")


def test_a_run_starts_from_what_it_knows(tmp_path: Path) -> None:
    words = ["--config-file", "train/quickstart", "--output-dir", str(tmp_path), "train.num_workers=0"]
    words += ["student.pretrained_weights=dinov2_fashion", "train.OFFICIAL_EPOCH_LENGTH=2", "optim.epochs=1"]
    words += ["optim.warmup_epochs=0", "train.batch_size_per_gpu=8", "dino.head_n_prototypes=16"]
    train.main(train.get_args_parser().parse_intermixed_args(words))
    rows = [json.loads(line) for line in (tmp_path / "training_metrics.json").read_text().splitlines()]
    assert rows[0]["iteration"] == -1 and rows[0]["knn"] > 60 and rows[0]["patch_knn_miou"] > 15
    state = torch.load(tmp_path / "eval" / "start" / "teacher_checkpoint.pth")["teacher"]
    assert torch.equal(state["backbone.norm.weight"], dinov2_fashion().norm.weight)
