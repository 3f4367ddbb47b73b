"""Segmentation without training: patch k-NN and logistic regression on the tokens of whole images (CAPI's protocol).

Shapes: n images of side S pixels, N patches of each, D width.
"""

import argparse
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dinov2 import distributed
from dinov2.config import DTYPES, Config
from dinov2.data.dense.base import DenseDataset, DenseSubset
from dinov2.data.dense.resampling import resized_map
from dinov2.data.images import AnyImage
from dinov2.data.workers import SupervisedLoader
from dinov2.eval import setup
from dinov2.eval.dense import heads
from dinov2.eval.dense.data import Sets, named_sets, open_sets
from dinov2.eval.dense.patch_probes import (
    Patches,
    ProbeResult,
    Standardizer,
    hold_out_images,
    run_knn_probe,
    run_logistic_probe,
    to_patches,
)
from dinov2.eval.feature_cache import FeatureCache
from dinov2.eval.features import extract_features
from dinov2.eval.results import archive_results
from dinov2.models.vision_transformer import DinoVisionTransformer

logger = logging.getLogger(__name__)

RESULTS_FILE = "results_eval_segmentation.json"
PUBLISHED_SIDE = 224  # pixels
SOURCE = "CAPI (arXiv 2502.08769): patch k-NN and logistic regression, images squeezed to squares, no sliding windows"


class PatchTokens(nn.Module):
    """Images (B, 3, S, S) -> patch tokens of the last block after the final norm, (B, N, D)."""

    def __init__(self, backbone: DinoVisionTransformer) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        (tokens,) = self.backbone.get_intermediate_layers(images, n=1)
        return cast(Tensor, tokens)


class Squeezed:
    """Image -> (C, side, side) float32: bicubic, the ratio not kept, normalized."""

    def __init__(self, side: int, mean: Sequence[float], std: Sequence[float]) -> None:
        self.side = side
        self.shift, self.scale = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))

    def __call__(self, image: AnyImage) -> Tensor:
        pixels = np.array(image.resize((self.side, self.side), Image.Resampling.BICUBIC))
        return (torch.from_numpy(pixels).permute(2, 0, 1).float() / 255 - self.shift) / self.scale


class _LabelMaps(torch.utils.data.Dataset[np.ndarray]):
    def __init__(self, dataset: DenseDataset, side: int) -> None:
        self.dataset, self.side = dataset, side

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> np.ndarray:
        return resized_map(self.dataset.get_map(index), (self.side, self.side))


def label_maps(dataset: DenseDataset, side: int, num_workers: int) -> Tensor:
    """The label maps of a dataset, resized by nearest neighbors: (n, side, side) int16."""
    loader = SupervisedLoader(
        _LabelMaps(dataset, side),
        batch_size=16,
        num_workers=num_workers,
        generator=torch.Generator().manual_seed(0),  # otherwise it draws from the global one
    )
    return torch.cat(list(loader))


class Probes(NamedTuple):
    """Results of the two probes."""

    knn: ProbeResult
    logistic: ProbeResult


def run_probes(train: Patches, test: Patches, num_images: int, num_classes: int, max_iter: int = 1000) -> Probes:
    """Choose the hyperparameters on a tenth of the training images, and score both probes.

    Args:
        train: Patches of `num_images` training images, image by image.
        test: Patches of the test images.
        num_images: Number of training images.
        num_classes: Number of classes.
        max_iter: Iterations of the logistic regression.
    """
    standardize = Standardizer.of(train.features)
    train, test = (Patches(standardize(each.features), each.labels) for each in (train, test))
    per_image = len(train.labels) // num_images
    parts = [(index[:, None] * per_image + torch.arange(per_image)).flatten() for index in hold_out_images(num_images)]
    fitted, held_out = (Patches(train.features[rows], train.labels[rows]) for rows in parts)
    return Probes(
        run_knn_probe(fitted, held_out, test, num_classes),
        run_logistic_probe(fitted, held_out, test, num_classes, max_iter=max_iter),
    )


def _without_label(label: object) -> None:
    return None


def patches_of(
    dataset: DenseDataset,
    extract: Callable[[DenseDataset], tuple[Tensor, Tensor]],
    side: int,
    patch_size: int,
    num_workers: int,
) -> Patches:
    """Tokens and labels of all patches of a dataset, without unreadable images, on the CPU."""
    dataset.target_transform = _without_label  # a label of the image would take the place of its index
    features, indices = extract(dataset)
    maps = label_maps(dataset, side, num_workers)[indices.cpu()]
    grid = side // patch_size
    return to_patches(features.cpu(), maps, (grid, grid))


def image_side(args: argparse.Namespace, cfg: Config) -> int:
    """Side of the images in pixels; a `ValueError` if it is not a whole number of patches."""
    small, patch_size = cfg.crops.global_crops_size < setup.SMALLEST_PUBLISHED_SIZE, cfg.student.patch_size
    side = args.crop_size or (cfg.crops.global_crops_size if small else PUBLISHED_SIDE)
    if side % patch_size:
        raise ValueError(f"--crop-size {side} is not a multiple of student.patch_size = {patch_size}")
    return cast(int, side)


def main(args: argparse.Namespace) -> None:
    """Run the probes of the command line."""
    started = time.monotonic()
    if args.head is not None:
        raise ValueError("--head has no meaning with --protocol capi, whose probes are fitted to --train-dataset")
    with distributed.session():
        cfg = setup.setup(args, named_sets(args))
        path = Path(args.output_dir) / RESULTS_FILE
        archive_results(path)
        sets, side = chosen_sets(args, cfg), image_side(args, cfg)
        assert sets.train is not None, "probes have a training set"
        model = PatchTokens(setup.build_model_for_eval(cfg, args.pretrained_weights))
        cache = feature_cache(args, cfg, side)

        def extract(dataset: DenseDataset) -> tuple[Tensor, Tensor]:
            dataset.transform = Squeezed(side, cfg.augmentation.mean, cfg.augmentation.std)
            return extract_features(
                model,
                dataset,
                args.probe_batch_size,
                args.num_workers,
                gather_on_cpu=True,
                autocast_dtype=DTYPES[args.precision],
                cache=cache,
                kind="patch_tokens",
            )

        loading: dict[str, Any] = {"side": side, "patch_size": cfg.student.patch_size, "num_workers": args.num_workers}
        train, test = (patches_of(dataset, extract, **loading) for dataset in (sets.train, sets.val))
        num_images, num_classes = len(train.labels) * cfg.student.patch_size**2 // side**2, sets.val.num_classes
        probes = distributed.from_main(lambda: run_probes(train, test, num_images, num_classes))
        metrics = {
            name: {
                "mIoU": 100 * result.test.mIoU,
                "acc": 100 * result.test.acc,
                **result.best,
                "held out": [{**choice, "mIoU": 100 * scores.mIoU} for choice, scores in result.held_out],
            }
            for name, result in probes._asdict().items()
        }
        heads.report(
            path,
            "segmentation",
            metrics,
            args,
            unit="percent",
            table=[(f"{name} mIoU", result["mIoU"]) for name, result in metrics.items()],
            protocol="capi" if side == PUBLISHED_SIDE else f"capi with side={side}",
            resolution=f"images squeezed to {side} x {side} pixels",
            head=f"fitted here, to {num_images} images",
            protocol_settings={"source": SOURCE, "side": side},
            sets=sets,
            started=started,
            feature_files=cache.files,
        )


def chosen_sets(args: argparse.Namespace, cfg: Config) -> Sets:
    """The datasets of the command line, the first with at most `--max-train-images`, evenly spaced."""
    sets = open_sets(args, cfg, "segmentation")
    assert sets.train is not None, "--head is not given"
    if args.max_train_images is not None and args.max_train_images < len(sets.train):
        chosen = np.arange(args.max_train_images) * len(sets.train) // args.max_train_images
        logger.warning("%d of the %d training images are used", len(chosen), len(sets.train))
        return sets._replace(train=DenseSubset(sets.train, chosen))
    return sets


def feature_cache(args: argparse.Namespace, cfg: Config, side: int) -> FeatureCache:
    """The cache of patch tokens."""
    if args.feature_cache == "none":
        return FeatureCache()
    folder = Path(args.feature_cache or Path(args.output_dir) / "features")
    facts = {**setup.frozen_model_facts(args, cfg), "precision": args.precision, "squeezed to": side}
    return FeatureCache(folder, facts)
