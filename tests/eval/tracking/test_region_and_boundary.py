"""J and F are those of loops over pixels; absent objects, void pixels and long videos count as published."""

import math

import numpy as np
import pytest

from dinov2.eval.tracking.region_and_boundary import (
    boundary,
    boundary_accuracy,
    boundary_radius,
    dilate,
    mean_over_objects,
    region_similarity,
    score_video,
    statistics,
)


def random_mask(seed: int, height: int = 21, width: int = 27) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mask = np.zeros((height, width), bool)
    for _ in range(3):
        top, left = rng.integers(0, height - 4), rng.integers(0, width - 4)
        mask[top : top + rng.integers(1, 9), left : left + rng.integers(1, 9)] ^= True
    return mask


def boundary_by_loop(mask: np.ndarray) -> set[tuple[int, int]]:
    height, width = mask.shape
    found = set()
    for i in range(height):
        for j in range(width):
            others = [(i + 1, j), (i, j + 1), (i + 1, j + 1)]
            if any(k < height and n < width and mask[k, n] != mask[i, j] for k, n in others):
                found.add((i, j))
    return found


def f_by_loop(truth: np.ndarray, result: np.ndarray, radius: int) -> float:
    a, b = boundary_by_loop(truth), boundary_by_loop(result)
    if not a or not b:
        return float(not a and not b)

    def share(some: set[tuple[int, int]], others: set[tuple[int, int]]) -> float:
        near = [any((i - k) ** 2 + (j - n) ** 2 <= radius**2 for k, n in others) for i, j in some]
        return sum(near) / len(near)

    precision, recall = share(b, a), share(a, b)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("radius", [1, 2, 5])
def test_f_is_that_of_a_loop(seed: int, radius: int) -> None:
    truth, result = random_mask(seed), random_mask(seed + 100)
    assert {(int(i), int(j)) for i, j in np.argwhere(boundary(truth))} == boundary_by_loop(truth)
    assert boundary_accuracy(truth, result, tolerance=radius) == pytest.approx(f_by_loop(truth, result, radius))


@pytest.mark.parametrize("radius", [0, 1, 3, 8, 40])
def test_dilation_is_by_a_disk(radius: int) -> None:
    mask = random_mask(3)
    mask[0, 0] = True
    rows, columns = np.indices(mask.shape)
    expected = np.zeros_like(mask)
    for i, j in np.argwhere(mask):
        expected |= (rows - i) ** 2 + (columns - j) ** 2 <= radius**2
    assert np.array_equal(dilate(mask, radius), expected)
    assert not dilate(np.zeros_like(mask), radius).any()


def test_the_tolerance_is_a_share_of_the_diagonal_rounded_up() -> None:
    assert boundary_radius((480, 854)) == 8 and boundary_radius((1080, 1920)) == 18 and boundary_radius((4, 4)) == 1
    assert boundary_radius((480, 854), 3) == 3


def test_absent_objects_and_single_pixels() -> None:
    empty, pixel = np.zeros((30, 40), bool), np.zeros((30, 40), bool)
    pixel[10, 20] = True
    for measure in (region_similarity, boundary_accuracy):
        assert measure(empty, empty) == 1.0, "absent, and not found"
        assert measure(empty, pixel) == measure(pixel, empty) == 0.0
        assert measure(pixel, pixel) == 1.0
    near = np.roll(pixel, 1, axis=1)
    assert region_similarity(pixel, near) == 0.0 and boundary_accuracy(pixel, near, tolerance=2) == 1.0


def test_void_pixels_do_not_count() -> None:
    truth, result, void = np.zeros((3, 20, 20), bool)
    truth[2:10, 2:10], result[2:10, 2:14], void[:, 10:] = True, True, True
    assert region_similarity(truth, result) == pytest.approx(64 / 96)
    assert region_similarity(truth, result, void) == 1.0 and boundary_accuracy(truth, result, void) == 1.0
    everything = np.ones_like(void)
    assert region_similarity(truth, result, everything) == 1.0, "all void: both are empty"
    with pytest.raises(ValueError, match=r"masks must be images of one size, got \(20, 20\), \(20, 19\)"):
        region_similarity(truth, result[:, 1:])


def test_statistics_by_hand() -> None:
    values = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2])
    found = statistics(values)
    # Quarters end at frames round(1, 2.75, 4.5, 6.25, 8) = 1, 3, 4, 6, 8, and share these frames.
    assert found.mean == pytest.approx(0.55) and found.recall == 0.5
    assert found.decay == pytest.approx(np.mean([0.9, 0.8, 0.7]) - np.mean([0.4, 0.3, 0.2]))
    assert statistics(np.array([0.3])) == (0.3, 0.0, 0.0)
    with pytest.raises(ValueError, match="at least one frame"):
        statistics(np.array([]))


def test_the_published_decay_of_a_long_video_is_wrong() -> None:
    values = np.linspace(1, 0, 300)
    assert math.isnan(statistics(values).decay)
    right = statistics(values, published_bins=False)
    assert right.decay == pytest.approx(0.75, abs=0.01)
    assert statistics(values[:200]) == statistics(values[:200], published_bins=False)


def test_j_and_f_are_averaged_over_objects() -> None:
    j, f = [statistics(np.array([1.0, 0.0])), statistics(np.array([1.0, 1.0]))], [statistics(np.array([0.5, 0.5]))] * 2
    scores = mean_over_objects(j, f)
    assert scores.j.mean == 0.75 and scores.f.mean == 0.5 and scores.j_and_f == 0.625 and scores.j.recall == 0.75
    with pytest.raises(ValueError, match="J of 0 objects and F of 0"):
        mean_over_objects([], [])


def test_videos_are_scored_by_object_and_frame() -> None:
    truth = np.zeros((3, 12, 12), np.uint8)
    truth[:, 2:6, 2:6], truth[:, 8:10, 8:10], truth[1, 0, :] = 1, 7, 255
    result = truth.copy()
    result[1, 0, :] = 7  # void there
    result[2] = 0
    j, f = score_video(truth, result, [1, 7], void_label=255)
    assert j.tolist() == f.tolist() == [[1.0, 1.0, 0.0]] * 2
    assert score_video(truth, result, [7])[0][0, 1] < 1
    with pytest.raises(ValueError, match="expected the same"):
        score_video(truth, result[:2], [1])
