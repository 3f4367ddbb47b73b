"""Results of a quickstart run: a figure of patch features, k-NN accuracies, and a report of the run.

    python scripts/quickstart_report.py OUT

reads what training left in OUT and adds pca.png, knn.json, knn.md and report.html. The latest teacher is compared with
the same network before training and with raw pixels, all three by the same evaluation.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # run by path: make dinov2 and scripts importable

import numpy as np
import torch
from torch import nn

from dinov2 import config
from dinov2.analysis.pca import pca_colors, to_images
from dinov2.config import Config
from dinov2.data import make_dataset
from dinov2.data.transforms import ToNormalizedTensor, make_classification_eval_transform
from dinov2.eval import setup
from dinov2.eval.knn import eval_knn
from dinov2.eval.results import write_results
from dinov2.log import setup_logging
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.report.page import write_report
from dinov2.visualization.contact_sheet import contact_sheet
from dinov2.visualization.feature_maps import patch_tokens

NUM_NEIGHBORS = (10, 20)
IMAGES_PER_CLASS = 3

Accuracies = dict[str, dict[int, float]]  # features -> {k: top-1 in percent}


def latest_teacher(folder: Path) -> Path:
    """Find the teacher checkpoint of the last step.

    Raises:
        FileNotFoundError: There is none.
    """
    dumps = list(folder.glob("eval/training_*/teacher_checkpoint.pth"))
    if not dumps:
        raise FileNotFoundError(f"no eval/training_*/teacher_checkpoint.pth in {folder}: did the training finish?")
    return max(dumps, key=lambda path: int(path.parent.name.removeprefix("training_")))


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


def as_table(accuracies: Accuracies) -> str:
    """Format the accuracies as a Markdown table."""
    width = max(map(len, accuracies))
    lines = [f"| {'top-1 in %':<{width}} |" + "".join(f" k = {k} |" for k in NUM_NEIGHBORS)]
    lines.append(f"| {'-' * width} |" + " -----: |" * len(NUM_NEIGHBORS))
    for name, row in accuracies.items():
        lines.append(f"| {name:<{width}} |" + "".join(f" {row[k]:6.1f} |" for k in NUM_NEIGHBORS))
    return "\n".join(lines) + "\n"


def draw_features(networks: Mapping[str, DinoVisionTransformer], cfg: Config, val_dataset: str, output: Path) -> None:
    """Draw images of every class, and below each its patch features by the networks."""
    dataset = make_dataset(dataset_str=val_dataset)
    targets = dataset.get_targets()
    of_class = [np.flatnonzero(targets == target)[:IMAGES_PER_CLASS] for target in range(len(dataset.classes))]
    images = [dataset.get_image(index) for index in np.stack(of_class, axis=1).flatten()]  # one row: all classes
    to_tensor = ToNormalizedTensor(cfg.augmentation.mean, cfg.augmentation.std)
    tensors = torch.stack([to_tensor(image) for image in images])
    rows = {"image": images}
    for name, network in networks.items():
        tokens = patch_tokens(network, tensors, shifts=cfg.student.patch_size)
        rows[name] = to_images(pca_colors(tokens))
    title = "Patch features: their first three principal components as red, green and blue, one basis per network"
    contact_sheet(rows, title=title, headings=dataset.classes, columns=len(dataset.classes)).save(output)


def main(args: argparse.Namespace) -> int:
    """Draw, evaluate, write; print the table."""
    folder: Path = args.folder.resolve()
    setup_logging(folder)
    cfg = config.load(folder / "config.yaml")
    teacher = latest_teacher(folder)
    train_dataset = cfg.train.dataset_path
    val_dataset = train_dataset.replace("split=TRAIN", "split=VAL")
    trained = setup.build_model_for_eval(cfg, str(teacher))
    untrained = setup.build_model_for_eval(cfg, None)
    draw_features({"trained": trained, "untrained": untrained}, cfg, val_dataset, folder / "pca.png")
    features = {"raw pixels": nn.Flatten(), "untrained": untrained, "trained": trained}
    accuracies = compare(features, cfg, train_dataset, val_dataset)
    write_results(
        folder / "knn.json",
        evaluation="knn",
        metrics=accuracies,
        args=argparse.Namespace(pretrained_weights=str(teacher), train_dataset=train_dataset, val_dataset=val_dataset),
    )
    table = as_table(accuracies)
    (folder / "knn.md").write_text(table)
    report = write_report([folder], title="Quickstart")
    print(f"\nk-NN classification of {val_dataset} by {train_dataset}:\n\n{table}\nThe whole run on a page: {report}")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="evaluate a quickstart run and draw its features")
    parser.add_argument("folder", type=Path, help="output folder of the training")
    sys.exit(main(parser.parse_args()))
