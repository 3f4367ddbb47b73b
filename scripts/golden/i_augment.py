"""Set i: augmentation, op by op where it is deterministic, and in statistics where it draws.

Ours draws from other generators than the released code, so whole pipelines can only be compared in statistics. They
are of fewer draws than the recorded ones; both sides' standard errors enter the comparison.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import Compose, InterpolationMode
from torchvision.transforms import functional as operations

from dinov2.data import transforms
from dinov2.data.augment import DataAugmentationDINO
from dinov2.data.transforms import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ToNormalizedTensor,
    gaussian_blur,
    make_classification_eval_transform,
)
from scripts.golden.comparison import Comparison
from scripts.golden.recording import Recording

DRAWS_PER_IMAGE = 300
GEOMETRY_DRAWS = 4000
STATISTICS_SEED = 20240607
ONE_LEVEL = 1.0  # of 255: the blur is ours, not Pillow's

# Name in the recording -> where our pipelines look the operation up.
DRAWN_OPERATIONS = {
    "hflip": (operations, "hflip"),
    "adjust_brightness": (operations, "adjust_brightness"),
    "adjust_contrast": (operations, "adjust_contrast"),
    "adjust_saturation": (operations, "adjust_saturation"),
    "adjust_hue": (operations, "adjust_hue"),
    "rgb_to_grayscale": (operations, "rgb_to_grayscale"),
    "gaussian_blur": (transforms, "gaussian_blur"),
    "solarize": (operations, "solarize"),
}


def replay_augment(recording: Recording, comparison: Comparison) -> None:
    images = {match[0]: _image(recording.input(match[0])) for match in recording.matches(r"image(\d+)")}
    for case in recording.json["deterministic"]:
        _compare_operations(recording, comparison, case, images[f"image{case['image']}"])
    _compare_eval_transforms(recording, comparison, images)
    sizes = recording.json["sizes"]
    augmentation = DataAugmentationDINO(
        sizes["global_scale"],
        sizes["local_scale"],
        sizes["n_local"],
        global_crops_size=sizes["global_size"],
        local_crops_size=sizes["local_size"],
    )
    torch.manual_seed(STATISTICS_SEED)
    crops = augmentation(images["image0"])
    comparison.exact("local crops", len(crops.local_crops), sizes["n_local"])
    views = {
        "global1": augmentation.global_view_1,
        "global2": augmentation.global_view_2,
        "local": augmentation.local_view,
    }
    for name, recorded in recording.json["statistics"].items():
        _compare_view(comparison, name, views[name], images, recorded)
    for name, recorded in recording.json["crop_geometry"].items():
        _compare_geometry(comparison, name, views["local" if name == "local" else "global1"], recorded)


def _image(pixels: Tensor) -> Image.Image:
    return Image.fromarray(pixels.numpy())


def _pixels(image: Image.Image) -> Tensor:
    """RGB image -> (H, W, 3) uint8."""
    return operations.pil_to_tensor(image.convert("RGB")).permute(1, 2, 0)


# --- Deterministic ---------------------------------------------------------------------------------------------------


def _compare_operations(recording: Recording, comparison: Comparison, case: dict[str, Any], image: Image.Image) -> None:
    prefix = f"det{case['index']}."
    box = (case["top"], case["left"], case["height"], case["width"])
    side = [case["size"], case["size"]]
    crop = operations.resized_crop(image, *box, side, InterpolationMode.BICUBIC, antialias=True)
    for name in recording.names(prefix):
        operation, *position = name.removeprefix(prefix).split(".")
        if operation == "normalized":
            comparison.tensor(name, ToNormalizedTensor(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)(crop))
            continue
        if operation == "resized_crop":
            result = crop
        elif operation == "chain":
            result = _chain(crop, case["chain"])
        else:
            factors = [factor for key, values in case["ops"].items() if key.startswith(operation) for factor in values]
            result = _apply(crop, operation, factors[int(position[0])] if position else None)
        comparison.levels(name, _pixels(result), allowed=ONE_LEVEL)


def _apply(image: Image.Image, operation: str, factor: float | None = None) -> Image.Image:
    if threshold := re.fullmatch(r"solarize(\d+)", operation):
        return operations.solarize(image, int(threshold[1]))
    simple: dict[str, Callable[..., Image.Image]] = {
        "hflip": operations.hflip,
        "grayscale": lambda image: operations.rgb_to_grayscale(image, num_output_channels=3),
        "gaussian_blur": gaussian_blur,
        "adjust_brightness": operations.adjust_brightness,
        "adjust_contrast": operations.adjust_contrast,
        "adjust_saturation": operations.adjust_saturation,
        "adjust_hue": operations.adjust_hue,
    }
    return simple[operation](image) if factor is None else simple[operation](image, factor)


def _chain(crop: Image.Image, text: str) -> Image.Image:
    """Applies a recorded chain such as "resized_crop, hflip, contrast 1.2, blur sigma 1.3 kernel 9, solarize 128"."""
    image = crop
    for step in text.split(", "):
        words = step.split()
        match words[0]:
            case "resized_crop":
                continue
            case "blur":
                image = gaussian_blur(image, float(words[2]))
            case "solarize":
                image = _apply(image, f"solarize{words[1]}")
            case "brightness" | "contrast" | "saturation" | "hue":
                image = _apply(image, f"adjust_{words[0]}", float(words[1]))
            case _:
                image = _apply(image, words[0])
    return image


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


def _compare_view(
    comparison: Comparison, name: str, view: Compose, images: dict[str, Image.Image], recorded: dict[str, Any]
) -> None:
    draws = recorded["draws_per_image"]
    with _operations_seen() as seen:
        for image_name, theirs in recorded["per_image"].items():
            ours = _crop_statistics(torch.stack([view(images[image_name]) for _ in range(DRAWS_PER_IMAGE)]))
            for key, mean in theirs["mean"].items():
                label = f"{name}, {image_name}: {key}"
                comparison.mean(label, ours[key], mean, theirs["std"][key], draws)
                comparison.spread(f"{label}, spread", ours[key], theirs["std"][key], draws)
    recorded_draws = draws * len(recorded["per_image"])
    our_draws = DRAWS_PER_IMAGE * len(recorded["per_image"])
    for operation, share in recorded["op_frequency"].items():
        happened = torch.arange(our_draws) < len(seen[operation])
        comparison.share(f"{name}: share of {operation}", happened, share, recorded_draws)
    for factor, theirs in recorded["factor_stats"].items():
        operation = "gaussian_blur" if factor == "sigma" else factor
        values = torch.tensor([call.args[1] for call in seen[operation]])
        times = round(recorded["op_frequency"][operation] * recorded_draws)
        comparison.mean(f"{name}: {factor}", values, theirs["mean"], theirs["std"], times)
        comparison.spread(f"{name}: {factor}, spread", values, theirs["std"], times)
        comparison.leave_out("smallest and largest of many draws", count=2)


@contextmanager
def _operations_seen() -> Iterator[dict[str, list[Any]]]:
    """Lists the calls of every drawn operation while they do their work as usual."""
    with ExitStack() as stack:
        spies = {
            name: stack.enter_context(mock.patch.object(home, attribute, wraps=getattr(home, attribute)))
            for name, (home, attribute) in DRAWN_OPERATIONS.items()
        }
        seen: dict[str, list[Any]] = {name: [] for name in spies}
        yield seen
        for name, spy in spies.items():
            seen[name] += spy.call_args_list


def _crop_statistics(crops: Tensor) -> dict[str, Tensor]:
    """Normalised crops (draws, 3, S, S) -> statistics of each crop, (draws,)."""
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


def _compare_geometry(comparison: Comparison, name: str, view: Compose, recorded: dict[str, Any]) -> None:
    crop = view.transforms[0]
    for size, theirs in recorded.items():
        width, height = (int(number) for number in size.split("x"))
        image = Image.new("RGB", (width, height))
        boxes = [crop.get_params(image, crop.scale, crop.ratio) for _ in range(GEOMETRY_DRAWS)]
        top, left, rows, columns = torch.tensor(boxes, dtype=torch.float64).unbind(1)
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
