"""Set l_miou: pixel counts per class and the scores formed from them."""

import torch

from dinov2.eval.dense.segmentation_metrics import Areas, count_areas, segmentation_scores
from scripts.golden.comparison import Comparison
from scripts.golden.recording import Recording

IGNORED = 255  # in the recordings
SCORE_TOLERANCE = 1e-6
MEANS = {"mIoU": "mIoU", "acc": "mAcc", "aAcc": "aAcc", "dice": "dice", "fscore": "fscore", "precision": "precision"}
MEANS |= {"recall": "recall"}
PER_CLASS = {"iou": "iou", "acc": "acc", "recall": "acc", "dice": "dice", "precision": "precision", "fscore": "fscore"}


def replay_segmentation_scores(recording: Recording, comparison: Comparison) -> None:
    num_classes = recording.json["config"]["classes"]
    for run in sorted({match[1] for match in recording.matches(r"(\w+)\.i\d+\.pred")}):
        total = Areas.zeros(num_classes)
        per_image = []
        for number in range(len(recording.json["config"]["images"])):
            truth = f"{run}.i{number}.gt_reduced" if run == "reduce" else f"i{number}.gt"
            labels = recording.input(truth)
            if run == "reduce":
                labels = labels_without_zero(recording.input(f"i{number}.gt"))
                comparison.exact(truth, labels, recording.tensors[truth])
            predictions = recording.input(f"{run}.i{number}.pred")
            areas = count_areas(predictions, labels, num_classes, ignored=IGNORED)
            per_image.append(torch.stack([areas.intersection, areas.union, areas.predicted, areas.labeled]))
            total = total + areas
        comparison.exact(f"{run}.areas", torch.stack(per_image).float(), recording.tensors[f"{run}.areas"])
        _compare_scores(recording, comparison, run, total)


def labels_without_zero(labels: torch.Tensor) -> torch.Tensor:
    """Label 0 is ignored, and the others are lowered by one."""
    reduced = torch.where(labels == 0, IGNORED, labels - 1)
    return torch.where(labels == IGNORED, IGNORED, reduced)


def _compare_scores(recording: Recording, comparison: Comparison, run: str, total: Areas) -> None:
    scores = segmentation_scores(total)
    for name, ours in PER_CLASS.items():
        theirs, found = recording.tensors[f"{run}.{name}"], getattr(scores, f"{ours}_per_class")
        comparison.exact(f"{run}.{name} nan", found.isnan(), theirs.isnan())
        recording.inputs.add(f"{run}.{name}")
        comparison.close(f"{run}.{name}", found.nan_to_num(), theirs.nan_to_num(), tolerance=SCORE_TOLERANCE)
    for suffix in ("", "_fp64"):
        for name, value in recording.json["results"][f"{run}{suffix}"].items():
            comparison.close(f"{run}{suffix}.{name}", getattr(scores, MEANS[name]), value, tolerance=SCORE_TOLERANCE)
