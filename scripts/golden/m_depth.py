"""Sets m_depth_losses and m_depth_metrics: values and gradients of losses, masks, and metrics of depth maps."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dinov2.eval.dense import depth_losses
from dinov2.eval.dense.depth_metrics import (
    DepthMetrics,
    align_least_squares,
    clamp_depth,
    crop_rectangle,
    depth_metrics,
    mean_over_images,
    valid_pixels,
)
from dinov2.models.dense.averaging import predict_depth
from dinov2.models.dense.layers import resize
from scripts.golden.comparison import Comparison
from scripts.golden.recording import Recording

LOSS_TOLERANCE = 7e-6
METRIC_TOLERANCE = 1e-5
CROPS = {
    "FULL": "full",
    "NYU_EIGEN": "nyu_eigen",
    "kitti_garg": "kitti_garg",
    "kitti_eigen": "kitti_eigen",
    "nyu_eigen_scaled (dinov3)": "nyu_eigen",
    "kitti_garg (zoedepth)": "kitti_garg",
    "kitti_eigen (zoedepth)": "kitti_eigen",
}
NYU_EIGEN_UNSCALED = "nyu_eigen (zoedepth)"  # fixed numbers, for 480 x 640 only


# --- Losses ----------------------------------------------------------------------------------------------------------


def replay_depth_losses(recording: Recording, comparison: Comparison) -> None:
    for name, case in recording.json["cases"].items():
        number, index = re.fullmatch(r"n(\d+)(\[0,0\])?", case["input"]).groups()  # type: ignore[union-attr]
        prediction, target, mask = (recording.input(f"in.n{number}.{key}") for key in ("pred", "gt", "mask"))
        if index:
            prediction, target = prediction[0, 0], target[0, 0]
        leaf = prediction.clone().requires_grad_()
        for call, recorded in enumerate(case.get("calls", [])):
            comparison.close(
                f"{name}.call{call}", _loss(case, leaf, target, mask, call), recorded, tolerance=LOSS_TOLERANCE
            )
        loss = _loss(case, leaf, target, mask, max(len(case.get("calls", [])) - 1, 0))
        (gradient,) = torch.autograd.grad(loss, leaf)
        compare = comparison.tensor
        if case["value"] == 0:
            comparison.exact(f"{name}.value", loss.detach(), recording.tensors[f"{name}.value"])
            comparison.exact(f"{name}.grad", gradient, recording.tensors[f"{name}.grad"])
            continue
        compare(f"{name}.value", loss.detach(), tolerance=LOSS_TOLERANCE)
        compare(f"{name}.grad", gradient, tolerance=LOSS_TOLERANCE)
        comparison.close(f"{name} in JSON", loss, case["value"], tolerance=LOSS_TOLERANCE)


def _loss(case: Mapping[str, Any], prediction: Tensor, target: Tensor, given: Tensor, step: int) -> Tensor:
    args = case["args"] if isinstance(case["args"], dict) else {}
    is_published = case["repo"] == "dinov2"
    mask = depth_losses.labeled_pixels(target, args.get("max_depth")) if is_published else given.bool()
    weight = args.get("loss_weight", 1.0)
    if case["cls"] == "SigLoss":
        warm_up = args.get("warm_iter", depth_losses.WARM_UP_STEPS) if args.get("warm_up", False) else 0
        return weight * depth_losses.sig_loss(prediction, target, mask, step=step, warm_up_steps=warm_up)
    if case["cls"] == "MultiLoss":
        weights = _weights(case["args"])
        return depth_losses.weighted_depth_loss(weights, prediction, target, mask, step=step)
    losses = {"GradientLogLoss": "gradient_log", "GradientLoss": "gradient", "L1Loss": "l1"}
    name = "published_gradient" if is_published and case["cls"] == "GradientLoss" else losses[case["cls"]]
    return weight * depth_losses.LOSSES[name](prediction, target, mask)


def _weights(text: str) -> dict[str, float]:
    """ "SIGLOSS x1 (...) + GRADIENT_LOG_LOSS x0.5" -> {"sig": 1.0, "gradient_log": 0.5}."""
    names = {"SIGLOSS": "sig", "GRADIENT_LOG_LOSS": "gradient_log", "GRADIENT_LOSS": "gradient", "L1_LOSS": "l1"}
    return {names[name]: float(weight) for name, weight in re.findall(r"([A-Z][A-Z0-9_]+) x([\d.]+)", text)}


# --- Metrics ---------------------------------------------------------------------------------------------------------


def replay_depth_metrics(recording: Recording, comparison: Comparison) -> None:
    _compare_rectangles(recording, comparison)
    for run, recorded in recording.json["results"].items():
        kind, options = run.partition("_")[0], run.removesuffix("_fp64")
        config = recording.json["config"][kind]
        images = [
            (_nyu if kind == "nyu" else _kitti)(recording, comparison, number, options, config["range"])
            for number in range(config["images"])
        ]
        per_image = [depth_metrics(*image, published_silog=True) for image in images]
        _compare_metrics(comparison, run, per_image, recorded)


def _compare_rectangles(recording: Recording, comparison: Comparison) -> None:
    for size, crops in recording.json["mask_rectangles"].items():
        height, width = map(int, size.split("x"))
        for name, edges in crops.items():
            if name == NYU_EIGEN_UNSCALED and size != "480x640":
                continue
            rows, columns = crop_rectangle(CROPS.get(name, "nyu_eigen"), height, width)
            comparison.exact(f"{size} {name}", [rows.start, rows.stop, columns.start, columns.stop], edges)


def _nyu(
    recording: Recording, comparison: Comparison, number: int, options: str, depths: tuple[float, float]
) -> tuple[Tensor, Tensor, Tensor]:
    limits = dict(zip(("min_depth", "max_depth"), depths, strict=True))
    target = recording.input(f"nyu.{number}.gt")
    crop = "NYU_EIGEN" if "EIGEN" in options else "FULL"
    valid = valid_pixels(target, crop=CROPS[crop], **limits)
    mask = f"nyu.{number}.mask_{'eigen' if 'EIGEN' in options else 'full'}"
    comparison.exact(mask, valid, recording.tensors[mask].bool())
    recording.inputs.add(mask)
    prediction = recording.input(f"nyu.{number}.pred")
    both = recording.input(f"nyu.{number}.pred_tta")
    if "tta" in options:
        predictions = iter(both.split(1))  # of the image, then of its mirror image
        prediction = predict_depth(lambda images: next(predictions), target, mirror=True)
    height, width = target.shape[-2:]
    prediction = resize(prediction, (height, width))
    if "lsq" in options:
        prediction = align_least_squares(prediction, target, valid)
    return clamp_depth(prediction, **limits), target, valid


def _kitti(
    recording: Recording, comparison: Comparison, number: int, options: str, depths: tuple[float, float]
) -> tuple[Tensor, Tensor, Tensor]:
    limits = dict(zip(("min_depth", "max_depth"), depths, strict=True))
    target, prediction = (recording.input(f"kitti.{number}.{key}") for key in ("gt", "pred"))
    return clamp_depth(prediction, **limits), target, valid_pixels(target, crop=CROPS[options], **limits)


def _compare_metrics(
    comparison: Comparison, run: str, per_image: list[DepthMetrics], recorded: Mapping[str, Any]
) -> None:
    for name, values in recorded["per_image"].items():
        found = torch.tensor([getattr(metrics, name) for metrics in per_image], dtype=torch.float64)
        theirs = torch.tensor([float(value) for value in values], dtype=torch.float64)
        comparison.exact(f"{run}.{name} nan", found.isnan(), theirs.isnan())
        comparison.close(f"{run}.{name}", found.nan_to_num(), theirs.nan_to_num(), tolerance=METRIC_TOLERANCE)
    means = mean_over_images(per_image)
    for name, value in recorded.get("mean", {}).items():
        comparison.close(f"{run}.mean.{name}", getattr(means, name), value, tolerance=METRIC_TOLERANCE)
