"""Feature pictures: the numbers are those of a PCA, the patches land where they belong, one basis for all images."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA
from torch import Tensor

from dinov2.analysis import pca
from dinov2.eval import visualize
from dinov2.models import build_model
from dinov2.models.vision_transformer import DinoVisionTransformer

PATCH = 3


def tiny_vit(**options: object) -> DinoVisionTransformer:
    torch.manual_seed(0)
    sizes = {"img_size": 24, "patch_size": PATCH, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return build_model("vit_small", **sizes | options).eval()


def object_on_background(left: int, top: int) -> Tensor:
    """(3, 24, 24): a pattern of 4 x 4 patches with its corner at patch (left, top), on grey."""
    generator = torch.Generator().manual_seed(1)
    image = torch.zeros(3, 24, 24)
    side = 4 * PATCH
    pattern = torch.randn(3, side, side, generator=generator)
    image[:, top * PATCH : top * PATCH + side, left * PATCH : left * PATCH + side] = pattern
    return image


def test_components_are_those_of_scikit_learn_up_to_sign() -> None:
    features = torch.randn(300, 12, dtype=torch.float64) @ torch.randn(12, 12, dtype=torch.float64) + 5
    reference = PCA(n_components=3, svd_solver="full").fit(features.numpy())
    ours = pca.principal_components(features, 3)
    torch.testing.assert_close(ours.variances, torch.from_numpy(reference.explained_variance_))
    signs = (ours.axes * torch.from_numpy(reference.components_)).sum(dim=1, keepdim=True).sign()
    torch.testing.assert_close(ours.axes, signs * torch.from_numpy(reference.components_))
    expected = torch.from_numpy(reference.transform(features.numpy())) * signs.T
    torch.testing.assert_close(ours.project(features), expected)


def test_the_order_of_the_features_does_not_turn_the_signs() -> None:
    features = torch.randn(50, 6)
    axes = pca.principal_components(features, 3).axes
    torch.testing.assert_close(axes, pca.principal_components(features.flip(0), 3).axes)


def test_shifted_views_of_one_object_get_matching_colours() -> None:
    views = torch.stack([object_on_background(0, 1), object_on_background(3, 4)])
    colours = pca.pca_colours(visualize.patch_tokens(tiny_vit(), views))
    one, other = colours[0, 1:5, 0:4], colours[1, 4:8, 3:7]
    assert (one - other).abs().mean() < 0.1 * one.flatten(0, 1).std(dim=0).mean()


def test_patches_are_in_place_and_registers_are_not_drawn() -> None:
    model = tiny_vit(num_register_tokens=4)
    images = torch.randn(3, 3, 12, 18)
    tokens = visualize.patch_tokens(model, images, batch_size=2)
    with torch.no_grad():
        expected = model.forward_features(images)["x_norm_patchtokens"]
    assert tokens.shape == (3, 4, 6, 32)
    torch.testing.assert_close(tokens.flatten(1, 2), expected)


def test_shifts_put_more_tokens_between_the_plain_ones() -> None:
    model, images = tiny_vit(), torch.randn(2, 3, 24, 24)
    finer = visualize.patch_tokens(model, images, shifts=3)
    assert finer.shape == (2, 24, 24, 32)
    torch.testing.assert_close(finer[:, 1::3, 1::3], visualize.patch_tokens(model, images))


def test_a_shifted_token_is_where_the_patch_is_that_it_saw() -> None:
    model = tiny_vit()
    image = torch.zeros(1, 3, 24, 24)
    image[..., 10, 13] = 50.0
    change = visualize.patch_tokens(model, image, shifts=3) - visualize.patch_tokens(model, 0 * image, shifts=3)
    rows, columns = (change[0].norm(dim=-1) > 0.5 * change[0].norm(dim=-1).max()).nonzero().unbind(dim=1)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (9, 11, 12, 14)


def test_shifts_that_do_not_divide_the_patch_are_refused() -> None:
    with pytest.raises(ValueError, match="shifts = 2 must divide the patch size 3"):
        visualize.patch_tokens(tiny_vit(), torch.zeros(1, 3, 24, 24), shifts=2)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_foreground_is_the_object_whatever_the_sign_of_the_features(sign: int) -> None:
    is_object = torch.zeros(2, 6, 6, dtype=torch.bool)
    is_object[0, 1:4, 2:5] = is_object[1, 3:6, 1:5] = True  # one of them touches the border
    direction = torch.randn(8)
    tokens = sign * torch.where(is_object[..., None], direction, -direction) + 0.1 * torch.randn(2, 6, 6, 8)
    assert torch.equal(pca.foreground_mask(tokens), is_object)


def test_colours_use_the_whole_range_of_the_foreground_and_leave_the_rest_black() -> None:
    tokens, foreground = torch.randn(2, 5, 5, 8), torch.rand(2, 5, 5) < 0.5
    colours = pca.pca_colours(tokens, foreground)
    low, high = colours[foreground].aminmax(dim=0)
    assert (colours[~foreground] == 0).all() and (low == 0).all() and (high == 1).all()


@pytest.mark.parametrize("foreground", [None, torch.zeros(2, 4, 4, dtype=torch.bool)])
def test_features_that_do_not_vary_give_black(foreground: Tensor | None) -> None:
    tokens = torch.randn(16).expand(2, 4, 4, 16)
    assert (pca.pca_colours(tokens, foreground) == 0).all()
    assert not pca.foreground_mask(torch.zeros(2, 1, 1, 16)).any()


def test_contact_sheet_shows_every_picture_in_its_cell() -> None:
    colours = ["red", "lime", "blue"]
    pictures = [Image.new("RGB", (2, 2), colour) for colour in colours]
    sheet = visualize.contact_sheet({"image": pictures, "PCA": pictures[::-1]}, columns=2, cell=20)
    drawn = dict.fromkeys(colours, 0)
    for count, colour in sheet.getcolors(sheet.width * sheet.height):
        for name in colours:
            drawn[name] += count * (Image.new("RGB", (1, 1), name).getpixel((0, 0)) == colour)
    assert drawn == dict.fromkeys(colours, 2 * 20 * 20)


def test_images_come_from_files_folders_and_dataset_strings(tmp_path: Path) -> None:
    for level in range(6):
        Image.new("RGB", (4, 4), (level, 0, 0)).save(tmp_path / f"{level}.png")
    images = visualize.load_images([str(tmp_path / "5.png"), str(tmp_path), "FashionMNIST:split=VAL"], 3)
    assert [image.getpixel((0, 0))[0] for image in images[:4]] == [5, 0, 2, 4]
    assert [image.size for image in images[4:]] == [(28, 28)] * 3
    with pytest.raises(FileNotFoundError, match="'nowhere' is no image file, no folder, and no data set"):
        visualize.load_images(["nowhere"], 3)


def test_the_command_draws_a_sheet(tmp_path: Path) -> None:
    command = ["--config-file", "train/quickstart", "--random-init", "--images", "FashionMNIST:split=VAL"]
    output = tmp_path / "new" / "pca.png"
    options = ["--num-images", "4", "--size", "56", "--foreground", "--output", str(output)]
    assert visualize.main(visualize.get_args_parser().parse_args(command + options)) == 0
    with Image.open(output) as sheet:
        assert len(sheet.getcolors(10**6)) > 20
