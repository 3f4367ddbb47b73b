"""Gram anchoring: the similarities between a student's patches stay those of an earlier model (DINOv3, section 4).

Shapes: B crops of N patches, D feature width, M patches of several crops together.
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

Negatives = Literal["keep", "remove", "remove_teacher", "remove_common"]


def gram_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    normalize: bool = True,
    per_image: bool = True,
    negatives: Negatives = "keep",
) -> Tensor:
    """Mean squared difference of the Gram matrices of two sets of patch features; always in float32.

    The defaults are the published setting.

    Args:
        student: Features (B, N, D), or (M, D) with `per_image=False`.
        teacher: Features of the same patches, see `resample_tokens`; they get a gradient if they require one.
        normalize: Whether features are L2-normalized first, so that the matrices have cosines.
        per_image: Whether there is one matrix (N, N) per crop, rather than one (B N, B N) for all.
        negatives: What happens to negative similarities: `keep`; `remove`: those of either side become 0;
            `remove_teacher`: those of the teacher become 0, those of the student stay (what the published option for
            this does); `remove_common`: those that are negative on both sides become 0 on both, and those of the
            teacher alone become 0 (what it is meant to do).

    Raises:
        ValueError: The shapes differ or do not suit `per_image`, or `negatives` is unknown.
    """
    if negatives not in get_args(Negatives):
        raise ValueError(f"unknown treatment of negatives {negatives!r}; known: {', '.join(get_args(Negatives))}")
    if student.shape != teacher.shape or student.ndim not in ((3,) if per_image else (2, 3)):
        raise ValueError(f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} with {per_image=}")
    with torch.autocast(student.device.type, enabled=False):
        ours, theirs = (_similarities(tokens.float(), normalize, per_image) for tokens in (student, teacher))
        ours, theirs = _without_negatives(ours, theirs, negatives)
        return F.mse_loss(ours, theirs)


def _similarities(tokens: Tensor, normalize: bool, per_image: bool) -> Tensor:
    """(B, N, D) -> (B, N, N), or with all tokens together (B N, B N)."""
    if normalize:
        tokens = F.normalize(tokens, dim=-1)
    if not per_image:
        tokens = tokens.flatten(0, -2)
    return tokens @ tokens.mT


def _without_negatives(student: Tensor, teacher: Tensor, negatives: Negatives) -> tuple[Tensor, Tensor]:
    if negatives == "keep":
        return student, teacher
    if negatives == "remove":
        return student.clamp(min=0), teacher.clamp(min=0)
    if negatives == "remove_common":
        student = student.masked_fill((student < 0) & (teacher < 0), 0.0)
    return student, teacher.clamp(min=0)


def resample_tokens(
    tokens: Tensor,
    from_grid: tuple[int, int],
    to_grid: tuple[int, int],
    *,
    mode: Literal["bicubic", "bilinear"] = "bicubic",
    antialias: bool = False,
) -> Tensor:
    """Bring the patch tokens of a larger crop to the student's grid: (B, H W, D) -> (B, h w, D).

    Args:
        tokens: Tokens of the grid, row by row.
        from_grid: H, W.
        to_grid: h, w.
        mode: Interpolation; published: bicubic without antialiasing.
        antialias: Whether frequencies that the smaller grid cannot represent are suppressed.
    """
    if tokens.ndim != 3 or tokens.shape[1] != math.prod(from_grid):
        raise ValueError(f"tokens {tuple(tokens.shape)} do not fit a grid of {from_grid[0]} x {from_grid[1]}")
    if from_grid == to_grid:
        return tokens
    maps = tokens.mT.unflatten(2, from_grid)
    resized = F.interpolate(maps, size=to_grid, mode=mode, align_corners=False, antialias=antialias)
    return resized.flatten(2).mT


def gram_weight(
    step: int, *, start: float, peak: float, end: float, warmup_steps: int, total_steps: int, cosine_steps: int | None
) -> float:
    """The weight of the loss at a step: linear from `start` to `peak`, by a half cosine to `end`, then constant.

    The published run has 0, 0 and 2.0 with a warm-up of 1,000,000 steps and a cosine of 1,000.

    Args:
        step: Number of the step, from 0.
        start: Weight at step 0.
        peak: Weight at step `warmup_steps`.
        end: Weight at the last step of the cosine and from then on.
        warmup_steps: Length of the linear part.
        total_steps: Length of the training, the end of the cosine if `cosine_steps` is None.
        cosine_steps: Length of the cosine, both ends included.
    """
    cosine = total_steps - warmup_steps if cosine_steps is None else cosine_steps
    if not 0 <= warmup_steps <= warmup_steps + cosine <= total_steps:
        raise ValueError(f"a warm-up of {warmup_steps} and a cosine of {cosine} steps in a training of {total_steps}")
    if step < warmup_steps:
        return start + (peak - start) * step / warmup_steps
    done = step - warmup_steps
    if done >= cosine:
        return end
    return end + (peak - end) * (1 + math.cos(math.pi * done / max(cosine - 1, 1))) / 2
