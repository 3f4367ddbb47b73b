"""The page of patch similarity: its data, its size, and in a real browser what mouse, keyboard and finger do."""

import base64
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import Watched, started_browser
from PIL import Image
from torch.nn import functional

from dinov2 import config
from dinov2.eval.extract.frozen_backbone import FrozenBackbone
from dinov2.models import build_model
from dinov2.visualization import __main__ as visualize
from dinov2.visualization import explorer
from dinov2.visualization.compact_tokens import compact_tokens
from dinov2.visualization.feature_maps import image_tokens
from dinov2.visualization.inputs import LoadedImage, list_inputs, load_images

CONFIG = """
student: {arch: vit_small, patch_size: 8, embed_dim: 48, depth: 2, num_heads: 3, init_std: 0.3, num_register_tokens: 2}
crops: {global_crops_size: 64, local_crops_size: 16}
"""
GRIDS = [[8, 8], [8, 8], [8, 8], [8, 12]]  # of patches; the last image is wide


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> FrozenBackbone:
    path = tmp_path_factory.mktemp("model") / "tiny.yaml"
    path.write_text(CONFIG)
    torch.manual_seed(0)
    return FrozenBackbone(build_model(**config.backbone_arguments(config.load(str(path)))).eval(), "tiny & <small>")


@pytest.fixture(scope="module")
def images() -> list[LoadedImage]:
    found = list(load_images(list_inputs(["FashionScenes:split=VAL:size=64:length=3"])))
    wide = Image.fromarray(np.random.default_rng(0).integers(0, 255, (4, 6, 3), dtype=np.uint8))
    return [*found, LoadedImage('wide "<b>".png', "wide.png", wide.resize((96, 64), Image.Resampling.BICUBIC))]


@pytest.fixture(scope="module")
def page(backbone: FrozenBackbone, images: list[LoadedImage], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "similarity.html"
    path.write_bytes(explorer.similarity_page(backbone, images, shorter_side=64))
    return path


def data_of(page: Path) -> dict[str, Any]:
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(encoding="utf-8"))
    assert match
    return json.loads(match[1])


@pytest.fixture(scope="module")
def exact(backbone: FrozenBackbone, images: list[LoadedImage]) -> np.ndarray:
    """Cosines of all pairs of patches in full precision."""
    tokens = torch.cat([grid.flatten(0, 1) for grid in image_tokens(backbone, [each.image for each in images])])
    unit = functional.normalize(tokens.double(), dim=-1)
    return (unit @ unit.T).numpy()


# --- The file --------------------------------------------------------------------------------------------------------


def test_the_data_are_features_colors_and_attention_of_all_patches(page: Path, exact: np.ndarray) -> None:
    data = data_of(page)
    count = sum(rows * columns for rows, columns in GRIDS)
    assert data["grids"] == GRIDS and len(exact) == count
    levels = (
        np.frombuffer(zlib.decompress(base64.b64decode(data["features"])), np.int8).reshape(-1, count).astype(float)
    )
    unit = levels / np.linalg.norm(levels, axis=0)
    error = np.abs(unit.T @ unit - exact).max()
    text = page.read_text(encoding="utf-8")
    stated = re.search(r'id="error">([\d.]+)<', text)
    assert stated and error < 0.03 and float(stated[1]) == pytest.approx(error, abs=1e-4)
    colors = np.frombuffer(base64.b64decode(data["pca"]), np.uint8).reshape(count, 3)
    assert colors.min() == 0 and colors.max() == 255 and (colors.std(axis=0) > 20).all()
    attention = np.frombuffer(base64.b64decode(data["attention"]), np.uint8)
    assert len(attention) == count and all(part.max() == 255 for part in np.split(attention, [64, 128, 192]))
    assert text.count("data:image/jpeg;base64,") == 4 and not re.search(r"(src|href)=\"(?!data:)", text)
    assert "<b>" not in text and "tiny &amp; &lt;small&gt;" in text and "and the registers" in text


def test_a_large_page_is_made_of_coarser_features(
    backbone: FrozenBackbone,
    images: list[LoadedImage],
    page: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(explorer, "PAGE_BYTES", 32_000)
    monkeypatch.setattr(explorer, "TEXT_BYTES", 21_000)
    monkeypatch.setattr(explorer, "SMALLEST_SHARE", 0.05)
    small = explorer.similarity_page(backbone, images, shorter_side=64)
    assert len(small) < 32_000 < len(page.read_bytes())
    assert "cosines on the page have errors of up to" in caplog.text


def test_the_features_of_24_images_of_37_x_37_patches_leave_room_for_images() -> None:
    tokens = torch.randn(24 * 37 * 37, 384, generator=torch.Generator().manual_seed(0))
    compact = compact_tokens(tokens[:, :96] @ tokens[:96] / 20 + 1, max_bytes=2_300_000)
    assert len(compact.packed) * 4 / 3 < 3_100_000  # base64; 1.9 MB of 5 for 24 images in JPEG


def test_the_command_writes_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    words = ["similarity", "--config-file", str(tmp_path / "tiny.yaml"), "--random-init", "--images"]
    words += ["FashionScenes:split=VAL:size=64", "--num-images", "2", "--html"]
    assert visualize.main([*words, str(tmp_path / "new" / "s.html")]) == 0
    assert data_of(tmp_path / "new" / "s.html")["grids"] == [[8, 8]] * 2
    with pytest.raises(ValueError, match=r"--html s.png must end in one of \.html, \.htm"):
        visualize.main([*words, "s.png"])
    for more in (["--point", "1,1"], ["--npy"], ["--output", "s.png"]):
        with pytest.raises(SystemExit):
            visualize.main([*words, "s.html", *more])
        assert "--html" in capsys.readouterr().err


# --- In a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with started_browser() as started:
        yield started


DESKTOP: dict[str, Any] = {"viewport": {"width": 1280, "height": 900}}
PHONE: dict[str, Any] = {"viewport": {"width": 375, "height": 740}, "has_touch": True, "is_mobile": True}

# The colors of the patches of an image as numbers, and of a hidden one as nothing.
COLORS = """index => {
    const canvas = document.querySelectorAll(".patches canvas")[index];
    if (getComputedStyle(canvas).opacity === "0") return null;
    return [...canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data];
}"""
SMALL_TARGETS = """() => [...document.querySelectorAll(".bar label, .bar button, .bar input[type=range]")]
    .map(e => e.getBoundingClientRect()).filter(box => box.width && (box.width < 44 || box.height < 44)).length"""


def opened(browser: Any, page: Path, **settings: Any) -> Watched:
    watched = Watched(browser.new_context(**settings).new_page())
    watched.page.goto(page.as_uri())
    watched.page.wait_for_selector("body[data-ready]")
    return watched


def colors(watched: Watched, index: int) -> list[int] | None:
    return watched.page.evaluate(COLORS, index)


def position(watched: Watched, index: int, row: int, column: int) -> dict[str, float]:
    box = watched.page.locator(".patches").nth(index).bounding_box()
    rows, columns = GRIDS[index]
    return {"x": box["width"] * (column + 0.5) / columns, "y": box["height"] * (row + 0.5) / rows}


def status(watched: Watched) -> str:
    return watched.page.locator("#status").text_content()


def test_a_click_colors_all_images_by_similarity(browser: Any, page: Path, exact: np.ndarray) -> None:
    watched = opened(browser, page, **DESKTOP)
    assert [colors(watched, index) for index in range(4)] == [None] * 4
    watched.page.locator(".patches").nth(1).click(position=position(watched, 1, 5, 2))
    patch = 64 + 5 * 8 + 2
    found = np.array(watched.page.evaluate("() => [...similarity]"))
    assert found[patch] == pytest.approx(1, abs=1e-6) and found.argmax() == patch
    np.testing.assert_allclose(found, exact[patch], atol=0.03)
    brightness = np.concatenate([np.reshape(colors(watched, index), (-1, 4))[:, :3].sum(axis=1) for index in range(4)])
    assert brightness.argmax() == patch and brightness[found.argmin()] == brightness.min()
    assert np.corrcoef(brightness, found)[0, 1] > 0.95
    others = np.delete(np.arange(len(found)), np.arange(64, 128))
    best = others[found[others].argmax()]
    assert status(watched).startswith("image 1, row 6, column 3. Most similar elsewhere: ")
    assert status(watched).endswith(f"cosine {found[best]:.2f}.")
    marks = watched.page.locator(".mark:visible")
    assert marks.count() == 4 and watched.page.locator(".mark.match:visible").count() == 3
    before = colors(watched, 0)
    watched.page.locator(".patches").nth(3).click(position=position(watched, 3, 0, 11))
    assert 'wide "<b>".png, row 1, column 12.' in status(watched) and colors(watched, 0) != before
    assert (watched.errors, watched.network_requests()) == ([], []) and len(watched.requests) == 1


def test_everything_can_be_done_with_the_keyboard(browser: Any, page: Path) -> None:
    watched = opened(browser, page, **DESKTOP)
    keyboard = watched.page.keyboard
    for _ in range(3):
        keyboard.press("Tab")
    assert watched.page.evaluate("() => document.activeElement.getAttribute('aria-label')").startswith(
        "image 0, 8 rows"
    )
    outline = watched.page.evaluate("() => getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    keyboard.press("ArrowRight")
    assert status(watched).startswith("image 0, row 5, column 5.")
    similarity = colors(watched, 2)
    for key in ("ArrowRight", "ArrowUp", "ArrowUp"):
        keyboard.press(key)
    assert status(watched).startswith("image 0, row 3, column 6.") and colors(watched, 2) != similarity
    for _ in range(9):
        keyboard.press("ArrowLeft")
    assert status(watched).startswith("image 0, row 3, column 1.")
    shown = {}
    for key, layer in (("1", "similarity"), ("2", "pca"), ("3", "attention")):
        keyboard.press(key)
        assert watched.page.locator("input[name=layer]:checked").input_value() == layer
        shown[layer] = colors(watched, 2)
    expected = np.frombuffer(base64.b64decode(data_of(page)["pca"]), np.uint8).reshape(-1, 3)[128:192]
    assert np.array_equal(np.reshape(shown["pca"], (-1, 4))[:, :3], expected)
    assert shown["similarity"] != shown["attention"] != shown["pca"]
    keyboard.press("Escape")
    assert status(watched).startswith("Click or tap") and watched.page.locator(".mark:visible").count() == 0
    keyboard.press("1")
    assert colors(watched, 2) is None
    assert watched.errors == []


def test_opacity_and_the_colors_of_the_system(browser: Any, page: Path) -> None:
    papers = set()
    for scheme in ("light", "dark"):
        watched = opened(browser, page, **DESKTOP, color_scheme=scheme)
        papers.add(watched.page.evaluate("() => getComputedStyle(document.body).backgroundColor"))
    assert len(papers) == 2
    watched.page.keyboard.press("2")
    watched.page.locator("#opacity").focus()
    for _ in range(3):
        watched.page.keyboard.press("ArrowLeft")
    opacity = "() => getComputedStyle(document.querySelector('.patches canvas')).opacity"
    assert float(watched.page.evaluate(opacity)) == pytest.approx(0.67)
    assert watched.page.locator(".mark:visible").count() == 0, "the arrows moved the slider alone"


def test_a_finger_is_enough_on_a_phone(browser: Any, page: Path) -> None:
    watched = opened(browser, page, **PHONE)
    width = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert watched.page.evaluate(width) == 0 and watched.page.evaluate(SMALL_TARGETS) == 0
    watched.page.locator(".patches").nth(0).tap(position=position(watched, 0, 2, 3))
    assert status(watched).startswith("image 0, row 3, column 4.")
    watched.page.get_by_role("button", name="Move the patch down").tap()
    assert status(watched).startswith("image 0, row 4, column 4.")
    before = colors(watched, 1)
    watched.page.get_by_role("radio", name="Attention").tap()
    assert colors(watched, 1) != before
    watched.page.get_by_role("button", name="Clear").tap()
    assert status(watched).startswith("Click or tap")
    bar = watched.page.locator(".bar").bounding_box()
    assert bar["y"] + bar["height"] <= 740.5, "the controls stay in reach"
    assert bar["height"] < 180 and watched.errors == []
