"""Sheets: every image is in its cell, colors of numbers are ordered, long names fit."""

import matplotlib
import numpy as np
import pytest
from PIL import Image

from dinov2.visualization import contact_sheet
from dinov2.visualization.contact_sheet import Cell, Legend


def count_pixels(sheet: Image.Image, color: str) -> int:
    wanted = Image.new("RGB", (1, 1), color).getpixel((0, 0))
    return int((np.asarray(sheet) == wanted).all(axis=-1).sum())


def test_a_sheet_shows_every_image_in_its_cell() -> None:
    colors = ["red", "lime", "blue"]
    images = [Image.new("RGB", (2, 2), color) for color in colors]
    sheet = contact_sheet.contact_sheet({"image": images, "PCA": images[::-1]}, columns=2, cell=20)
    assert [count_pixels(sheet, color) for color in colors] == [2 * 20 * 20] * 3


def test_images_keep_their_proportions_and_touch_what_is_below() -> None:
    tall, wide = Image.new("RGB", (10, 20), "red"), Image.new("RGB", (20, 10), "blue")
    sheet = np.asarray(contact_sheet.contact_sheet({"a": [tall, wide], "b": [tall, wide]}, cell=40))
    is_blue = (sheet == (0, 0, 255)).all(axis=-1)
    assert is_blue.sum() == 2 * 40 * 20
    rows = np.flatnonzero(is_blue.any(axis=1))
    assert rows.max() - rows.min() + 1 == 2 * 20 + contact_sheet.GAP


def test_empty_cells_and_all_texts_fit_on_the_sheet() -> None:
    image = Image.new("RGB", (4, 4), "blue")
    rows = [[Cell(image, "a name that is much too long for a cell"), Cell(image)], [None, Cell(image, "short")]]
    legend = Legend("cosine", "0", "1")
    sheet = contact_sheet.draw_sheet(rows, title="T" * 60, subtitle="S", headings=["a", "b"], legend=legend, cell=50)
    assert count_pixels(sheet, "blue") == 3 * 50 * 50
    pixels = np.asarray(sheet)
    margin = contact_sheet.MARGIN // 2
    for border in (pixels[:margin], pixels[-margin:], pixels[:, :margin], pixels[:, -margin:]):
        assert (border == 255).all()


def test_photographs_are_shrunk_smoothly_and_patches_stay_squares() -> None:
    stripes = Image.fromarray(np.tile(np.uint8([[0], [255]]), (50, 100)))
    assert np.asarray(contact_sheet._fit(Cell(stripes), 25)).std() < 20
    patches = np.asarray(contact_sheet._fit(Cell(Image.fromarray(np.uint8([[0, 255], [255, 0]]))), 10))
    assert np.array_equal(patches, np.kron([[0, 255], [255, 0]], np.ones((5, 5))))


def test_an_enlarged_image_has_the_size_asked_for_and_true_proportions() -> None:
    wide = contact_sheet.enlarge(Image.fromarray(np.uint8([[0, 255, 0]])), (10, 5))
    assert wide.size == (10, 5)
    assert np.asarray(wide)[0].sum() == pytest.approx(255 * 10 / 3, rel=0.05)


def test_a_ring_has_one_size_on_the_sheet_however_small_the_image() -> None:
    rings = []
    for side in (4, 28, 224):
        image = Image.new("RGB", (side, side), "blue")
        sheet = contact_sheet.draw_sheet([[Cell(image, ring=(0.25, 0.75))]], cell=224)
        rings.append((np.asarray(sheet) == 0).all(axis=-1))
    assert np.array_equal(rings[0], rings[1]) and np.array_equal(rings[0], rings[2])
    rows, columns = np.nonzero(rings[0])
    middle = [contact_sheet.MARGIN + 0.75 * 224, contact_sheet.MARGIN + 0.25 * 224]
    assert [rows.mean(), columns.mean()] == pytest.approx(middle, abs=1)
    assert columns.max() - columns.min() < 224 / 8


def test_heat_maps_have_the_colors_of_magma() -> None:
    values = np.linspace(2, 4, 50)[None]
    ours = np.asarray(contact_sheet.heat_map(values, 2, 4)).astype(int)
    theirs = (matplotlib.colormaps["magma"]((values - 2) / 2)[..., :3] * 255).round()
    assert np.abs(ours - theirs).max() < 8
    beyond = np.asarray(contact_sheet.heat_map(np.array([[-9.0, 9.0]]), 2, 4))
    assert np.array_equal(beyond[0, [0, 1]], ours[0, [0, -1]])


def test_a_map_without_variation_is_drawn() -> None:
    assert contact_sheet.heat_map(np.full((2, 3), 0.5), 0.5, 0.5).size == (3, 2)


def test_a_ring_is_visible_on_black_and_on_white_and_leaves_its_center_free() -> None:
    for color in ("black", "white"):
        image = Image.new("RGB", (112, 112), color)
        marked = contact_sheet.draw_ring(image, (56, 56))
        assert len(marked.getcolors()) == 2 and marked.getpixel((56, 56)) == image.getpixel((56, 56))
        assert len(image.getcolors()) == 1
