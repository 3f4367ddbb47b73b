"""The depth command: what it trains, tests, refuses and writes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from dense_trees import dense_command, depth_set, write_scenes
from eval_images import tiny_backbone
from PIL import Image
from torch.nn import functional

from dinov2.data.dense.transforms import EvaluationInputs
from dinov2.eval.dense import data, depth
from dinov2.eval.dense.depth_losses import gradient_log_loss
from dinov2.eval.dense.protocols import DEPTH, DepthData
from dinov2.flags.dense import depth_parser
from dinov2.models.dense.depther import Depther
from dinov2.models.dense.dpt import DPTDepthHead
from dinov2.models.dense.head_files import save_head
from dinov2.models.dense.linear_depth_head import LinearDepthHead
from dinov2.models.dense.segmentation_head import SegmentationHead

SHORT = {"iterations": 60, "batch_size": 4, "learning_rate": 0.02, "max_depth": 10, "train_crop": (24, 24)}


def run(folder: Path, **options: object) -> dict:
    args = depth_parser().parse_args(dense_command(folder, "depth", **options))
    depth.main(args)
    return json.loads((Path(args.output_dir) / depth.RESULTS_FILE).read_text())


@pytest.mark.parametrize("protocol", ["dinov2", "dinov3"])
def test_a_trained_head_tells_near_from_far_and_can_be_given_again(tmp_path: Path, protocol: str) -> None:
    results = run(tmp_path, **SHORT, protocol=protocol)
    metrics = results["metrics"]
    assert metrics["a1"] > 0.55 and metrics["rmse"] < 2.5, metrics  # a constant 8 m has 4.0
    assert results["resolution"] == "images in their size, all pixels, 0.001 to 10 m"
    assert results["protocol"].startswith(f"{protocol} with iterations=60, learning_rate=0.02")
    best = min(record["abs_rel"] for record in results["history"])
    assert metrics["abs_rel"] == pytest.approx(best), "the best head of all validations is left"
    head = tmp_path / "out" / "head.pth"
    given = run(tmp_path, head=head, output_dir=tmp_path / "given", max_depth=10, protocol=protocol)
    assert results["scored_pixels"] == 1.0
    assert given["metrics"] == metrics
    with Image.open(tmp_path / "out" / "predictions.png") as page:
        assert page.size[0] > 480


def test_the_score_is_that_of_naive_loops(tmp_path: Path) -> None:
    write_scenes(tmp_path, "val", 3, seed=5)
    dataset = data.open_dense(depth_set(tmp_path, "val"), "depth")
    rules = DepthData(1e-3, 7.0, "none", (24, 24), "none")  # the ground, at 8 m, is not scored
    torch.manual_seed(0)
    head = LinearDepthHead(2 * 24, max_depth=7.0)
    torch.nn.init.normal_(head.conv_depth.weight)
    depther = Depther(tiny_backbone(), head, blocks=(3,), norm=False)
    scores = depth.evaluate(depther, dataset, DEPTH["dinov2"], rules, EvaluationInputs())
    metrics = scores.metrics
    per_image = []
    for index in range(3):
        image, truth = dataset.get_sample(index)
        levels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        x = (levels - mean) / std
        with torch.no_grad():
            predicted = ((depther(x) + depther(x.flip(3)).flip(3)) / 2)[0, 0].double().numpy().clip(1e-3, 7.0)
        errors = [
            (predicted[row, column] - truth[row, column]) ** 2
            for row in range(truth.shape[0])
            for column in range(truth.shape[1])
            if 1e-3 < truth[row, column] < 7.0
        ]
        per_image.append(np.sqrt(np.mean(errors)))
    assert metrics.rmse == pytest.approx(np.mean(per_image), rel=1e-5)
    assert min(per_image) < max(per_image)


def test_pairs_of_images_have_a_loss_each() -> None:
    """As in the published trainings, whatever the number of images of a process."""
    torch.manual_seed(0)
    layers = [(torch.randn(4, 6, 3, 3), torch.randn(4, 6))]
    head, depths = LinearDepthHead(12), torch.rand(4, 1, 12, 12) * 5
    whole = depth.depth_loss(head, layers, depths, 500)
    pairs = [
        depth.depth_loss(head, [(layers[0][0][part], layers[0][1][part])], depths[part], 500)
        for part in (slice(0, 2), slice(2, 4))
    ]
    assert whole.item() == pytest.approx((sum(pairs) / 2).item())
    both = depth.depth_loss(head, layers, depths, 500, gradient_loss=0.5)
    predicted = functional.interpolate(head(layers), (12, 12), mode="bilinear")
    extra = [gradient_log_loss(predicted[i : i + 2], depths[i : i + 2], depths[i : i + 2] > 0) for i in (0, 2)]
    assert both.item() == pytest.approx((whole + 0.25 * sum(extra)).item()) and both > whole
    g = head(layers)[:2].add(1e-3).log() - depths[:2].add(1e-3).log()
    assert pairs[0].item() == pytest.approx((g.var() + 0.15 * g.mean() ** 2).sqrt().item(), rel=1e-5)


def test_a_range_is_needed_and_few_blocks_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--max-depth is missing: DepthFolder has no published range; known: NYUv2"):
        run(tmp_path, **{key: value for key, value in SHORT.items() if key != "max_depth"})
    with pytest.raises(ValueError, match="a head on 4 blocks, but the backbone has 2: --layers 1"):
        run(tmp_path, **SHORT, opts="student.depth=2")


def test_released_linear_heads_are_decoded_as_in_the_hub_and_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    folder = tmp_path / "mirror" / "dinov2_vits14"
    folder.mkdir(parents=True)
    head = LinearDepthHead(2 * 384)
    state = {f"decode_head.{name}": value for name, value in head.state_dict().items()}
    torch.save({"state_dict": state}, folder / "dinov2_vits14_nyu_linear_head.pth")
    monkeypatch.setenv("DINOV2_WEIGHTS_URL", str(tmp_path / "mirror"))
    options = {"config_file": "eval/vits14_pretrain", "head": "nyu_linear", "max_depth": 80, "shown_images": 0}
    far = run(tmp_path, **options)
    assert "--bins 0.001 10 decodes the range of NYU" in caplog.text
    near = run(tmp_path, **options, bins=(0.001, 10))
    # Logits near 0 give about the middle of the range, 40 and 5 m, of scenes from 2 to 8 m.
    assert far["metrics"]["rmse"] == pytest.approx(33.5, abs=1.5)
    assert near["metrics"]["rmse"] == pytest.approx(2.7, abs=0.7)


def test_dpt_heads_are_tested_in_their_own_range(tmp_path: Path) -> None:
    torch.manual_seed(0)
    head = DPTDepthHead(24, channels=8, max_depth=3.0)
    save_head(tmp_path / "head.pth", head, blocks=(0, 1, 2, 3), norm=False)
    near = run(tmp_path, head=tmp_path / "head.pth", max_depth=10, shown_images=0)
    with pytest.raises(ValueError, match="not a linear depth or DPT depth head"):
        save_head(tmp_path / "classes.pth", SegmentationHead(24, 3), blocks=(3,), norm=True)
        run(tmp_path, head=tmp_path / "classes.pth", max_depth=10)
    torch.nn.init.constant_(head.conv_depth.head[-1].bias, 50.0)
    save_head(tmp_path / "head.pth", head, blocks=(0, 1, 2, 3), norm=False)
    clamped = run(tmp_path, head=tmp_path / "head.pth", max_depth=10, shown_images=0)
    # Depths are clamped to 3 m: 1 m too much, 1 m and 5 m too little; without the clamp everything would be 10 m.
    assert 3 < clamped["metrics"]["rmse"] < 5 and near["metrics"]["rmse"] != clamped["metrics"]["rmse"]
    wider = run(tmp_path, head=tmp_path / "head.pth", max_depth=10, shown_images=0, bins=(0.001, 10))
    assert wider["metrics"]["abs_rel"] > clamped["metrics"]["abs_rel"]


def test_depths_that_are_not_scored_are_counted_and_a_range_without_any_is_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = SHORT | {"iterations": 2, "shown_images": 0}
    results = run(tmp_path, **options | {"max_depth": 5})
    assert "depths of the validation set are from 2 to 8 m, scored from 0.001 to 5 m" in caplog.text
    assert 0.1 < results["scored_pixels"] < 0.9
    assert "max_depth=5.0" not in results["protocol"], "the dataset has no published range"
    assert results["protocol"].endswith("train_crop=(24, 24)")
    with pytest.raises(ValueError, match=r"from 2 to 8 m, scored from 0.001 to 1.5 m .*scale=.*none is in the range"):
        run(tmp_path, **options | {"max_depth": 1.5})


def test_crops_of_folders_are_as_large_as_a_small_model_saw(tmp_path: Path) -> None:
    options = {key: value for key, value in SHORT.items() if key != "train_crop"}
    results = run(tmp_path, **options | {"iterations": 2}, shown_images=0)
    assert results["protocol_settings"]["train_crop"] == [16, 16]
    with pytest.raises(ValueError, match="is one of the protocol dinov2: give --protocol dinov2"):
        run(tmp_path, head=tmp_path / "out" / "head.pth", max_depth=10, protocol="dinov3")
    with pytest.raises(ValueError, match=r"reads 4 block\(s\), not --layers 1"):
        run(tmp_path, head=tmp_path / "out" / "head.pth", max_depth=10, layers=1)


def test_a_figure_of_depths_that_cannot_be_written_loses_no_score(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "out" / "predictions.png").mkdir(parents=True)
    assert run(tmp_path, **SHORT | {"iterations": 2})["metrics"]["rmse"] > 0
    assert "no figure of the predictions" in caplog.text
