"""Set i: augmentation, op by op where it is deterministic, and in statistics where it draws.

Ours draws from other generators than the released code, so whole pipelines can only be compared in statistics. They
are of fewer draws than the recorded ones; both sides' standard errors enter the comparison.

Two implementations carry out the same draws: "pil", by the operations that the released code calls, and "tensor", the
default, in float32. Both are compared with the recording, operation by operation and in the statistics of their crops;
how often operations are drawn, their factors and the boxes are the draws' own.
"""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dinov2.data.augment import IMPLEMENTATIONS, DataAugmentationDINO
from dinov2.data.crop_params import (
    BRIGHTNESS,
    CONTRAST,
    HUE,
    NEUTRAL_FACTORS,
    SATURATION,
    CropParam,
    CropParams,
    stack_crop_params,
)
from dinov2.data.transforms import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    make_classification_eval_transform,
)
from scripts.golden.comparison import Comparison
from scripts.golden.recording import Recording

DRAWS_PER_IMAGE = 300
GEOMETRY_DRAWS = 4000
STATISTICS_SEED = 20240607

# Of 255. Pillow's and torch's resampling round their weights in different ways.
ONE_LEVEL = 1.0
# Pillow turns the hue in 8 bits: a step of its 256 is worth 6 levels of the steepest channel, which float32 does not
# round to.
HUE_LEVELS = 8.0

VIEWS = {"global1": 0, "global2": 1, "local": 2}  # name in the recording -> which of the crops
JITTER = {
    "adjust_brightness": BRIGHTNESS,
    "adjust_contrast": CONTRAST,
    "adjust_saturation": SATURATION,
    "adjust_hue": HUE,
}


def replay_augment(recording: Recording, comparison: Comparison) -> None:
    images = {match[0]: _image(recording.input(match[0])) for match in recording.matches(r"image(\d+)")}
    for case in recording.json["deterministic"]:
        _compare_operations(recording, comparison, case, images[f"image{case['image']}"])
    _compare_eval_transforms(recording, comparison, images)
    sizes = recording.json["sizes"]
    torch.manual_seed(STATISTICS_SEED)
    for implementation in IMPLEMENTATIONS:
        augmentation = DataAugmentationDINO(
            sizes["global_scale"],
            sizes["local_scale"],
            sizes["n_local"],
            global_crops_size=sizes["global_size"],
            local_crops_size=sizes["local_size"],
            implementation=implementation,
        )
        comparison.exact("local crops", len(augmentation(images["image0"]).local_crops), sizes["n_local"])
        drawn = {name: _draw(augmentation, image) for name, image in images.items()}
        for name, recorded in recording.json["statistics"].items():
            _compare_view(comparison, implementation, name, drawn, recorded)
    for name, recorded in recording.json["crop_geometry"].items():
        _compare_geometry(comparison, name, augmentation, recorded)


def _image(pixels: Tensor) -> Image.Image:
    return Image.fromarray(pixels.numpy())


# --- Deterministic ---------------------------------------------------------------------------------------------------


def _compare_operations(recording: Recording, comparison: Comparison, case: dict[str, Any], image: Image.Image) -> None:
    """Every operation on the recorded crop, and all of them in a chain on the image, by both implementations."""
    prefix, side = f"det{case['index']}.", case["size"]
    crop = _image(recording.tensors[f"{prefix}resized_crop"])
    box = (case["top"], case["left"], case["height"], case["width"])
    for name in recording.names(prefix):
        operation, *position = name.removeprefix(prefix).split(".")
        if operation == "normalized":
            augmentation = DataAugmentationDINO((1.0, 1.0), (1.0, 1.0), 0, side)
            params = CropParams(*(np.array([value] * 2) for value in _nothing((0, 0, side, side))))
            comparison.tensor(name, augmentation.apply(np.array(crop), params).global_crops[0])
            continue
        factors = [factor for key, values in case["ops"].items() if key.startswith(operation) for factor in values]
        if operation == "resized_crop":
            source, param = image, _nothing(box)
        elif operation == "chain":
            source, param = image, _chain(_nothing(box), case["chain"])
        else:
            factor = factors[int(position[0])] if position else 0.0
            source, param = crop, _with(_nothing((0, 0, side, side)), operation, factor)
        for implementation, make_crops in IMPLEMENTATIONS.items():
            hue_in_8_bits = implementation == "tensor" and operation in ("adjust_hue", "chain")
            (result,) = make_crops(np.array(source), [(param, side)])
            comparison.levels(name, result[0].permute(1, 2, 0), allowed=HUE_LEVELS if hue_in_8_bits else ONE_LEVEL)


def _nothing(box: tuple[int, int, int, int]) -> CropParam:
    return CropParam(box, False, (BRIGHTNESS, CONTRAST, SATURATION, HUE), NEUTRAL_FACTORS, False, 0.0, False)


def _with(param: CropParam, operation: str, factor: float) -> CropParam:
    """The param with one more operation, in the words of the recording; the last operation of the jitter comes last."""
    match operation:
        case "hflip":
            return param._replace(flip=True)
        case "grayscale":
            return param._replace(gray=True)
        case "gaussian_blur":
            return param._replace(sigma=factor)
        case "solarize128":
            return param._replace(solarize=True)
    which = JITTER[operation]
    order = (*(other for other in param.order if other != which), which)
    factors = tuple(factor if i == which else other for i, other in enumerate(param.factors))
    return CropParam(param.box, param.flip, order, factors, param.gray, param.sigma, param.solarize)  # type: ignore[arg-type]


def _chain(param: CropParam, text: str) -> CropParam:
    """The param of a recorded chain: "resized_crop, hflip, contrast 1.2, blur sigma 1.3 kernel 9, solarize 128"."""
    for step in text.split(", "):
        words = step.split()
        match words[0]:
            case "resized_crop":
                continue
            case "blur":
                param = _with(param, "gaussian_blur", float(words[2]))
            case "solarize":
                param = _with(param, f"solarize{words[1]}", 0.0)
            case "brightness" | "contrast" | "saturation" | "hue":
                param = _with(param, f"adjust_{words[0]}", float(words[1]))
            case _:
                param = _with(param, words[0], 0.0)
    return param


def _compare_eval_transforms(recording: Recording, comparison: Comparison, images: dict[str, Image.Image]) -> None:
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    for match in recording.matches(r"eval_(\d+)_(\d+)\.(image\d+)(\.uint8)?"):
        transform = make_classification_eval_transform(resize_size=int(match[1]), crop_size=int(match[2]))
        ours = transform(images[match[3]])
        if match[4]:
            ours = ((ours * std + mean) * 255).round().to(torch.uint8).permute(1, 2, 0)
            comparison.levels(match[0], ours, allowed=ONE_LEVEL)
        else:
            comparison.tensor(match[0], ours)


# --- Statistics ------------------------------------------------------------------------------------------------------


def _draw(augmentation: DataAugmentationDINO, image: Image.Image) -> tuple[CropParams, dict[str, Tensor]]:
    """What was drawn for many augmentations of an image, (draws, crops of an image), and the crops of each param."""
    drawn, crops = [], []
    for _ in range(DRAWS_PER_IMAGE):
        pixels, params = augmentation.draw(image)
        drawn.append(CropParams(*(values[None] for values in params)))
        made = augmentation.apply(pixels, params)
        crops.append([*made.global_crops, *made.local_crops][: len(VIEWS)])
    return stack_crop_params(drawn), {
        name: torch.stack([crop[which] for crop in crops]) for name, which in VIEWS.items()
    }


def _compare_view(
    comparison: Comparison,
    implementation: str,
    name: str,
    drawn: dict[str, tuple[CropParams, dict[str, Tensor]]],
    recorded: dict[str, Any],
) -> None:
    draws = recorded["draws_per_image"]
    for image_name, theirs in recorded["per_image"].items():
        ours = _crop_statistics(drawn[image_name][1][name])
        for key, mean in theirs["mean"].items():
            label = f"{implementation}, {name}, {image_name}: {key}"
            comparison.mean(label, ours[key], mean, theirs["std"][key], draws)
            comparison.spread(f"{label}, spread", ours[key], theirs["std"][key], draws)
    recorded_draws = draws * len(recorded["per_image"])
    params = stack_crop_params([CropParams(*(values[:, VIEWS[name]] for values in drawn[image][0])) for image in drawn])
    happened = {
        "hflip": params.flip,
        **{operation: params.factors[:, which] != NEUTRAL_FACTORS[which] for operation, which in JITTER.items()},
        "rgb_to_grayscale": params.gray,
        "gaussian_blur": params.sigma > 0,
        "solarize": params.solarize,
    }
    for operation, share in recorded["op_frequency"].items():
        comparison.share(
            f"{implementation}, {name}: share of {operation}",
            torch.from_numpy(happened[operation]),
            share,
            recorded_draws,
        )
    for factor, theirs in recorded["factor_stats"].items():
        operation = "gaussian_blur" if factor == "sigma" else factor
        drawn_factors = params.sigma if factor == "sigma" else params.factors[:, JITTER[factor]]
        values = torch.from_numpy(drawn_factors[happened[operation]])
        times = round(recorded["op_frequency"][operation] * recorded_draws)
        comparison.mean(f"{implementation}, {name}: {factor}", values, theirs["mean"], theirs["std"], times)
        comparison.spread(f"{implementation}, {name}: {factor}, spread", values, theirs["std"], times)
        comparison.leave_out("smallest and largest of many draws", count=2)


def _crop_statistics(crops: Tensor) -> dict[str, Tensor]:
    """Normalized crops (draws, 3, S, S) -> statistics of each crop, (draws,)."""
    statistics = {}
    for index, channel in enumerate("rgb"):
        statistics[f"mean_{channel}"] = crops[:, index].mean((1, 2))
        statistics[f"std_{channel}"] = crops[:, index].std((1, 2))
    horizontal, vertical = (crops.diff(dim=dim).abs().mean((1, 2, 3)) for dim in (3, 2))
    statistics["mean_abs_neighbour_difference"] = (horizontal + vertical) / 2
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    levels = ((crops * std + mean) * 255).round()
    statistics["is_gray"] = (levels == levels[:, :1]).all(3).all(2).all(1).float()
    return statistics


def _compare_geometry(
    comparison: Comparison, name: str, augmentation: DataAugmentationDINO, recorded: dict[str, Any]
) -> None:
    which = VIEWS["local" if name == "local" else "global1"]
    rng = np.random.default_rng(STATISTICS_SEED)
    for size, theirs in recorded.items():
        width, height = (int(number) for number in size.split("x"))
        boxes = [augmentation.sampler.draw(width, height, rng).boxes[which] for _ in range(GEOMETRY_DRAWS)]
        top, left, rows, columns = torch.from_numpy(np.array(boxes)).double().unbind(1)
        ours = {
            "area_fraction": rows * columns / (height * width),
            "aspect_w_over_h": columns / rows,
            "centre_y_fraction": (top + rows / 2) / height,
            "centre_x_fraction": (left + columns / 2) / width,
        }
        for key, values in ours.items():
            label = f"{name} crop of {size}: {key}"
            comparison.mean(label, values, theirs[key]["mean"], theirs[key]["std"], theirs["draws"])
            comparison.spread(f"{label}, spread", values, theirs[key]["std"], theirs["draws"])
            for q, value in theirs[key].get("quantiles", {}).items():
                comparison.quantile(f"{label}, quantile {q}", values, float(q), value, theirs["draws"])
        whole = (rows == height) & (columns == width)
        comparison.share(f"{name} crop of {size}: whole image", whole, theirs["whole_image_fraction"], theirs["draws"])
