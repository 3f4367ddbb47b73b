"""Training and scoring of dense heads: for one process, or as a script for several."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from dense_trees import depth_set, segmentation_set
from eval_images import tiny_backbone
from torch import nn

from dinov2 import distributed
from dinov2.data.dense.transforms import DepthCrops, EvaluationInputs, SegmentationCrops
from dinov2.eval.dense import data, depth, heads, segmentation
from dinov2.eval.dense.protocols import DEPTH, SEGMENTATION, DepthData
from dinov2.eval.dense.training import HeadRun, train_head
from dinov2.models.dense.depther import Depther
from dinov2.models.dense.linear_depth_head import LinearDepthHead
from dinov2.models.dense.segmentation_head import SegmentationHead
from dinov2.models.dense.segmenter import Segmenter

ITERATIONS = 6
PROTOCOL = SEGMENTATION["dinov3"].scaled(24)
RULES = DepthData(1e-3, 10.0, "none", (24, 24), "none")


def run_of(folder: Path, **changed: Any) -> HeadRun:
    settings = {"resume": True, "eval_period": 2, "save_period": 2, "identity": {"a": 1}, "validated_on": "val"}
    return HeadRun(output_dir=folder, **(settings | changed))


def train_segmenter(root: Path, folder: Path, batches: Any = None, **changed: Any) -> tuple[Segmenter, list]:
    """A segmenter trained for six iterations of four crops, with dropout, and its history."""
    torch.manual_seed(0)
    backbone = tiny_backbone()
    segmenter = Segmenter(backbone, SegmentationHead(24, 3, dropout=0.3), blocks=(3,), norm=True)
    train, val = (data.open_dense(segmentation_set(root, split), "segmentation") for split in ("train", "val"))
    loader = partial(
        data.make_train_loader,
        dataset=train,
        crops=SegmentationCrops(short_side=24, crop_size=24),
        batch_size=4 // distributed.world_size(),
        num_workers=0,
    )
    score = partial(segmentation.evaluate, segmenter, val, PROTOCOL, EvaluationInputs(short_side=PROTOCOL.short_side))
    history = train_head(
        segmenter.decode_head,
        partial(heads.frozen_features, segmenter, torch.float32),
        segmentation.pixel_loss,
        batches or loader,
        lambda: {"mIoU": score()[0].mIoU},
        PROTOCOL.training.for_iterations(ITERATIONS),
        run_of(folder, best_by="mIoU", **changed),
    )
    history.append({"scores": list(score()[0][:5])})
    return segmenter, history


def train_depther(root: Path, folder: Path) -> tuple[Depther, list]:
    """A depther with batch norm trained for six iterations of four crops, and its scores."""
    torch.manual_seed(0)
    backbone = tiny_backbone()
    head = LinearDepthHead(24, max_depth=10.0, use_class_token=False, upsample=1, batch_norm=True)
    depther = Depther(backbone, head, blocks=(3,), norm=True)
    train, val = (data.open_dense(depth_set(root, split), "depth") for split in ("train", "val"))
    loader = partial(
        data.make_train_loader,
        dataset=train,
        crops=DepthCrops(box=None, crop_size=(24, 24)),
        batch_size=4 // distributed.world_size(),
        num_workers=0,
    )
    history = train_head(
        depther.decode_head,
        partial(heads.frozen_features, depther, torch.float32),
        depth.depth_loss,
        loader,
        dict,
        DEPTH["dinov3"].training.for_iterations(ITERATIONS),
        run_of(folder, eval_period=100),
    )
    scores = depth.evaluate(depther, val, DEPTH["dinov3"], RULES, EvaluationInputs())
    history.append({"scores": [*scores.metrics, scores.scored]})
    return depther, history


def weights_of(head: nn.Module) -> dict[str, list[float]]:
    return {name: value.double().flatten().tolist() for name, value in head.state_dict().items()}


def dense_shared_work(root: Path, folder: Path) -> dict[str, Any]:
    """Weights and scores of both trainings."""
    results = {}
    for name, train in (("segmentation", train_segmenter), ("depth", train_depther)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        model, history = train(root, folder / name)
        results[name] = {"weights": weights_of(model.decode_head), "history": history}
    return results


if __name__ == "__main__":
    with distributed.session():
        found = dense_shared_work(Path(sys.argv[1]), Path(sys.argv[2]))
        if distributed.is_main():
            Path(sys.argv[2], "results.json").write_text(json.dumps(found))
