"""Results of a quickstart run: a figure of patch features, accuracies of k-NN and patch probes, a report of the run.

    python scripts/quickstart_report.py OUT

reads what training left in OUT and adds pca.png, knn.json, knn.md and report.html, and results_eval_patches.json if the
images come with maps of classes. The latest teacher is compared with the same network before training, with raw pixels
and, on the images of the quickstart, with `dinov2_fashion`, which was trained longer; all by the same evaluations.
"""

import argparse
import sys
from collections.abc import Mapping
from operator import attrgetter
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # run by path: make dinov2 and scripts importable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from dinov2 import config
from dinov2.analysis.patch_segmentation import Patches, Standardizer
from dinov2.analysis.pca import pca_colors, to_images
from dinov2.config import Config
from dinov2.data import make_dataset
from dinov2.data.dense.base import SEGMENTATION, DenseDataset, DenseSubset
from dinov2.data.transforms import ToNormalizedTensor, make_classification_eval_transform
from dinov2.eval import setup
from dinov2.eval.dense.patch_probes import fit_knn, score_patches
from dinov2.eval.dense.probes import PatchTokens, Squeezed, patches_of
from dinov2.eval.features import extract_features
from dinov2.eval.knn import eval_knn
from dinov2.eval.results import write_results
from dinov2.log import setup_logging
from dinov2.models.published import PACKAGED
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.report.page import write_report
from dinov2.visualization.contact_sheet import contact_sheet
from dinov2.visualization.feature_maps import patch_tokens

NUM_NEIGHBORS = (10, 20)
IMAGES_PER_CLASS = 3
PROBED_IMAGES = (1000, 400)  # the first ones to fit the patch probe to, and to test it on
PROBE_NEIGHBORS = 10
TRAINED_LONGER = "dinov2_fashion"

_INPUTS = attrgetter(
    *("train.dataset_path", "augmentation.mean", "augmentation.std", "crops.global_crops_size", "student.patch_size")
)

Accuracies = dict[str, dict[int, float]]  # features -> {k: top-1 in percent}


class PixelPatches(nn.Module):
    """Images (B, 3, S, S) -> the pixels of their patches of side p, (B, N, 3 * p * p)."""

    def __init__(self, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size

    def forward(self, images: Tensor) -> Tensor:
        return functional.unfold(images, self.patch_size, stride=self.patch_size).transpose(1, 2)


def latest_teacher(folder: Path) -> Path:
    """Find the teacher checkpoint of the last step.

    Raises:
        FileNotFoundError: There is none.
    """
    dumps = list(folder.glob("eval/training_*/teacher_checkpoint.pth"))
    if not dumps:
        raise FileNotFoundError(f"no eval/training_*/teacher_checkpoint.pth in {folder}: did the training finish?")
    return max(dumps, key=lambda path: int(path.parent.name.removeprefix("training_")))


def networks_of(cfg: Config, teacher: Path) -> dict[str, DinoVisionTransformer]:
    """The untrained network, the teacher and, if the run has the images of `dinov2_fashion`, that one."""
    sources = {"untrained": None, "trained": str(teacher)}
    recipe = config.load(PACKAGED[TRAINED_LONGER])
    found = {name: setup.build_model_for_eval(cfg, weights) for name, weights in sources.items()}
    if _INPUTS(cfg) == _INPUTS(recipe):
        found[TRAINED_LONGER] = setup.build_model_for_eval(recipe, TRAINED_LONGER)
    return found


def compare(features: Mapping[str, nn.Module], cfg: Config, train_dataset: str, val_dataset: str) -> Accuracies:
    """k-NN accuracies of the outputs of several models on the images as the network sees them."""
    side = cfg.crops.global_crops_size
    transform = make_classification_eval_transform(
        resize_size=side, crop_size=side, mean=cfg.augmentation.mean, std=cfg.augmentation.std
    )
    accuracies = {}
    for name, model in features.items():
        scores = eval_knn(
            model,
            setup.labeled_dataset(train_dataset, transform),
            setup.labeled_dataset(val_dataset, transform),
            num_workers=0,  # the images are tiny and in memory
            autocast_dtype=setup.get_autocast_dtype(cfg),
            nb_knn=NUM_NEIGHBORS,
        )
        accuracies[name] = {k: 100 * scores["full", k]["top-1"] for k in NUM_NEIGHBORS}
    return accuracies


def has_classes(dataset_str: str) -> bool:
    """Whether the images of a dataset come with maps of classes."""
    dataset = make_dataset(dataset_str=dataset_str)
    return isinstance(dataset, DenseDataset) and dataset.kind == SEGMENTATION


def compare_patches(
    features: Mapping[str, nn.Module], cfg: Config, train_dataset: str, val_dataset: str
) -> dict[str, float]:
    """mIoU in percent of the k-NN probe, which labels pixels by patch features (B, N, D), of several models."""
    side, dtype = cfg.crops.global_crops_size, setup.get_autocast_dtype(cfg)

    def patches(model: nn.Module, dataset_str: str, count: int) -> Patches:
        dataset = make_dataset(dataset_str=dataset_str)
        assert isinstance(dataset, DenseDataset), "checked by has_classes"
        dataset.transform = Squeezed(side, cfg.augmentation.mean, cfg.augmentation.std)
        images = DenseSubset(dataset, range(min(count, len(dataset))))
        return patches_of(
            images,
            lambda images: extract_features(model, images, 256, 0, autocast_dtype=dtype),
            side,
            cfg.student.patch_size,
            num_workers=0,
        )

    num_classes, found = len(make_dataset(dataset_str=val_dataset).classes), {}
    for name, model in features.items():
        train, val = (
            patches(model, dataset, count)
            for dataset, count in zip((train_dataset, val_dataset), PROBED_IMAGES, strict=True)
        )
        standardize = Standardizer.of(train.features)
        predict = fit_knn(Patches(standardize(train.features), train.labels), ks=[PROBE_NEIGHBORS])
        scores = score_patches(predict, Patches(standardize(val.features), val.labels), num_classes)
        found[name] = 100 * scores[PROBE_NEIGHBORS].mIoU
    return found


def as_table(accuracies: Accuracies, patches: Mapping[str, float]) -> str:
    """Format top-1 accuracies of k-NN, and mIoU of the patch probe if there is any, as a Markdown table."""
    width = max(len("in %"), *map(len, accuracies))
    columns = [f"top-1, k = {k}" for k in NUM_NEIGHBORS] + (["patch mIoU"] if patches else [])
    lines = [f"| {'in %':<{width}} |" + "".join(f" {column} |" for column in columns)]
    lines.append(f"| {'-' * width} |" + "".join(f" {'-' * (len(column) - 1)}: |" for column in columns))
    for name, row in accuracies.items():
        values = [row[k] for k in NUM_NEIGHBORS] + ([patches[name]] if patches else [])
        cells = (f" {value:{len(column)}.1f} |" for value, column in zip(values, columns, strict=True))
        lines.append(f"| {name:<{width}} |" + "".join(cells))
    return "\n".join(lines) + "\n"


def draw_features(networks: Mapping[str, DinoVisionTransformer], cfg: Config, val_dataset: str, output: Path) -> None:
    """Draw images of every class, and below each its patch features by the networks."""
    dataset = make_dataset(dataset_str=val_dataset)
    targets = dataset.get_targets()
    classes = np.unique(targets)  # scenes have none of the background
    of_class = [np.flatnonzero(targets == target)[:IMAGES_PER_CLASS] for target in classes]
    images = [dataset.get_image(index) for index in np.stack(of_class, axis=1).flatten()]  # one row: all classes
    to_tensor = ToNormalizedTensor(cfg.augmentation.mean, cfg.augmentation.std)
    tensors = torch.stack([to_tensor(image) for image in images])
    rows = {"image": images}
    for name, network in networks.items():
        tokens = patch_tokens(network, tensors, shifts=cfg.student.patch_size)
        rows[name] = to_images(pca_colors(tokens))
    title = "Patch features: their first three principal components as red, green and blue, one basis per network"
    headings = [dataset.classes[each] for each in classes]
    contact_sheet(rows, title=title, headings=headings, columns=len(headings)).save(output)


def main(folder: Path) -> int:
    """Draw, evaluate, write; print the table."""
    folder = folder.resolve()
    setup_logging(folder)
    cfg = config.load(folder / "config.yaml")
    teacher = latest_teacher(folder)
    train_dataset = cfg.train.dataset_path
    val_dataset = train_dataset.replace("split=TRAIN", "split=VAL")
    networks = networks_of(cfg, teacher)
    draw_features(networks, cfg, val_dataset, folder / "pca.png")
    args = argparse.Namespace(pretrained_weights=str(teacher), train_dataset=train_dataset, val_dataset=val_dataset)
    features = {"raw pixels": nn.Flatten(), **networks}
    accuracies = compare(features, cfg, train_dataset, val_dataset)
    write_results(folder / "knn.json", evaluation="knn", metrics=accuracies, args=args)
    patches: dict[str, float] = {}
    if has_classes(val_dataset):
        pixels = PixelPatches(cfg.student.patch_size)
        of_patches = {"raw pixels": pixels} | {name: PatchTokens(network) for name, network in networks.items()}
        patches = compare_patches(of_patches, cfg, train_dataset, val_dataset)
        write_results(folder / "results_eval_patches.json", evaluation="patch k-NN mIoU", metrics=patches, args=args)
    table = as_table(accuracies, patches)
    (folder / "knn.md").write_text(table)
    report = write_report([folder], title="Quickstart")
    print(f"\n{val_dataset} by the neighbors in {train_dataset}:\n\n{table}\nThe whole run on a page: {report}")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="evaluate a quickstart run and draw its features")
    parser.add_argument("folder", type=Path, help="output folder of the training")
    sys.exit(main(parser.parse_args().folder))
