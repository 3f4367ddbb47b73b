"""Benchmark of crops from JPEG files: torchvision on PIL against this package, sides alternating; prints JSON.

    python scripts/bench_data.py [--images FOLDER] [--size 500 375] [--repeats 15] [--workers 0 1 2]

Each image gives 2 global and 8 local crops with the published augmentations, normalized and stacked. The sides:

- plain: what one writes with torchvision's transforms on PIL images
- pil: ours, augmentation.implementation=pil; the same operations, drawn beforehand
- tensor: ours, the default
- albumentations: the same in albumentations, on OpenCV, if it is installed; its bicubic resampling does not antialias
- lightly-train: the crops of its DINOv2, which albumentations makes, if it is installed; images decoded by OpenCV
- device worker: what a worker does with train.augment_on=device: read, header, draw, decode, pack

The images are those of scikit-learn, or all in --images, cropped and scaled to --size and saved as JPEG.
"""

import argparse
import io
import itertools
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # run by path from a clone: make the package importable

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from dinov2.data.augment import DataAugmentationDINO, MultiCrop
from dinov2.data.collate import Batch
from dinov2.data.datasets.base import ImageDataset
from dinov2.data.device_augment import DeviceAugmentation, RawImage, make_crops, pack_raw_batch
from dinov2.data.images import open_image
from dinov2.data.loader import make_train_loader, to_device
from dinov2.data.masking import MaskingGenerator
from dinov2.data.transforms import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

MEANINGS = {
    "images_per_s_and_core": "images / CPU seconds of one thread, median of the repeats",
    "ratio": "median over the repeats of plain's CPU seconds per image / this side's, measured one after the other",
    "loader.images_per_s": "images / seconds that a training process without anything else to do waited for them",
    "loader.images_per_s_and_core": "images / CPU seconds of the working processes together",
    "differences": "of the same crop made in two ways, in levels of 255: mean and greatest over all pixels",
}
_NOTHING_YET = torch.empty(0)
NO_CROPS = Batch(_NOTHING_YET, _NOTHING_YET, _NOTHING_YET, _NOTHING_YET, _NOTHING_YET, upperbound=0)
GLOBAL_SCALE, LOCAL_SCALE, LOCALS = (0.32, 1.0), (0.05, 0.32), 8
LEVELS: dict[str, Any] = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255)}
NOTHING: dict[str, Any] = {
    "flip_probability": 0.0,
    "color_jitter_probability": 0.0,
    "grayscale_probability": 0.0,
    "blur_probabilities": (0.0, 0.0, 0.0),
    "solarize_probability": 0.0,
}
OPERATIONS: dict[str, dict[str, Any]] = {
    "resized crop": NOTHING,
    "brightness": NOTHING | {"color_jitter_probability": 1.0, "color_jitter": (0.4, 0.0, 0.0, 0.0)},
    "contrast": NOTHING | {"color_jitter_probability": 1.0, "color_jitter": (0.0, 0.4, 0.0, 0.0)},
    "saturation": NOTHING | {"color_jitter_probability": 1.0, "color_jitter": (0.0, 0.0, 0.2, 0.0)},
    "hue": NOTHING | {"color_jitter_probability": 1.0, "color_jitter": (0.0, 0.0, 0.0, 0.1)},
    "grayscale": NOTHING | {"grayscale_probability": 1.0},
    "blur": NOTHING | {"blur_probabilities": (1.0, 1.0, 1.0)},
    "solarize": NOTHING | {"solarize_probability": 1.0},
    "everything": {},
}


class Plain:
    """The published augmentation written with torchvision: PIL image -> MultiCrop."""

    def __init__(self, global_size: int, local_size: int) -> None:
        def view(size: int, scale: tuple[float, float], blur: float, solarize: float) -> transforms.Compose:
            return transforms.Compose(
                [
                    transforms.RandomResizedCrop(size, scale=scale, interpolation=InterpolationMode.BICUBIC),
                    transforms.RandomHorizontalFlip(0.5),
                    transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8),
                    transforms.RandomGrayscale(0.2),
                    *([transforms.RandomApply([transforms.GaussianBlur(9, (0.1, 2.0))], blur)] if blur else []),
                    *([transforms.RandomSolarize(128, solarize)] if solarize else []),
                    transforms.ToTensor(),
                    transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
                ]
            )

        self.views = (view(global_size, GLOBAL_SCALE, 0.0, 0.0), view(global_size, GLOBAL_SCALE, 0.9, 0.2))
        self.local_view = view(local_size, LOCAL_SCALE, 0.5, 0.0)

    def __call__(self, image: Image.Image) -> MultiCrop:
        first, second = (view(image) for view in self.views)
        return MultiCrop((first, second), tuple(self.local_view(image) for _ in range(LOCALS)))


class Albumentations:
    """The published augmentation written with albumentations: JPEG file -> MultiCrop."""

    def __init__(self, global_size: int, local_size: int) -> None:
        import albumentations as A
        import cv2
        from albumentations.pytorch import ToTensorV2

        def view(size: int, scale: tuple[float, float], blur: float, solarize: float) -> Any:
            return A.Compose(
                [
                    A.RandomResizedCrop((size, size), scale=scale, interpolation=cv2.INTER_CUBIC),
                    A.HorizontalFlip(p=0.5),
                    A.ColorJitter((0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1), p=0.8),
                    A.ToGray(p=0.2),
                    *([A.GaussianBlur((9, 9), (0.1, 2.0), p=blur)] if blur else []),
                    *([A.Solarize((0.5, 0.5), p=solarize)] if solarize else []),
                    A.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
                    ToTensorV2(),
                ]
            )

        self.views = (view(global_size, GLOBAL_SCALE, 0.0, 0.0), view(global_size, GLOBAL_SCALE, 0.9, 0.2))
        self.local_view = view(local_size, LOCAL_SCALE, 0.5, 0.0)

    def __call__(self, data: bytes) -> MultiCrop:
        image = decode_by_opencv(data)
        first, second = (view(image=image)["image"] for view in self.views)
        return MultiCrop((first, second), tuple(self.local_view(image=image)["image"] for _ in range(LOCALS)))


class LightlyTrain:
    """The crops of lightly-train's DINOv2 with its default settings, those of the release: JPEG file -> MultiCrop."""

    def __init__(self, global_size: int, local_size: int) -> None:
        from lightly_train._methods.dinov2 import dinov2_transform

        args = dinov2_transform.DINOv2ViTTransformArgs(image_size=(global_size, global_size), num_channels=3)
        args.local_view.view_size, args.local_view.num_views = (local_size, local_size), LOCALS
        self.transform = dinov2_transform.DINOv2ViTTransform(args)

    def __call__(self, data: bytes) -> MultiCrop:
        first, second, *others = (view["image"] for view in self.transform({"image": decode_by_opencv(data)}))
        return MultiCrop((first, second), tuple(others))


def decode_by_opencv(data: bytes) -> np.ndarray:
    import cv2

    cv2.setNumThreads(1)
    return cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), 1), cv2.COLOR_BGR2RGB)


class Files(ImageDataset):
    """JPEG files in memory, in an endless loop."""

    def __init__(self, files: list[bytes]) -> None:
        super().__init__()
        self.files = files

    def __len__(self) -> int:
        return 10_000

    def get_image_data(self, index: int) -> bytes:
        return self.files[index % len(self.files)]

    def get_target(self, index: int) -> None:
        return None


def make_files(folder: Path | None, size: tuple[int, int]) -> list[bytes]:
    """Real images of one size as JPEG files of quality 90."""
    if folder is None:
        from sklearn.datasets import load_sample_images

        images = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    else:
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        images = [open_image(path.read_bytes()).load().convert("RGB") for path in paths]
        if not images:
            raise SystemExit(f"error: no images in {folder}")
    files = []
    for image in images:
        file = io.BytesIO()
        ImageOps.fit(image, size, Image.Resampling.LANCZOS).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


def stacked(crops: MultiCrop) -> tuple[Tensor, Tensor]:
    return torch.stack(crops.global_crops), torch.stack(crops.local_crops)


def make_sides(global_size: int, local_size: int) -> dict[str, Callable[[bytes], Any]]:
    """Sides by name: file -> crops, or the output of a worker."""

    def ours(implementation: str) -> DataAugmentationDINO:
        return DataAugmentationDINO(
            GLOBAL_SCALE, LOCAL_SCALE, LOCALS, global_size, local_size, implementation=implementation
        )

    plain, pil, tensor = Plain(global_size, local_size), ours("pil"), ours("tensor")
    raw = DeviceAugmentation(tensor)
    crop_format = raw.crop_format(torch.float32)

    def stacked_by(peer: Callable[[bytes], MultiCrop]) -> Callable[[bytes], Any]:
        return lambda data: stacked(peer(data))

    kinds: dict[str, Any] = {"albumentations": Albumentations, "lightly_train": LightlyTrain}
    peers = {
        name.replace("_", "-"): stacked_by(make(global_size, local_size))
        for name, make in kinds.items()
        if find_spec(name)
    }
    return {
        "plain": lambda data: stacked(plain(Image.open(io.BytesIO(data)).convert("RGB"))),
        "pil": lambda data: stacked(pil(open_image(data))),
        "tensor": lambda data: stacked(tensor(open_image(data))),
        "device worker": lambda data: pack_raw_batch([raw(open_image(data))], NO_CROPS, crop_format),
        "decoding alone": lambda data: open_image(data).pixels(),
        **peers,
    }


def time_sides(sides: dict[str, Callable[[bytes], Any]], files: list[bytes], repeats: int) -> dict[str, Any]:
    """CPU seconds of an image on each side, sides alternating."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name, side in sides.items():
            images = files * max(1, 4 // len(files))
            started = time.process_time()
            for data in images:
                side(data)
            if repeat:
                seconds[name].append((time.process_time() - started) / len(images))
    return {
        name: {
            "ms": round(1000 * statistics.median(times), 3),
            "images_per_s_and_core": round(1 / statistics.median(times), 1),
            "ratio": round(statistics.median(p / s for p, s in zip(seconds["plain"], times, strict=True)), 2),
        }
        for name, times in seconds.items()
    }


def time_loader(files: list[bytes], args: argparse.Namespace, num_workers: int) -> dict[str, Any]:
    """Time the loader of training, with masks, sides alternating."""
    ours = DataAugmentationDINO(GLOBAL_SCALE, LOCAL_SCALE, LOCALS, args.global_size, args.local_size)
    plain = Plain(args.global_size, args.local_size)
    sides: dict[str, dict[str, Any]] = {
        "plain": {"augmentation": plain},
        "tensor": {"augmentation": ours},
        "device worker": {"augmentation": ours, "augment_on": "device"},
    }
    per_second: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(args.loader_repeats):
        for name, settings in sides.items():
            loader = make_train_loader(
                Files(files),
                **settings,
                batch_size=args.batch_size,
                num_workers=num_workers,
                seed=0,
                mask_generator=MaskingGenerator(args.global_size // 14),
                mask_ratio_tuple=(0.1, 0.5),
                mask_probability=0.5,
            )
            batches = iter(loader)
            for _ in range(2 * num_workers + 1):  # what they have ready in advance
                next(batches)
            count = args.batches * (1 if name == "plain" else 4)
            cpu, wall = -_cpu_seconds(), -time.perf_counter()
            for _ in itertools.islice(batches, count):
                pass
            cpu, wall = cpu + _cpu_seconds(), wall + time.perf_counter()
            per_second[name].append((count * args.batch_size / wall, count * args.batch_size / cpu))
            del batches
    return {
        name: {
            "images_per_s": round(statistics.median(waited for waited, _ in rates), 1),
            "images_per_s_and_core": round(statistics.median(worked for _, worked in rates), 1),
            "ratio": round(
                statistics.median(
                    ours / plain for (_, ours), (_, plain) in zip(rates, per_second["plain"], strict=True)
                ),
                2,
            ),
        }
        for name, rates in per_second.items()
    }


def _cpu_seconds() -> float:
    """CPU seconds of this process and of its current workers."""
    seconds = time.process_time()
    for worker in multiprocessing.active_children():
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        seconds += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return seconds


def time_device_augmentation(files: list[bytes], args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Time the augmentation on the device for a packed batch."""
    raw = DeviceAugmentation(DataAugmentationDINO(GLOBAL_SCALE, LOCAL_SCALE, LOCALS, args.global_size, args.local_size))
    images = [raw(open_image(data)) for data in itertools.islice(itertools.cycle(files), args.batch_size)]
    packed = pack_raw_batch(images, NO_CROPS, raw.crop_format(torch.float32))
    seconds = []
    for repeat in range(args.repeats + 1):
        started = time.perf_counter()
        next(to_device([packed], device))
        if device.type == "cuda":
            torch.cuda.synchronize()
        if repeat:
            seconds.append((time.perf_counter() - started) / args.batch_size)
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu, for comparison only",
        "batch_size": args.batch_size,
        "ms_per_image": round(1000 * statistics.median(seconds), 3),
    }


def compare_pixels(files: list[bytes], args: argparse.Namespace, draws: int = 4) -> dict[str, Any]:
    """Mean and maximum difference in levels between two implementations with the same parameters."""
    result = {}
    for name, settings in OPERATIONS.items():
        made: dict[str, list[Tensor]] = {"pil": [], "tensor": [], "device": []}
        for seed, data in itertools.product(range(draws), files):
            tensor, pil = (
                DataAugmentationDINO(
                    GLOBAL_SCALE, LOCAL_SCALE, LOCALS, args.global_size, args.local_size, **settings, **LEVELS,
                    implementation=implementation,
                )
                for implementation in ("tensor", "pil")
            )  # fmt: skip
            torch.manual_seed(seed)
            pixels, views = pil.draw(open_image(data))  # which decodes at full scale
            packed = pack_raw_batch(
                [RawImage(pixels, views)], NO_CROPS, DeviceAugmentation(tensor).crop_format(torch.float32)
            )
            on_device = make_crops(packed)
            for key, crops in (("pil", pil.apply(pixels, views)), ("tensor", tensor.apply(pixels, views))):
                made[key].append(torch.cat([crop.flatten() for crop in (*crops.global_crops, *crops.local_crops)]))
            made["device"].append(torch.cat([on_device.global_crops.flatten(), on_device.local_crops.flatten()]))
        result[name] = {
            f"{a} - {b}": {"mean": round(off.mean().item(), 3), "greatest": round(off.max().item(), 1)}
            for a, b in (("tensor", "pil"), ("device", "tensor"))
            for off in [(torch.cat(made[a]) - torch.cat(made[b])).abs()]
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="crops from JPEG files against plain torchvision on PIL images")
    parser.add_argument(
        "--images",
        type=Path,
        help="folder of images (default: those of scikit-learn)",
    )
    parser.add_argument("--size", type=int, nargs=2, default=(500, 375), help="width and height of the files")
    parser.add_argument(
        "--large-size", type=int, nargs=2, default=(4000, 3000), help="of the large files; 0 0 for none"
    )
    parser.add_argument("--global-size", type=int, default=224)
    parser.add_argument("--local-size", type=int, default=98)
    parser.add_argument("--repeats", type=int, default=15, help="of each side, after one to warm up")
    parser.add_argument("--workers", type=int, nargs="*", default=(0, 1, 2), help="numbers to try with the loader")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--batches", type=int, default=2, help="timed through the loader, four times as many of ours")
    parser.add_argument("--loader-repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    files = make_files(args.images, tuple(args.size))
    sides = make_sides(args.global_size, args.local_size)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record: dict[str, Any] = {
        "meaning": MEANINGS,
        "size": args.size,
        "bytes_per_file": round(statistics.mean(map(len, files))),
        "crops": f"2 x {args.global_size} + {LOCALS} x {args.local_size}",
        "sides": time_sides(sides, files, args.repeats),
    }
    if all(args.large_size):
        large = make_files(args.images, tuple(args.large_size))
        record["large"] = {"size": args.large_size, **time_sides(sides, large, max(2, args.repeats // 3))}
    record["loader"] = {f"{workers} workers": time_loader(files, args, workers) for workers in args.workers}
    record["cutting"] = time_device_augmentation(files, args, device)
    record["differences"] = compare_pixels(files, args)
    record |= {
        "processor": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, one thread a process",
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "torchvision", "pillow", "numpy")},
    }
    sys.stdout.write(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
