"""The Gram loss is that of a loop over pairs of patches; its weight and grids are the published ones."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from dinov2.loss.gram import gram_loss, gram_weight, resample_tokens

B, N, D = 3, 5, 4


def tokens(seed: int) -> Tensor:
    return torch.randn(B, N, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_loop(student: Tensor, teacher: Tensor, normalize: bool, per_image: bool, negatives: str) -> float:
    def product(x: Tensor, y: Tensor) -> float:
        value = sum(float(a) * float(b) for a, b in zip(x, y, strict=True))
        return value / math.sqrt(float(x @ x) * float(y @ y)) if normalize else value

    squares = []
    for (b, i), (c, j) in itertools.product(itertools.product(range(B), range(N)), repeat=2):
        if per_image and b != c:
            continue
        s, t = (product(side[b, i], side[c, j]) for side in (student, teacher))
        if negatives == "remove" or (negatives == "remove_common" and t < 0):
            s = max(s, 0.0)
        if negatives != "keep":
            t = max(t, 0.0)
        squares.append((s - t) ** 2)
    return sum(squares) / len(squares)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("per_image", [True, False])
@pytest.mark.parametrize("negatives", ["keep", "remove", "remove_teacher", "remove_common"])
def test_the_loss_is_that_of_a_loop(normalize: bool, per_image: bool, negatives: str) -> None:
    student, teacher = tokens(0), tokens(1)
    found = gram_loss(student, teacher, normalize=normalize, per_image=per_image, negatives=negatives)  # type: ignore[arg-type]
    assert float(found) == pytest.approx(by_loop(student, teacher, normalize, per_image, negatives), rel=1e-5)


def test_the_loss_is_zero_for_rotated_features_and_does_not_depend_on_their_lengths() -> None:
    student = tokens(0)
    rotation = torch.linalg.qr(torch.randn(D, D, dtype=torch.float64)).Q
    assert gram_loss(student, 3 * student @ rotation) < 1e-10
    assert gram_loss(student, 3 * student @ rotation, normalize=False) > 1


def test_selected_tokens_of_several_crops_make_one_matrix() -> None:
    student, teacher = tokens(0), tokens(1)
    flat = gram_loss(student.flatten(0, 1), teacher.flatten(0, 1), per_image=False)
    torch.testing.assert_close(flat, gram_loss(student, teacher, per_image=False))


def test_autocast_does_not_reach_the_similarities() -> None:
    student, teacher = tokens(0).float(), tokens(1).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gram_loss(student, teacher), gram_loss(student, teacher))
        found = gram_loss(student, teacher)
    assert found.dtype == torch.float32 and torch.equal(found, gram_loss(student, teacher))


def test_other_shapes_and_options_are_named() -> None:
    with pytest.raises(ValueError, match=r"student \(3, 5, 4\) and teacher \(3, 4, 4\)"):
        gram_loss(tokens(0), tokens(1)[:, :4])
    with pytest.raises(ValueError, match=r"student \(5, 4\) and teacher \(5, 4\) with per_image=True"):
        gram_loss(tokens(0)[0], tokens(1)[0])
    with pytest.raises(ValueError, match="unknown treatment of negatives 'drop'; known: keep, remove, remove_teacher"):
        gram_loss(tokens(0), tokens(1), negatives="drop")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"tokens \(3, 5, 4\) do not fit a grid of 2 x 3"):
        resample_tokens(tokens(0), (2, 3), (1, 1))


def test_tokens_keep_their_places_on_another_grid() -> None:
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(12.0), indexing="ij")
    large = torch.stack([rows, columns], dim=-1).flatten(0, 1)[None]
    small = resample_tokens(large, (8, 12), (4, 6), mode="bilinear").view(4, 6, 2)
    torch.testing.assert_close(small[..., 0], rows[::2, ::2] + 0.5)
    torch.testing.assert_close(small[..., 1], columns[::2, ::2] + 0.5)
    assert resample_tokens(large, (8, 12), (8, 12)) is large
    smooth = resample_tokens(large, (8, 12), (4, 6), antialias=True)
    assert smooth.shape == (1, 24, 2) and not torch.allclose(smooth, resample_tokens(large, (8, 12), (4, 6)))


def test_the_weight_rises_by_a_half_cosine_and_stays() -> None:
    options = {"start": 0.0, "peak": 0.0, "end": 2.0, "warmup_steps": 5, "total_steps": 20, "cosine_steps": 6}
    weights = [gram_weight(step, **options) for step in range(25)]  # type: ignore[arg-type]
    assert weights[:6] == [0.0] * 6 and weights[10:] == [2.0] * 15
    assert weights[7:9] == pytest.approx([1 - math.cos(2 * math.pi / 5), 1 - math.cos(3 * math.pi / 5)])
    linear = {**options, "start": 1.0, "peak": 3.0, "cosine_steps": 1}
    assert [gram_weight(step, **linear) for step in (0, 1, 4, 5, 6)] == [1.0, 1.4, 2.6, 3.0, 2.0]  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a warm-up of 5 and a cosine of 16 steps in a training of 20"):
        gram_weight(0, **{**options, "cosine_steps": 16})  # type: ignore[arg-type]
