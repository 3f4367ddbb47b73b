"""Every protocol from the command line, on small trees in the layouts of the public datasets."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dense_layouts import save_image, save_map, write
from eval_images import CONFIG
from PIL import Image

from dinov2.eval.dense import depth, segmentation
from dinov2.flags.dense import depth_parser, segmentation_parser

SIDES = (40, 48)  # height and width of the images for segmentation
COARSE = ["student.patch_size=32", "crops.global_crops_size=32", "crops.local_crops_size=32"]  # few tokens
SMALL = {"crop_size": 32, "iterations": 30, "batch_size": 4, "learning_rate": 0.02}


def two_halves(path: Path, seed: int, height: int = SIDES[0], width: int = SIDES[1]) -> np.ndarray:
    """Write an image that is dark at the top and bright below, and return where it is bright."""
    rng = np.random.default_rng(seed)
    edge = int(rng.integers(height // 3, 2 * height // 3))
    bright = np.arange(height)[:, None] * np.ones(width) >= edge
    pixels = np.where(bright[..., None], 200, 20) + rng.integers(0, 30, (height, width, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return bright


def ade20k(root: Path) -> tuple[str, str]:
    for split, short, count in (("training", "train", 8), ("validation", "val", 3)):
        for index in range(1, count + 1):
            name = f"ADE_{short}_{index:08d}"
            bright = two_halves(root / "images" / split / f"{name}.jpg", index)
            values = np.where(bright, 150, 1).astype(np.uint8)
            values[:, :2] = 0  # unlabeled
            save_map(root / "annotations" / split / f"{name}.png", values)
    return f"ADE20K:split=TRAIN:root={root}", f"ADE20K:split=VAL:root={root}"


def voc2012(root: Path) -> tuple[str, str]:
    names = {"train": [f"2007_{index:06d}" for index in range(8)], "val": [f"2008_{index:06d}" for index in range(3)]}
    for split, members in names.items():
        write(root / "ImageSets" / "Segmentation" / f"{split}.txt", *members)
        for index, name in enumerate(members):
            bright = two_halves(root / "JPEGImages" / f"{name}.jpg", index)
            values = np.where(bright, 20, 0).astype(np.uint8)
            values[:, :2] = 255
            save_map(root / "SegmentationClass" / f"{name}.png", values, mode="P")
    return f"VOC2012:split=TRAIN:root={root}", f"VOC2012:split=VAL:root={root}"


def cityscapes(root: Path) -> tuple[str, str]:
    for split, city, count in (("train", "aachen", 8), ("val", "munster", 3)):
        for index in range(count):
            stem = f"{city}_{index:06d}_000019"
            bright = two_halves(root / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png", index)
            values = np.where(bright, 7, 23).astype(np.uint8)  # road, sky
            values[:, :2] = 3  # out of the region of interest
            save_map(root / "gtFine" / split / city / f"{stem}_gtFine_labelIds.png", values)
    return f"Cityscapes:split=TRAIN:root={root}", f"Cityscapes:split=VAL:root={root}"


def run(module: Any, parser: Any, folder: Path, **options: Any) -> dict[str, Any]:
    (folder / "tiny.yaml").write_text(CONFIG)
    words = ["--config-file", str(folder / "tiny.yaml"), "--random-init", "--num-workers", "0"]
    for name, value in ({"output_dir": folder / "out"} | options).items():
        words.append("--" + name.replace("_", "-"))
        words += [str(v) for v in (value if isinstance(value, list | tuple) else [value])]
    args = parser().parse_args(words)
    module.main(args)
    return json.loads((Path(args.output_dir) / module.RESULTS_FILE).read_text())


@pytest.mark.parametrize(
    ("layout", "classes", "present"), [(ade20k, 150, (0, 149)), (voc2012, 21, (0, 20)), (cityscapes, 19, (0, 10))]
)
@pytest.mark.parametrize("protocol", ["dinov2", "dinov2_ms", "dinov3", "capi"])
def test_segmentation(tmp_path: Path, layout: Any, classes: int, present: tuple[int, int], protocol: str) -> None:
    train, val = layout(tmp_path / "data")
    options = {"crop_size": 32} if protocol == "capi" else SMALL
    results = run(
        segmentation, segmentation_parser, tmp_path, train_dataset=train, val_dataset=val, protocol=protocol, **options
    )
    if protocol == "capi":
        assert results["metrics"]["knn"]["acc"] > 85
        return
    per_class = results["metrics"]["iou_per_class"]
    assert len(per_class) == classes
    labeled = [index for index, score in enumerate(per_class) if score]
    assert set(present) <= set(labeled) and min(per_class[index] for index in present) > 60


def test_depth_of_nyu_is_that_inside_its_rectangles(tmp_path: Path) -> None:
    """The dark upper part is 2 m away, the bright lower part 6 m; outside the rectangle everything is wrong."""
    root = tmp_path / "nyu"
    for split, count in (("train", 3), ("test", 2)):
        lines = []
        for index in range(count):
            bright = two_halves(root / "room" / f"rgb_{split}{index}.jpg", index, 480, 640)
            depths = np.where(bright, 6000, 2000).astype(np.uint16)
            if split == "test":
                depths[:45], depths[471:], depths[:, :41], depths[:, 601:] = 9990, 9990, 9990, 9990
            save_map(root / "room" / f"depth_{split}{index}.png", depths)
            lines.append(f"/room/rgb_{split}{index}.jpg /room/depth_{split}{index}.png 518.8579")
        write(root / f"nyu_{split}.txt", *lines)
    results = run(
        depth,
        depth_parser,
        tmp_path,
        train_dataset=f"NYUv2:split=TRAIN:root={root}",
        val_dataset=f"NYUv2:split=TEST:root={root}",
        iterations=20,
        batch_size=2,
        learning_rate=0.05,
        eval_period_iterations=20,
        opts=COARSE,
    )
    assert results["metrics"]["rmse"] < 1.2 and results["metrics"]["a1"] > 0.8
    assert results["resolution"] == "images in their size, mask nyu_eigen, 0.001 to 10 m"
    given = {"val_dataset": f"NYUv2:split=TEST:root={root}", "head": tmp_path / "out" / "head.pth", "opts": COARSE}
    whole = run(depth, depth_parser, tmp_path, **given, mask="none", output_dir=tmp_path / "whole")
    assert whole["metrics"]["rmse"] > results["metrics"]["rmse"] + 1

    sun = tmp_path / "sun"
    bright = two_halves(sun / "kv1" / "image" / "0.jpg", 0, 531, 681)
    save_map(sun / "kv1" / "depth" / "0.png", np.where(bright, 48000, 16000).astype(np.uint16))
    write(sun / "SUNRGBD_val_splits.txt", "kv1/image/0.jpg kv1/depth/0.png")
    given["val_dataset"] = f"SUNRGBD:split=VAL:root={sun}"
    transferred = run(depth, depth_parser, tmp_path, **given, output_dir=tmp_path / "sun_out")
    assert transferred["metrics"]["rmse"] < 1.2
    assert transferred["resolution"] == "images of 480 x 640 pixels, all pixels, 0.001 to 10 m"


def test_depth_of_kitti_is_that_of_the_lower_part(tmp_path: Path) -> None:
    root = tmp_path / "kitti"
    for split, count in (("train", 2), ("test", 1)):
        lines = ["2011_09_26/gone.png None 721.5"]
        for index in range(count):
            image = f"2011_09_26/{split}{index}.png"
            bright = two_halves(root / image, index, 375, 1242)
            depths = np.where(bright, 10 * 256, 40 * 256).astype(np.uint16)
            depths[::2] = 0  # rows without measurements
            save_map(root / f"depth/{split}{index}.png", depths)
            lines.append(f"{image} depth/{split}{index}.png 721.5377")
        write(root / f"kitti_eigen_{split}.txt", *lines)
    results = run(
        depth,
        depth_parser,
        tmp_path,
        train_dataset=f"KITTIDepth:split=TRAIN:root={root}",
        val_dataset=f"KITTIDepth:split=TEST:root={root}",
        protocol="dinov3",
        iterations=20,
        batch_size=2,
        learning_rate=0.05,
        eval_period_iterations=20,
        opts=COARSE,
    )
    assert results["metrics"]["rmse"] < 8
    assert results["resolution"] == "the lower 352 x 1216 pixels, mask kitti_garg, 0.001 to 80 m"
    assert results["sets"][f"KITTIDepth:split=TEST:root={root}"] == {"images": 1}


def test_images_smaller_than_their_crop_are_named(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png", 300, 1242)
    save_map(tmp_path / "d.png", np.full((300, 1242), 2560, np.uint16))
    write(tmp_path / "kitti_eigen_test.txt", "a.png d.png 1")
    write(tmp_path / "kitti_eigen_train.txt", "a.png d.png 1")
    options = {"iterations": 1, "train_dataset": f"KITTIDepth:split=TRAIN:root={tmp_path}"}
    with pytest.raises(Exception, match=r"300 x 1242 pixels .* does not contain the crop"):
        run(depth, depth_parser, tmp_path, val_dataset=f"KITTIDepth:split=TEST:root={tmp_path}", **options)
