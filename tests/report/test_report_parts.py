"""The parts of a report: charts, colors of features, texts of numbers."""

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from synthetic_run import colors, write_run

import dinov2.report
from dinov2.report.charts import (
    NUM_STYLES,
    Line,
    Span,
    make_chart,
    spread_labels,
    thinned,
    tick_text,
    ticks,
    value_axis,
)
from dinov2.report.images import aligned, galleries, gallery, same_images, spread
from dinov2.report.numbers import duration, number, percent, readable, result_text, rough, short
from dinov2.report.page import report_environment
from dinov2.report.read_run import read_images, read_run, read_runs, short_names
from dinov2.report.run import Run

STYLE = (Path(dinov2.report.__file__).parent / "templates" / "style.css").read_text()

REALS = st.floats(-1e12, 1e12).filter(lambda value: value == 0 or abs(value) > 1e-9)

# --- Charts ----------------------------------------------------------------------------------------------------------


@given(st.lists(REALS, min_size=1, max_size=20), st.booleans())
def test_an_axis_holds_all_values_and_has_round_ticks(values: list[float], log: bool) -> None:
    log = log and min(values) > 0
    axis = value_axis(values, log=log)
    low, high = sorted((axis.end, axis.start))
    assert all(low - 1e-6 <= axis.at(value) <= high + 1e-6 for value in values)
    found = ticks(axis.low, axis.high, 5, log=log)
    assert 1 <= len(found) <= 6 and found == sorted(set(found))
    assert all(low - 0.1 <= axis.at(value) <= high + 0.1 for value in found)


def test_ticks_are_round_numbers() -> None:
    assert ticks(0, 800, 4) == [0, 200, 400, 600, 800]
    assert ticks(0.01, 300, 5, log=True) == pytest.approx([0.01, 0.1, 1, 10, 100])
    assert ticks(0.4, 2.2, 5, log=True) == pytest.approx([0.5, 1, 2])
    texts = [tick_text(value) for value in (0, 800, 9000, 20_000, 1.5e6, 0.0005, 2e-6, 0.1 + 0.2)]
    assert texts == ["0", "800", "9000", "20k", "1.5M", "0.0005", "2e-6", "0.3"]


@given(
    st.lists(st.tuples(st.integers(0, 10**6), REALS), min_size=1, max_size=300, unique_by=lambda p: p[0]).map(sorted)
)
def test_a_thinned_line_keeps_its_ends_and_extremes(points: list[tuple[int, float]]) -> None:
    few = thinned(points, 40)
    assert len(few) <= max(44, 1) and set(few) <= set(points) and list(few) == sorted(few)
    assert few[0] == points[0] and few[-1] == points[-1]
    for extreme in (min, max):
        assert extreme(value for _, value in few) == extreme(value for _, value in points)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=6))
def test_labels_do_not_overlap_and_keep_their_order(places: list[float]) -> None:
    found = spread_labels(places, 12, 0, 100)
    order = np.argsort(places, kind="stable")
    assert all(
        later - former >= 12 - 1e-9
        for former, later in zip(np.array(found)[order], np.array(found)[order][1:], strict=False)
    )
    assert max(found) <= 100
    assert min(found) >= 0


@pytest.mark.parametrize("values", [[1.0], [0.0], [2.0, 2.0], [-1.0, 3.0], [1e-9, 1e9], [5e-324, 1.0]])
@pytest.mark.parametrize("log", [False, True])
def test_any_line_can_be_drawn(values: list[float], log: bool) -> None:
    spans = [Span(0, 0, "x"), Span(-5, 99, "y")]
    chart = make_chart([Line(list(enumerate(values)), "", 0)], "a <b>", spans=spans, log=log)
    drawn = report_environment().get_template("chart.html").module.svg(chart)  # type: ignore[attr-defined]
    assert "nan" not in drawn and "inf" not in drawn and 'aria-label="a &lt;b&gt;"' in drawn


# --- Images ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 0, 2)])
@pytest.mark.parametrize("inverted", [(), (0,), (1, 2), (0, 1, 2)])
def test_channels_follow_the_reference(order: tuple[int, ...], inverted: tuple[int, ...]) -> None:
    reference = colors()
    turned = reference[..., list(order)].clone()
    for channel in inverted:
        turned[..., channel] = 1 - turned[..., channel]
    torch.testing.assert_close(aligned(turned, reference), reference)


def test_alignment_only_exchanges_and_inverts() -> None:
    own = colors(seed=1)
    found = aligned(own, colors(seed=2))
    for channel in range(3):
        candidates = [own[..., c] for c in range(3)] + [1 - own[..., c] for c in range(3)]
        assert any(torch.equal(found[..., channel], candidate) for candidate in candidates)
    black = torch.zeros_like(own)
    assert torch.equal(aligned(black, own), black)


def test_colors_flow_through_the_steps_of_a_run(tmp_path) -> None:
    """Features whose axes are turned at random at every step, as in training, have the same colors at all steps."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(4, 6, 6, 8, generator=generator) * torch.tensor([8.0, 5, 3, 0.1, 0.1, 0.1, 0.1, 0.1])
    paths = {}
    for step in range(5):
        rotation = torch.linalg.qr(torch.randn(8, 8, generator=generator)).Q
        paths[step] = tmp_path / f"patch_tokens_{step:07d}.npy"
        np.save(paths[step], (tokens @ rotation).half().numpy())
    (tmp_path / "config.yaml").touch()
    run: Run = read_run(tmp_path, "run")
    assert run.tokens == {}  # not in `health`
    run = Run(**{**run.__dict__, "tokens": paths})
    rows = gallery(run).steps
    assert list(rows) == list(range(5))
    images = {step: _pixels(row) for step, row in rows.items()}
    for step in range(4):
        assert np.abs(images[step] - images[4]).max() <= 6  # of 255; float16


def test_runs_with_the_same_images_have_the_same_colors(tmp_path) -> None:
    runs = read_runs([write_run(tmp_path / name, steps=50, evaluations=False) for name in ("a", "b")])
    for path in runs[1].tokens.values():
        np.save(path, -np.load(path)[..., ::-1])  # the same features on other axes
    first, second = (_pixels(each.steps[799]) for each in galleries(runs))
    assert np.abs(first - second).max() <= 2
    other = read_runs([write_run(tmp_path / "c", seed=1)])[0]
    assert (
        same_images(*runs) and not same_images(runs[0], other) and not same_images(runs[0], replace(other, images=None))
    )


def _pixels(uris: list[str]) -> np.ndarray:
    import base64
    import io

    from PIL import Image

    images = [Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) for uri in uris]
    return np.stack([np.asarray(image, dtype=float) for image in images])


def test_steps_are_spread_evenly() -> None:
    assert spread(3, 8) == [0, 1, 2]
    assert spread(100, 5) == [0, 25, 50, 74, 99]


# --- Colors of the page ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("theme", [0, 1, 2], ids=["light", "dark", "print"])
def test_all_text_has_the_contrast_that_accessibility_requires(theme: int) -> None:
    """WCAG 2.2: a contrast of 4.5 for text."""
    variables = re.findall(r"--(\w+): #([0-9a-f]{3,6})", STYLE.split(":root {")[theme + 1].partition("}")[0])
    found = {name: _luminance(code) for name, code in variables}
    names = ["ink", "soft", "good", "unclear", "bad", *(f"c{index}" for index in range(NUM_STYLES))]
    for name in names:
        low, high = sorted((found[name], found["paper"]))
        assert (high + 0.05) / (low + 0.05) >= 4.5, name


def _luminance(code: str) -> float:
    code = "".join(2 * letter for letter in code) if len(code) == 3 else code
    parts = [int(code[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


# --- Texts -----------------------------------------------------------------------------------------------------------


def test_texts_of_numbers() -> None:
    assert [number(x) for x in (0, 3.60851, 12345.6, 1.234e-4, 5e-7, -2.5)] == [
        "0",
        "3.609",
        "12,346",
        "1.234e-4",
        "5e-7",
        "-2.5",
    ]
    assert [short(x) for x in (0.09992, 0.9996, 82.08, 5.783e-7)] == ["0.0999", "0.9996", "82.08", "5.8e-7"]
    assert [result_text(x) for x in (83, 0.0001)] == ["83.00", "1e-4"]
    assert percent(82.35) == "82.3\N{NO-BREAK SPACE}%" or percent(82.35) == "82.4\N{NO-BREAK SPACE}%"
    assert number(math.inf) == "inf"
    assert [rough(x) for x in (41.8712, 2123.4, 1.0, 15.61)] == ["41.9", "2,120", "1", "15.6"]
    assert readable("grew from 15.2 to 2.12e+03, see v2.1e-4") == "grew from 15.2 to 2,120, see v2.1e-4"
    seconds = (42, 61, 360, 3600, 12000, 86400 * 2 + 5 * 3600)
    assert [duration(s) for s in seconds] == ["42 s", "61 s", "6 min", "1 h", "3 h 20 min", "2 d 5 h"]


def test_names_are_as_short_as_they_can_be(tmp_path) -> None:
    paths = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    assert short_names(paths) == ["a/run", "b/run"]
    assert short_names([tmp_path / "a" / "x", tmp_path / "a" / "y"]) == ["x", "y"]
    assert short_names([tmp_path / "a", tmp_path / "a"]) == ["a", "a"]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 torn", b"no such thing"])
def test_damaged_images_are_noted_and_left_out(content: bytes, tmp_path: Path) -> None:
    path, notes = tmp_path / "images.npz", []
    path.write_bytes(content)
    assert read_images(path, notes) is None
    assert len(notes) == 1 and "images.npz could not be read" in notes[0]
