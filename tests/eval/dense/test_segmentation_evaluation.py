"""The segmentation command: what it trains, tests, refuses and writes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from dense_trees import CLASSES, dense_command, segmentation_set, write_scenes
from eval_images import tiny_backbone
from PIL import Image
from torch.nn import functional

from dinov2.config import ConfigError
from dinov2.data.dense.transforms import EvaluationInputs
from dinov2.eval.dense import data, depth, segmentation
from dinov2.eval.dense.protocols import SEGMENTATION
from dinov2.flags.dense import depth_parser, segmentation_parser
from dinov2.models.dense.head_files import save_head
from dinov2.models.dense.segmentation_head import SegmentationHead
from dinov2.models.dense.segmenter import Segmenter


def run(folder: Path, **options: object) -> dict:
    args = segmentation_parser().parse_args(dense_command(folder, "segmentation", **options))
    segmentation.main(args)
    return json.loads((Path(args.output_dir) / segmentation.RESULTS_FILE).read_text())


SHORT = {"crop_size": 32, "iterations": 25, "batch_size": 4, "learning_rate": 0.02}


def test_a_trained_head_finds_the_boxes_and_can_be_given_again(tmp_path: Path) -> None:
    results = run(tmp_path, **SHORT)
    metrics = results["metrics"]
    assert metrics["mIoU"] > 50 and metrics["classes"] == list(CLASSES)
    assert metrics["mIoU"] == pytest.approx(np.mean(metrics["iou_per_class"]))
    assert results["protocol"] == "dinov2 with crop_size=32, iterations=25, learning_rate=0.02, batch_size=4"
    assert results["resolution"] == "short side 32, windows of 32 pixels"
    assert results["protocol_settings"]["stride"] == 21 and results["unit"] == "percent"
    assert [record["iteration"] for record in results["history"]] == [6, 12, 18, 24]

    given = run(tmp_path, head=tmp_path / "out" / "head.pth", output_dir=tmp_path / "given", crop_size=32)
    assert given["metrics"] == metrics
    assert given["head"] == str(tmp_path / "out" / "head.pth")

    with Image.open(tmp_path / "out" / "predictions.png") as image:
        page = np.array(image)
    assert {(230, 230, 230), (214, 39, 40), (128, 128, 128)} <= set(map(tuple, page.reshape(-1, 3)))


BANDS = ["images.bands=[2,1,0,0]", "augmentation.mean=[0.3,0.3,0.3,0.3]", "augmentation.std=[0.3,0.3,0.3,0.3]"]


def test_images_of_four_bands(tmp_path: Path) -> None:
    results = run(tmp_path, opts=BANDS, **SHORT)
    assert results["metrics"]["mIoU"] > 50
    assert (tmp_path / "out" / "predictions.png").stat().st_size > 1000
    args = depth_parser().parse_args(dense_command(tmp_path, "depth", opts=BANDS))
    with pytest.raises(ConfigError, match=r"images.bands = \[2, 1, 0, 0\]: depth estimation takes images of three"):
        depth.main(args)


def naive_prediction(segmenter: Segmenter, image: np.ndarray, protocol: object, size: tuple[int, int]) -> np.ndarray:
    """The protocol in loops, in float64."""
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    total = 0
    for scale in protocol.test_scales:
        short = int(protocol.short_side * scale)
        height, width = (int(side * short / min(image.shape[:2]) + 0.5) for side in image.shape[:2])
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float()
        resized = functional.interpolate(pixels, (height, width), mode="bilinear").round().double()
        levels = (resized / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        for flipped in (False, True) if protocol.test_mirror else (False,):
            x = levels.flip(3) if flipped else levels
            logits, visits = torch.zeros(1, 3, height, width).double(), torch.zeros(height, width).double()
            side, stride = protocol.crop_size, protocol.stride
            for row in range(max(-(-(height - side) // stride), 0) + 1):
                for column in range(max(-(-(width - side) // stride), 0) + 1):
                    bottom, right = min(row * stride + side, height), min(column * stride + side, width)
                    top, left = max(bottom - side, 0), max(right - side, 0)
                    logits[:, :, top:bottom, left:right] += segmenter(x[:, :, top:bottom, left:right])
                    visits[top:bottom, left:right] += 1
            probabilities = functional.interpolate(logits / visits, size, mode="bilinear").softmax(1)
            total = total + (probabilities.flip(3) if flipped else probabilities)
    return total[0].argmax(0).numpy()


@pytest.mark.parametrize("name", ["dinov2", "dinov2_ms"])
def test_the_score_is_that_of_naive_windows_and_counts(tmp_path: Path, name: str) -> None:
    write_scenes(tmp_path, "val", 3, seed=5)
    dataset = data.open_dense(segmentation_set(tmp_path, "val"), "segmentation")
    protocol = SEGMENTATION[name].scaled(24)
    torch.manual_seed(3)
    head = SegmentationHead(24, 3)
    torch.nn.init.normal_(head.conv_seg.weight)
    segmenter = Segmenter(tiny_backbone(), head, blocks=(3,), norm=True).eval()
    prepare = EvaluationInputs(short_side=protocol.short_side, scales=protocol.test_scales)
    scores, rows = segmentation.evaluate(segmenter, dataset, protocol, prepare, shown_images=2)
    assert [title for title, _ in rows] == ["val/000.png", "val/001.png"]

    segmenter.double()
    intersection, union = np.zeros(3), np.zeros(3)
    for index in range(3):
        image, truth = dataset.get_sample(index)
        predicted = naive_prediction(segmenter, np.array(image), protocol, truth.shape)
        for label in range(3):
            hits, truths = predicted == label, truth == label
            intersection[label] += (hits & truths).sum()
            union[label] += ((hits | truths) & (truth != -1)).sum()
    np.testing.assert_allclose(scores.iou_per_class.numpy(), intersection / union, atol=2e-3)
    assert len(set(scores.iou_per_class.tolist())) == 3


def test_a_released_head_is_given_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    folder = tmp_path / "mirror" / "dinov2_vits14"
    folder.mkdir(parents=True)
    head = SegmentationHead(384, 3)
    state = {f"decode_head.{name}": value for name, value in head.state_dict().items()}
    torch.save({"state_dict": state}, folder / "dinov2_vits14_ade20k_linear_head.pth")
    monkeypatch.setenv("DINOV2_WEIGHTS_URL", str(tmp_path / "mirror"))
    options = {"config_file": "eval/vits14_pretrain", "head": "ade20k_linear", "crop_size": 28, "shown_images": 0}
    results = run(tmp_path, **options)
    assert results["head"].endswith("dinov2_vits14_ade20k_linear_head.pth")
    assert not (tmp_path / "out" / "predictions.png").exists()
    with pytest.raises(ValueError, match="unknown head 'ade20k_lin'; known: ade20k_linear, ade20k_ms"):
        run(tmp_path, **options | {"head": "ade20k_lin"})
    with pytest.raises(ValueError, match="released backbones, with patches of 14 pixels"):
        run(tmp_path, head="ade20k_linear")


def test_contradicting_flags_and_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give either --train-dataset, to train a head, or --head, to test one"):
        run(tmp_path, head="head.pth", train_dataset="SegmentationFolder:root=/x")
    images = f"ImageFolder:root={tmp_path / 'data' / 'images'}"
    with pytest.raises(ValueError, match="--val-dataset .* has no maps; segmentation maps are needed"):
        run(tmp_path, **SHORT, val_dataset=images)
    with pytest.raises(ValueError, match="--val-dataset .* has depth maps"):
        run(tmp_path, **SHORT, val_dataset=f"DepthFolder:root={tmp_path / 'data'}:split=val")
    results = tmp_path / "out" / segmentation.RESULTS_FILE
    assert not results.exists(), "a failed evaluation leaves no results"


def test_other_classes_are_refused(tmp_path: Path) -> None:
    run(tmp_path, **SHORT | {"iterations": 2})
    names = tmp_path / "names.txt"
    names.write_text("a\nb\nc\n")
    other = f"SegmentationFolder:root={tmp_path / 'data'}:split=val:classes={names}"
    with pytest.raises(ValueError, match="other classes than the training images"):
        run(tmp_path, **SHORT, val_dataset=other)
    names.write_text("a\nb\nc\nd\n")
    with pytest.raises(ValueError, match="predicts 3 classes, the validation set has 4"):
        run(tmp_path, head=tmp_path / "out" / "head.pth", val_dataset=other)


def test_a_wrong_map_is_an_error_before_training(tmp_path: Path) -> None:
    run(tmp_path, **SHORT | {"iterations": 2})
    path = tmp_path / "data" / "masks" / "train" / "003.png"
    with Image.open(path) as image:
        mask = np.array(image)
    mask[5, 5] = 77
    Image.fromarray(mask).save(path)
    with pytest.raises(ValueError, match=r"003\.png.*77"):
        run(tmp_path, **SHORT, no_resume=True)


def test_a_head_whose_outputs_overflow_is_named(tmp_path: Path) -> None:
    head = SegmentationHead(24, 3)
    torch.nn.init.constant_(head.conv_seg.weight, 3e38)
    save_head(tmp_path / "head.pth", head, blocks=(3,), norm=True)
    with pytest.raises(ValueError, match="the outputs of the head are NaN or infinite: its training diverged"):
        run(tmp_path, head=tmp_path / "head.pth", crop_size=32)


def test_probes_need_no_training_and_share_their_features(tmp_path: Path) -> None:
    results = run(tmp_path, protocol="capi", crop_size=32)
    knn, logistic = results["metrics"]["knn"], results["metrics"]["logistic"]
    assert knn["mIoU"] > 40 and logistic["mIoU"] > 40
    assert knn["k"] in (1, 3, 10, 30) and {record["C"] for record in logistic["held out"]} >= {1e-6, 1e5}
    assert results["protocol"] == "capi with side=32" and set(results["feature_files"].values()) == {"written"}
    again = run(tmp_path, protocol="capi", crop_size=32)
    assert again["metrics"] == results["metrics"] and set(again["feature_files"].values()) == {"read"}
    fewer = run(tmp_path, protocol="capi", crop_size=32, max_train_images=5)
    assert fewer["head"] == "fitted here, to 5 images"
    with pytest.raises(ValueError, match="--crop-size 30 is not a multiple"):
        run(tmp_path, protocol="capi", crop_size=30)
    with pytest.raises(ValueError, match="--head has no meaning with --protocol capi"):
        run(tmp_path, protocol="capi", head="x.pth")


def test_a_given_head_is_held_against_backbone_protocol_and_classes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path, **SHORT | {"iterations": 2}, protocol="dinov2_ms")
    head = {"head": tmp_path / "out" / "head.pth", "crop_size": 32, "output_dir": tmp_path / "given"}
    with pytest.raises(ValueError, match=r"reads 4 blocks, the protocol dinov2 1: give --protocol dinov2_ms"):
        run(tmp_path, **head)
    given = run(tmp_path, **head, protocol="dinov2_ms")
    assert "other weights" not in caplog.text
    trained = given["given_head"]["trained"]
    assert trained["protocol"].startswith("dinov2_ms with crop_size=32, iterations=2")
    assert trained["dataset"].startswith("SegmentationFolder:") and len(given["given_head"]["sha256"]) == 64
    run(tmp_path, **head, protocol="dinov2_ms", opts="train.seed=1")
    assert "was trained on a backbone with other weights" in caplog.text
    names = tmp_path / "names.txt"
    names.write_text("blue\nred\nground\n")
    other = f"SegmentationFolder:root={tmp_path / 'data'}:split=val:classes={names}"
    with pytest.raises(ValueError, match="other classes than the training images.*their order differs"):
        run(tmp_path, **head, protocol="dinov2_ms", val_dataset=other)


def test_all_changes_stand_beside_the_score_and_copies_are_counted(tmp_path: Path) -> None:
    train = segmentation_set(tmp_path / "data", "train")
    results = run(tmp_path, **SHORT | {"iterations": 2}, precision="bf16", val_dataset=train)
    assert results["protocol"].endswith("batch_size=4, precision=bf16")
    assert results["protocol_settings"]["seed"] == 0
    run(tmp_path, **SHORT | {"iterations": 2}, no_resume=True)
    for index in range(2):
        for folder in ("images", "masks"):
            source = tmp_path / "data" / folder / "train" / f"00{index}.png"
            (tmp_path / "data" / folder / "val" / f"00{index}.png").write_bytes(source.read_bytes())
    copied = run(tmp_path, **SHORT | {"iterations": 2}, no_resume=True)
    (counts,) = (found for name, found in copied["equal_images"].items() if "split=val" in name)
    assert counts == {"compared": 7, "equal": 2}
    with pytest.raises(ValueError, match="--max-train-images has no meaning with --protocol dinov2, only with capi"):
        run(tmp_path, **SHORT, max_train_images=3)


def test_a_checkpoint_of_another_protocol_names_what_differs(tmp_path: Path) -> None:
    run(tmp_path, **SHORT | {"iterations": 2})
    with pytest.raises(ValueError, match="belongs to another run") as error:
        run(tmp_path, **SHORT | {"iterations": 2}, protocol="dinov3")
    text = str(error.value)
    assert "weight_decay: 0.0001 then, 0.001 now" in text and "dropout: 0.0 then, 0.1 now" in text
    assert "crop_size" not in text and len(text) < 700, text


def test_suspicious_maps_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(tmp_path, **SHORT | {"iterations": 2})
    assert "no pixel" not in caplog.text
    for split in ("train", "val"):
        for path in (tmp_path / "data" / "masks" / split).glob("*.png"):
            with Image.open(path) as image:
                mask = np.array(image)
            Image.fromarray(np.where(mask == 0, 255, mask).astype(np.uint8)).save(path)
    run(tmp_path, **SHORT | {"iterations": 2}, no_resume=True)
    assert "1 of 3 classes have no pixel in 7 maps: ground" in caplog.text


def test_a_figure_that_cannot_be_written_loses_no_score(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "out" / "predictions.png").mkdir(parents=True)
    assert run(tmp_path, **SHORT | {"iterations": 2})["metrics"]["mIoU"] > 0
    assert "no figure of the predictions" in caplog.text
