"""Principal components: the numbers are those of a PCA, in one piece or in batches; colors mean what they should."""

import pytest
import torch
from sklearn.decomposition import PCA
from torch import Tensor

from dinov2.analysis import pca


def features(count: int = 300, width: int = 12, offset: float = 5.0) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(count + width, width, dtype=torch.float64, generator=generator)
    return draw[:count] @ draw[count:] + offset


def components_of(data: Tensor) -> pca.PrincipalComponents:
    moments = pca.Moments()
    moments.add(data)
    return moments.components(3)


def foreground_of(tokens: Tensor) -> Tensor:
    return pca.fit_foreground([tokens])(tokens)


def colors_of(tokens: Tensor, foreground: Tensor) -> Tensor:
    """Colors of the patches in a mask (n, h, w)."""
    return pca.fit_pca_colormap([tokens], lambda _: foreground)(tokens)


def assert_same_as_scikit_learn(ours: pca.PrincipalComponents, data: Tensor) -> None:
    reference = PCA(n_components=3, svd_solver="full").fit(data.numpy())
    axes = torch.from_numpy(reference.components_)
    signs = (ours.axes * axes).sum(dim=1, keepdim=True).sign()
    torch.testing.assert_close(ours.axes, signs * axes)
    torch.testing.assert_close(ours.variances, torch.from_numpy(reference.explained_variance_))
    torch.testing.assert_close(ours.project(data), torch.from_numpy(reference.transform(data.numpy())) * signs.T)


def test_components_are_those_of_scikit_learn_up_to_sign() -> None:
    assert_same_as_scikit_learn(components_of(features()), features())


@pytest.mark.parametrize("sizes", [[300], [1] * 300, [7, 0, 200, 92, 1]], ids=["one", "single", "uneven"])
def test_batches_give_the_components_of_scikit_learn(sizes: list[int]) -> None:
    moments = pca.Moments()
    for batch in features().split(sizes):
        moments.add(batch)
    assert_same_as_scikit_learn(moments.components(3), features())


def test_moments_of_batches_do_not_lose_small_variations_around_a_large_mean() -> None:
    data = features(offset=0.0)
    shifted = pca.Moments()
    for batch in (data + 1e7).split(11):
        shifted.add(batch)
    torch.testing.assert_close(shifted.scatter, _scatter(data), rtol=1e-6, atol=1e-4)


def _scatter(data: Tensor) -> Tensor:
    centered = data - data.mean(dim=0)
    return centered.T @ centered


def test_the_order_of_the_features_does_not_turn_the_signs() -> None:
    axes = components_of(features()).axes
    torch.testing.assert_close(axes, components_of(features().flip(0)).axes)


# --- Objects ---------------------------------------------------------------------------------------------------------


def object_tokens(sign: int = 1) -> tuple[Tensor, Tensor]:
    """Tokens (2, 6, 6, 8) with an object in each image, one of which touches the border, and where it is."""
    is_object = torch.zeros(2, 6, 6, dtype=torch.bool)
    is_object[0, 1:4, 2:5] = is_object[1, 3:6, 1:5] = True
    generator = torch.Generator().manual_seed(0)
    direction, noise = torch.randn(8, generator=generator), torch.randn(2, 6, 6, 8, generator=generator)
    return sign * torch.where(is_object[..., None], direction, -direction) + 0.1 * noise, is_object


@pytest.mark.parametrize("sign", [1, -1])
def test_the_foreground_is_the_object_whatever_the_sign_of_the_features(sign: int) -> None:
    tokens, is_object = object_tokens(sign)
    assert torch.equal(foreground_of(tokens), is_object)


@pytest.mark.parametrize("sign", [1, -1])
def test_objects_are_bright_whatever_the_sign_of_the_features(sign: int) -> None:
    tokens, is_object = object_tokens(sign)
    red = pca.pca_colors(tokens)[..., 0]
    assert red[is_object].min() > red[~is_object].max()


# --- Colors ---------------------------------------------------------------------------------------------------------


def test_colors_use_the_whole_range_of_the_foreground_and_leave_the_rest_black() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 5, 5, 8, generator=generator)
    foreground = torch.rand(2, 5, 5, generator=generator) < 0.5
    colors = colors_of(tokens, foreground)
    low, high = colors[foreground].aminmax(dim=0)
    assert (colors[~foreground] == 0).all() and (low == 0).all() and (high == 1).all()


@pytest.mark.parametrize("foreground", [False, True])
def test_colors_of_batches_are_those_of_all_images_at_once(foreground: bool) -> None:
    tokens = torch.randn(7, 5, 6, 8, generator=torch.Generator().manual_seed(0))
    batches = tokens.split([3, 1, 3])
    colormap = pca.fit_pca_colormap(batches, pca.fit_foreground(batches) if foreground else None)
    expected = colors_of(tokens, foreground_of(tokens)) if foreground else pca.pca_colors(tokens)
    torch.testing.assert_close(torch.cat([colormap(batch) for batch in batches]), expected)


def test_images_of_different_sizes_share_one_basis() -> None:
    generator = torch.Generator().manual_seed(0)
    small, wide = torch.randn(1, 4, 4, 8, generator=generator), torch.randn(1, 3, 9, 8, generator=generator)
    wide[0, 1, 5] = small[0, 2, 1]
    colormap = pca.fit_pca_colormap([small, wide])
    assert colormap(wide).shape == (1, 3, 9, 3)
    torch.testing.assert_close(colormap(wide)[0, 1, 5], colormap(small)[0, 2, 1])


def test_an_odd_patch_grays_the_others_only_without_clipping() -> None:
    tokens = torch.randn(1, 20, 20, 8, generator=torch.Generator().manual_seed(0))
    tokens[0, 3, 3] = 1000.0
    spread = {clip: pca.fit_pca_colormap([tokens], clip=clip)(tokens)[0, 10:, :, 0].std() for clip in (0.0, 0.01)}
    assert spread[0.0] < 0.01 < 0.1 < spread[0.01]


@pytest.mark.parametrize("foreground", [None, torch.zeros(2, 4, 4, dtype=torch.bool)])
def test_features_that_do_not_vary_give_black(foreground: Tensor | None) -> None:
    tokens = torch.randn(16).expand(2, 4, 4, 16)
    colors = pca.pca_colors(tokens) if foreground is None else colors_of(tokens, foreground)
    assert (colors == 0).all()
    assert not foreground_of(torch.zeros(2, 1, 1, 16)).any()


def test_nothing_in_the_foreground_gives_black() -> None:
    assert (colors_of(torch.randn(2, 4, 4, 16), torch.zeros(2, 4, 4, dtype=torch.bool)) == 0).all()


@pytest.mark.gpu
def test_a_gpu_gives_the_same_colors() -> None:
    tokens = torch.randn(6, 5, 7, 16, generator=torch.Generator().manual_seed(0))
    on_gpu = [part.cuda() for part in tokens.split(2)]
    colormap = pca.fit_pca_colormap(on_gpu, pca.fit_foreground(on_gpu))
    expected = colors_of(tokens, foreground_of(tokens))
    torch.testing.assert_close(torch.cat([colormap(part) for part in on_gpu]), expected)
