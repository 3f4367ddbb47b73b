"""Propagation is that of a loop over patches in float64, whatever the tiles; post-processing is the protocol's."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from dinov2.eval.tracking import propagation
from dinov2.eval.tracking.propagation import (
    PROTOCOLS,
    PropagationSettings,
    Propagator,
    frame_size,
    patch_probabilities,
    pixel_probabilities,
    propagate,
    stretch,
)


def settings(shape: str = "circle", size: float = 2.5, topk: int = 4, context: int = 2) -> PropagationSettings:
    return PropagationSettings(shape, size, topk, 0.2, context, "nearest", True)  # type: ignore[arg-type]


def random_frames(count: int, height: int = 7, width: int = 9, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = normalize(torch.randn(count, height, width, 6, generator=generator), dim=-1)
    return features, torch.rand(count, height, width, 3, generator=generator).softmax(dim=-1)


def by_loop(context: Tensor, probs: Tensor, features: Tensor, chosen: PropagationSettings) -> Tensor:
    height, width, _ = features.shape
    result = torch.zeros(height, width, probs.shape[-1], dtype=torch.float64)
    for i in range(height):
        for j in range(width):
            found = []
            for c in range(len(context)):
                for k in range(height):
                    for n in range(width):
                        near = abs(k - i) <= chosen.size and abs(n - j) <= chosen.size
                        if chosen.shape == "circle":
                            near = math.hypot(k - i, n - j) <= chosen.size
                        if near:
                            cosine = float(features[i, j].double() @ context[c, k, n].double())
                            found.append((cosine, probs[c, k, n].double()))
            found.sort(key=lambda pair: -pair[0])
            best = found[: chosen.topk]
            weights = [math.exp(cosine / chosen.temperature) for cosine, _ in best]
            result[i, j] = sum(w * p for w, (_, p) in zip(weights, best, strict=True)) / sum(weights)
    return result


@pytest.mark.parametrize("tile", [16, 3, 1])
@pytest.mark.parametrize(("shape", "size"), [("circle", 2.5), ("square", 2), ("circle", 0), ("circle", 100)])
def test_propagation_is_that_of_a_loop(tile: int, shape: str, size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(propagation, "TILE", tile)
    features, probs = random_frames(4)
    chosen = settings(shape, size)
    found = propagate(features[:3], probs[:3], features[3], chosen)
    torch.testing.assert_close(found.double(), by_loop(features[:3], probs[:3], features[3], chosen), rtol=0, atol=2e-6)


def test_similarities_equal_to_the_last_of_the_top_count_too() -> None:
    features = torch.ones(1, 5, 5, 4) / 2
    _, probs = random_frames(1, 5, 5)
    found = propagate(features, probs, features[0], settings(size=1, topk=2))
    neighbors = [(2, 2), (1, 2), (3, 2), (2, 1), (2, 3)]
    torch.testing.assert_close(found[2, 2], torch.stack([probs[0][at] for at in neighbors]).mean(dim=0))


def test_the_context_is_the_first_frame_and_the_previous_ones() -> None:
    features, probs = random_frames(6)
    chosen = settings(context=2)
    propagator = Propagator(features[0], probs[0], chosen)
    found = [probs[0]]
    for number in range(1, 6):
        used = [0, *range(max(1, number - 2), number)]
        context_probs = torch.stack([found[i] for i in used])
        expected = propagate(features[used], context_probs, features[number], chosen)
        found.append(propagator.step(features[number]))
        torch.testing.assert_close(found[-1], expected)
    assert len(propagator.previous) == 2
    alone = Propagator(features[0], probs[0], settings(context=0))
    alone.step(features[1])
    torch.testing.assert_close(alone.step(features[2]), propagate(features[:1], probs[:1], features[2], chosen))


def test_a_moving_square_is_followed_with_ideal_features() -> None:
    """One feature for the square and one for the background, and no other similar patch nearby."""
    probs, maps = None, []
    for frame in range(6):
        labels = torch.zeros(12, 20)
        labels[4:8, 2 * frame + 1 : 2 * frame + 5] = 1
        maps.append(labels.long())
    features = [torch.nn.functional.one_hot(labels, 2).float() for labels in maps]
    chosen = PROTOCOLS["dinov3"]
    propagator = Propagator(features[0], patch_probabilities(maps[0], (12, 20), 2), chosen)
    for number in range(1, 6):
        probs = pixel_probabilities(propagator.step(features[number]), (12, 20), chosen)
        assert torch.equal(probs.argmax(dim=0), maps[number])


@pytest.mark.parametrize(
    ("size", "side", "multiple", "expected"),
    [
        ((480, 854), 420, 14, (420, 756)),
        ((854, 480), 480, 16, (864, 480)),
        ((480, 854), 37, 14, (42, 84)),
        ((640, 640), 100, 16, (112, 112)),
    ],
)
def test_both_sides_are_rounded_up(size: tuple[int, int], side: int, multiple: int, expected: tuple[int, int]) -> None:
    assert frame_size(*size, side, multiple) == expected


def test_masks_of_patches_are_those_of_their_centers() -> None:
    labels = torch.zeros(8, 12)
    labels[4:, 6:] = 2
    probs = patch_probabilities(labels, (2, 3), 3)
    assert probs.argmax(dim=-1).tolist() == [[0, 0, 0], [0, 2, 2]] and probs.sum() == 6


def test_masks_are_stretched_and_constant_ones_vanish() -> None:
    probs = torch.stack([torch.tensor([[0.2, 0.4], [0.3, 0.2]]), torch.full((2, 2), 0.7)])
    torch.testing.assert_close(stretch(probs), torch.stack([torch.tensor([[0, 1], [0.5, 0]]), torch.zeros(2, 2)]))
    small = probs.movedim(0, -1)
    paper = pixel_probabilities(small, (4, 4), PROTOCOLS["dinov3_paper"])
    assert paper.shape == (2, 4, 4) and paper[1].unique().tolist() == pytest.approx([0.7])
    notebook = pixel_probabilities(small, (4, 4), PROTOCOLS["dinov3"])
    assert notebook[0, :2, :2].unique().tolist() == [0.0], "nearest: patches are squares"


def test_impossible_settings_are_named() -> None:
    with pytest.raises(ValueError, match="unknown shape of neighborhoods 'disk'; known: circle, square"):
        settings("disk")
    with pytest.raises(ValueError, match="topk at least 1"):
        settings(topk=0)
    with pytest.raises(ValueError, match="unknown upsampling 'bicubic'; known: nearest, bilinear"):
        PropagationSettings("circle", 2, 1, 0.2, 1, "bicubic", True)  # type: ignore[arg-type]
