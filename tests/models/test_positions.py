"""Interpolated positions, against bicubic resampling written out here."""

import math

import pytest
import torch
from torch import Tensor

from dinov2.models.vision_transformer import DinoVisionTransformer


def vit(img_size: int | tuple[int, int], *, offset: float = 0.1, antialias: bool = False) -> DinoVisionTransformer:
    """Patches of 2 pixels and no blocks; generic positions."""
    torch.manual_seed(0)
    model = DinoVisionTransformer(
        img_size=img_size,
        patch_size=2,
        embed_dim=4,
        depth=0,
        num_heads=1,
        interpolate_offset=offset,
        interpolate_antialias=antialias,
    )
    torch.nn.init.normal_(model.pos_embed)
    return model.requires_grad_(False)


def positions_for(model: DinoVisionTransformer, height: int, width: int) -> Tensor:
    """For tokens of the dtype of the table."""
    return model.interpolate_pos_encoding(model.pos_embed, height, width)


def cubic(x: float, a: float) -> float:
    """Keys' cubic convolution kernel."""
    x = abs(x)
    if x < 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def resampling(grid: int, size: int, step: float, *, antialias: bool) -> Tensor:
    """(size, grid) weights: output i is centered on (i + 0.5) * step of the input, in units of cells.

    Without antialiasing four neighbors with a = -0.75, the border repeated. With it a = -0.5, the kernel as wide as
    the step when shrinking, cut at the border and normalized; PyTorch then leaves an axis alone that keeps its size,
    whatever the step.
    """
    if antialias and grid == size:
        return torch.eye(grid, dtype=torch.float64)
    weights = torch.zeros(size, grid, dtype=torch.float64)
    for i in range(size):
        center = (i + 0.5) * step
        if antialias:
            width = max(step, 1.0)
            first, last = max(int(center - 2 * width + 0.5), 0), min(int(center + 2 * width + 0.5), grid)
            for j in range(first, last):
                weights[i, j] = cubic((j - center + 0.5) / width, a=-0.5)
            weights[i] /= weights[i].sum()
        else:
            left = math.floor(center - 0.5)
            for j in range(left - 1, left + 3):
                weights[i, min(max(j, 0), grid - 1)] += cubic(center - 0.5 - j, a=-0.75)
    return weights


def naive(model: DinoVisionTransformer, rows: int, columns: int) -> Tensor:
    table = model.pos_embed.double()
    grid_rows, grid_columns = model.patch_embed.patches_resolution
    grid = table[0, 1:].view(grid_rows, grid_columns, -1)
    offset, antialias = model.interpolate_offset, model.interpolate_antialias
    down = resampling(grid_rows, rows, grid_rows / (rows + offset), antialias=antialias)
    across = resampling(grid_columns, columns, grid_columns / (columns + offset), antialias=antialias)
    resampled = torch.einsum("ri,cj,ijd->rcd", down, across, grid)
    return torch.cat([table[:, :1], resampled.flatten(0, 1)[None]], dim=1)


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("offset", [0.1, 0.0])
@pytest.mark.parametrize("rows_columns", [(3, 3), (7, 7), (16, 16), (5, 12), (4, 9), (1, 1), (6, 4)])
@pytest.mark.parametrize("img_size", [12, (6, 16)])
def test_positions_are_resampled_bicubically(
    img_size: int | tuple[int, int], rows_columns: tuple[int, int], offset: float, antialias: bool
) -> None:
    model = vit(img_size, offset=offset, antialias=antialias)
    rows, columns = rows_columns
    positions = positions_for(model, 2 * rows, 2 * columns)
    assert positions.shape == (1, 1 + rows * columns, 4)
    torch.testing.assert_close(positions.double(), naive(model, rows, columns), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("offset", [0.1, 0.0])
@pytest.mark.parametrize("img_size", [8, (4, 16), (16, 4), (4, 6)])
def test_at_the_native_size_the_table_is_untouched(
    img_size: int | tuple[int, int], offset: float, antialias: bool
) -> None:
    """Also where the image is not square: 2 x 8 patches are not taken for 4 x 4."""
    model = vit(img_size, offset=offset, antialias=antialias)
    height, width = model.patch_embed.img_size
    assert positions_for(model, height, width) is model.pos_embed


def test_as_many_patches_in_another_aspect_are_interpolated() -> None:
    model = vit(8)
    positions = positions_for(model, 4, 16)
    assert positions.shape == model.pos_embed.shape
    torch.testing.assert_close(positions.double(), naive(model, 2, 8), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(positions, model.pos_embed, atol=0.1)


def test_height_comes_before_width() -> None:
    """With positions that grow downwards only, a tall image has its growth along the rows."""
    model = vit(8, offset=0.0)
    model.pos_embed[:, 1:] = torch.arange(4.0).repeat_interleave(4)[None, :, None]
    tall = positions_for(model, 16, 4)[0, 1:, 0].view(8, 2)
    assert torch.equal(tall[:, 0], tall[:, 1]) and (tall[1:, 0] > tall[:-1, 0]).all()


@pytest.mark.parametrize("offset", [0.1, 0.0])
def test_no_size_loses_a_row_to_rounding(offset: float) -> None:
    """Without an offset a scale of 39/37 would give 38 rows; the offset, or asking for the size, prevents that."""
    model = vit(2 * 37, offset=offset)
    for rows in range(1, 200):
        assert positions_for(model, 2 * rows, 4).shape[1] == 1 + 2 * rows


def test_the_offset_changes_the_sampled_points() -> None:
    with_offset, without = (positions_for(vit(8, offset=offset), 12, 12) for offset in (0.1, 0.0))
    assert 1e-3 < (with_offset - without).abs().max() < 0.5
    assert torch.equal(with_offset[:, 0], without[:, 0])


def test_half_precision_tables_are_resampled_in_single() -> None:
    model = vit(8, offset=0.0)
    half = vit(8, offset=0.0).bfloat16()
    model.pos_embed.copy_(half.pos_embed)
    positions = positions_for(half, 12, 12)
    assert positions.dtype == torch.bfloat16
    assert torch.equal(positions, positions_for(model, 12, 12).bfloat16())


def test_gradients_reach_the_table() -> None:
    model = vit(8).requires_grad_()
    positions_for(model, 12, 4).sum().backward()
    assert model.pos_embed.grad is not None and model.pos_embed.grad.all()
