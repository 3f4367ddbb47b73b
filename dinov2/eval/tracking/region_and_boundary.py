"""The measures of DAVIS 2017: region similarity J and boundary accuracy F of masks, and their statistics.

Shapes: (H, W) pixels, O objects, T frames. Scores are fractions.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

BOUNDARY_TOLERANCE = 0.008  # of the image diagonal
RECALL_THRESHOLD = 0.5
NUM_BINS = 4  # parts of a video, of which decay compares the first and the last

Mask = np.ndarray
"""(H, W) bool."""


def region_similarity(truth: Mask, result: Mask, void: Mask | None = None) -> float:
    """J: intersection over union of two masks without void pixels; 1 if both are empty."""
    truth, result = _without_void(truth, result, void)
    union = np.count_nonzero(truth | result)
    return np.count_nonzero(truth & result) / union if union else 1.0


def boundary_accuracy(
    truth: Mask, result: Mask, void: Mask | None = None, tolerance: float = BOUNDARY_TOLERANCE
) -> float:
    """F: harmonic mean of precision and recall of the boundary pixels of two masks.

    A boundary pixel is matched if the other boundary has a pixel at most `boundary_radius` away. With both boundaries
    empty, F is 1; with one, 0.

    Args:
        truth, result: Masks of equal shape.
        void: Pixels that belong to neither mask.
        tolerance: See `boundary_radius`.
    """
    truth, result = _without_void(truth, result, void)
    radius = boundary_radius(truth.shape, tolerance)
    truth_boundary, result_boundary = boundary(truth), boundary(result)
    num_truth, num_result = np.count_nonzero(truth_boundary), np.count_nonzero(result_boundary)
    if not num_truth or not num_result:
        return float(num_truth == num_result)
    precision = np.count_nonzero(result_boundary & dilate(truth_boundary, radius)) / num_result
    recall = np.count_nonzero(truth_boundary & dilate(result_boundary, radius)) / num_truth
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _without_void(truth: Mask, result: Mask, void: Mask | None) -> tuple[Mask, Mask]:
    masks = [truth, result] if void is None else [truth, result, void]
    if len({mask.shape for mask in masks}) > 1 or truth.ndim != 2:
        raise ValueError(f"masks must be images of one size, got {', '.join(str(mask.shape) for mask in masks)}")
    truth, result, *others = (mask.astype(bool) for mask in masks)
    return (truth & ~others[0], result & ~others[0]) if others else (truth, result)


def boundary_radius(shape: tuple[int, ...], tolerance: float = BOUNDARY_TOLERANCE) -> int:
    """Pixels that boundaries may be apart: `tolerance` of the image diagonal, rounded up, or pixels from 1 up."""
    return int(tolerance if tolerance >= 1 else math.ceil(tolerance * math.hypot(*shape)))


def boundary(mask: Mask) -> Mask:
    """Pixels that differ from their neighbor to the right, below or diagonally below, (H, W) bool.

    The last row is compared with the right neighbor alone, the last column with the one below, the corner with none.
    """
    edges = np.zeros_like(mask, dtype=bool)
    edges[:, :-1] |= mask[:, :-1] ^ mask[:, 1:]
    edges[:-1] |= mask[:-1] ^ mask[1:]
    edges[:-1, :-1] |= mask[:-1, :-1] ^ mask[1:, 1:]
    return edges


def dilate(mask: Mask, radius: int) -> Mask:
    """All pixels at a distance of at most `radius` of the pixels of a mask, (H, W) bool."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows) or radius < 1:
        return mask.copy()
    height, width = mask.shape
    top, bottom = max(rows[0] - radius, 0), min(rows[-1] + radius + 1, height)
    left, right = max(columns[0] - radius, 0), min(columns[-1] + radius + 1, width)
    inside = mask[top:bottom, left:right]
    # Number of set pixels left of each column: a run of 2 w + 1 pixels has one if the numbers at its ends differ.
    counts = np.pad(np.cumsum(inside, axis=1, dtype=np.int32), ((0, 0), (1, 0)))
    position, last = np.arange(inside.shape[1]), inside.shape[1]
    grown = np.zeros_like(inside)
    for offset in range(radius + 1):
        half = math.isqrt(radius * radius - offset * offset)
        end, start = np.minimum(position + half + 1, last), np.maximum(position - half, 0)
        run = counts[:, end] > counts[:, start]
        if offset < len(run):
            grown[offset:] |= run[: len(run) - offset]
            grown[: len(run) - offset] |= run[offset:]
    result = np.zeros_like(mask)
    result[top:bottom, left:right] = grown
    return result


class Statistics(NamedTuple):
    """Statistics of a measure over the frames of an object, or their means over objects."""

    mean: float
    recall: float  # fraction of frames above 0.5
    decay: float  # mean of the first quarter of the frames minus that of the last


def statistics(values: np.ndarray, *, published_bins: bool = True) -> Statistics:
    """Statistics of the values (T,) of an object; nan values are left out.

    As published, the ends of the quarters are stored in 8 bits, so that the decay of more than 256 frames is wrong or
    nan; `published_bins=False` corrects this. DAVIS has no such video.
    """
    if values.ndim != 1 or not len(values):
        raise ValueError(f"expected the values of at least one frame, got an array of shape {values.shape}")
    ends = np.round(np.linspace(1, len(values), NUM_BINS + 1) + 1e-10).astype(np.int64) - 1
    if published_bins:
        ends %= 256
    first, last = (values[ends[part] : ends[part + 1] + 1] for part in (0, NUM_BINS - 1))
    return Statistics(_mean(values), _mean((values > RECALL_THRESHOLD).astype(float)), _mean(first) - _mean(last))


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan


class TrackingScores(NamedTuple):
    """Means over objects."""

    j_and_f: float  # mean of the means of J and F
    j: Statistics
    f: Statistics


def mean_over_objects(j: list[Statistics], f: list[Statistics]) -> TrackingScores:
    """Average the statistics of all objects of all videos; a `ValueError` if there are none."""
    if not j or len(j) != len(f):
        raise ValueError(f"J of {len(j)} objects and F of {len(f)}: there must be as many, and at least one")
    means = [Statistics(*(_mean(np.array(column)) for column in zip(*part, strict=True))) for part in (j, f)]
    return TrackingScores((means[0].mean + means[1].mean) / 2, *means)


def score_video(
    truth: np.ndarray, result: np.ndarray, objects: Sequence[int], void_label: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """J and F of each object in each frame of a video: (O, T) float64 each.

    Args:
        truth, result: Label maps (T, H, W): 0 is the background.
        objects: Labels of the O objects.
        void_label: Label of pixels in `truth` that are not scored.
    """
    if truth.shape != result.shape or truth.ndim != 3:
        raise ValueError(f"label maps of shape {truth.shape} and {result.shape}; expected the same (T, H, W)")
    j, f = np.zeros((2, len(objects), len(truth)))
    for frame, (true_labels, labels) in enumerate(zip(truth, result, strict=True)):
        void = None if void_label is None else true_labels == void_label
        for row, label in enumerate(objects):
            masks = true_labels == label, labels == label
            j[row, frame] = region_similarity(*masks, void)
            f[row, frame] = boundary_accuracy(*masks, void)
    return j, f
