"""Heads are trained as a plain loop would, resume exactly, and do not depend on the number of processes."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from dense_shared_work import ITERATIONS, PROTOCOL, dense_shared_work, train_segmenter
from dense_trees import segmentation_set, write_scenes
from eval_images import tiny_backbone
from eval_processes import run_in_processes
from torch import nn
from torch.nn import functional

from dinov2.data.dense.transforms import SegmentationCrops
from dinov2.eval.dense import data, heads, segmentation
from dinov2.eval.dense.process_wide import FrozenInputBatchNorm, make_process_wide
from dinov2.eval.dense.protocols import Training
from dinov2.eval.dense.training import HeadRun, train_head
from dinov2.models.dense.segmentation_head import SegmentationHead
from dinov2.models.dense.segmenter import Segmenter


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, "train", 10, seed=1)
    write_scenes(folder, "val", 5, seed=2)
    return folder


def test_training_is_that_of_a_plain_loop(root: Path, tmp_path: Path) -> None:
    segmenter = Segmenter(tiny_backbone(), SegmentationHead(24, 3), blocks=(3,), norm=True)
    head = segmenter.decode_head
    plain = SegmentationHead(24, 3)
    plain.load_state_dict(head.state_dict())
    loader = partial(
        data.make_train_loader,
        dataset=data.open_dense(segmentation_set(root, "train"), "segmentation"),
        crops=SegmentationCrops(short_side=24, crop_size=24),
        batch_size=3,
        num_workers=0,
    )
    training = Training(
        iterations=5, learning_rate=0.01, weight_decay=0.1, betas=(0.9, 0.99), warmup=2, warmup_ratio=0.5,
        decay="linear", clip_norm=0.05, first_beta_range=(0.8, 0.9),
    )  # fmt: skip
    run = HeadRun(tmp_path, resume=True, eval_period=100, save_period=100, identity={}, validated_on="")
    features = partial(heads.frozen_features, segmenter, torch.float32)
    train_head(head, features, segmentation.pixel_loss, loader, dict, training, run)

    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
    rates = [0.5, 0.75 * 4 / 5, 3 / 5, 2 / 5, 1 / 5]
    for step, (images, labels) in zip(range(5), loader(0), strict=False):
        optimizer.param_groups[0].update(lr=0.01 * rates[step], betas=(training.first_beta(step), 0.99))
        logits = functional.interpolate(plain(features(images)), (24, 24), mode="bilinear")
        loss = functional.cross_entropy(logits, labels, ignore_index=-1, reduction="sum") / labels.numel()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.05)
        optimizer.step()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(head.state_dict()[name], value, msg=name)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("after", [3, 5])
def test_an_interrupted_training_ends_as_one_that_was_not(root: Path, tmp_path: Path, after: int) -> None:
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    whole, history = train_segmenter(root, tmp_path / "whole")

    def stopping(start: int, **loading: object):
        loader = data.make_train_loader(
            start,
            dataset=data.open_dense(segmentation_set(root, "train"), "segmentation"),
            crops=SegmentationCrops(short_side=24, crop_size=24),
            batch_size=4,
            num_workers=0,
        )
        for number, batch in enumerate(loader, start):
            if number == after:
                raise Interrupted
            yield batch

    with pytest.raises(Interrupted):
        train_segmenter(root, tmp_path / "cut", batches=stopping)
    cut, continued = train_segmenter(root, tmp_path / "cut")
    assert continued == history
    assert [record["iteration"] for record in history[:-1]] == [2, 4, ITERATIONS]
    for name, value in whole.decode_head.state_dict().items():
        assert torch.equal(cut.decode_head.state_dict()[name], value), name


def test_the_best_head_is_the_one_that_is_left(root: Path, tmp_path: Path) -> None:
    segmenter, history = train_segmenter(root, tmp_path)
    *validations, last = history
    assert last["scores"][0] == max(record["mIoU"] for record in validations)
    assert segmenter.decode_head.bn.num_batches_tracked in (2, 4, ITERATIONS)


def test_a_checkpoint_of_other_settings_is_refused(root: Path, tmp_path: Path) -> None:
    train_segmenter(root, tmp_path)
    with pytest.raises(ValueError, match=r"belongs to another run \(a: 1 then, 2 now\).*--no-resume"):
        train_segmenter(root, tmp_path, identity={"a": 2})
    train_segmenter(root, tmp_path, identity={"a": 2}, resume=False)


def test_two_processes_train_and_score_as_one(root: Path, tmp_path: Path) -> None:
    alone = json.loads(json.dumps(dense_shared_work(root, tmp_path / "one")))
    (tmp_path / "two").mkdir()
    run_in_processes("tests/support/dense_shared_work.py", [root, tmp_path / "two"], options=("-W", "error"))
    together = json.loads((tmp_path / "two" / "results.json").read_text())
    for name, found in together.items():
        for parameter, values in found["weights"].items():
            torch.testing.assert_close(
                torch.tensor(values), torch.tensor(alone[name]["weights"][parameter]), rtol=1e-4, atol=1e-6
            )
        for mine, other in zip(found["history"], alone[name]["history"], strict=True):
            for key, value in other.items():
                assert mine[key] == pytest.approx(value, rel=2e-3), key


def test_one_process_normalizes_as_torch_does() -> None:
    torch.manual_seed(0)
    ours, plain = nn.Sequential(nn.BatchNorm2d(4)), nn.BatchNorm2d(4)
    make_process_wide(ours)
    assert type(ours[0]) is FrozenInputBatchNorm
    for _ in range(3):
        values = torch.randn(2, 4, 3, 5) * 3 + 1
        assert torch.equal(ours(values), plain(values))
    assert torch.equal(ours[0].running_var, plain.running_var)


def test_images_that_processes_cannot_share_evenly_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert data.images_per_process(PROTOCOL.training.batch_size) == 16
    monkeypatch.setattr("dinov2.distributed.world_size", lambda: 3)
    with pytest.raises(ValueError, match="16 images per iteration cannot be shared by 3 processes.*--batch-size"):
        data.images_per_process(16)
