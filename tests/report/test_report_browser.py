"""The report in a real browser: on a desktop, on a phone, in print, from the file alone."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Watched, started_browser
from synthetic_run import FEATURE_STEPS, NUM_IMAGES, write_run

from dinov2.report.page import write_report

A4_WIDTH = 688  # CSS pixels of the paper between margins of 14 mm

# Measures the layout: overflow, size of charts and text, whether images are loaded.
MEASURE = """() => {
    const width = document.documentElement.clientWidth;
    const box = element => element.getBoundingClientRect();
    const all = selector => [...document.querySelectorAll(selector)];
    const sideways = e => e.closest('.scroll') || e.closest('details:not([open])');
    return {
        overflow: document.documentElement.scrollWidth - width,
        outside: all('body *').filter(e => box(e).right > width + 1 && !sideways(e)).map(e => e.outerHTML.slice(0, 99)),
        hidden: all('.scroll').filter(e => e.scrollWidth > e.clientWidth + 1).length,
        charts: all('svg.chart').map(e => [box(e).width, box(e).height]),
        cut: all('svg.chart').flatMap(svg => [...svg.querySelectorAll('text')]
            .filter(e => box(e).right > box(svg).right + 1 || box(e).left < box(svg).left - 1).map(e => e.textContent)),
        images: [...document.images].map(e => e.complete && e.naturalWidth > 0 && box(e).width >= 24),
        smallest: Math.min(...all('svg.chart text.tick').map(e => box(e).height)),
    };
}"""


class Visit(Watched):
    """An open page of a report."""

    def open(self, path: Path, width: int, **settings: Any) -> dict[str, Any]:
        """Load a file and measure its layout."""
        self.page.set_viewport_size({"width": width, "height": 900})
        self.page.emulate_media(**settings)
        self.page.goto(path.as_uri())
        self.page.wait_for_load_state()
        return self.page.evaluate(MEASURE)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with started_browser() as started:
        yield started


@pytest.fixture
def visit(browser: Any) -> Iterator[Visit]:
    page = browser.new_page()
    yield Visit(page)
    page.close()


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    healthy = write_run(folder / "a_run_whose_name_is_rather_long_and_has_no_spaces_in_it_at_all")
    collapsed = write_run(folder / "collapsed", collapse_at=300, seed=1, overrides=("optim.base_lr=0.1",))
    bare = write_run(folder / "bare", health=False, images=False, evaluations=False, environment=False, done=1)
    return {
        "one": write_report([healthy]),
        "collapsed": write_report([collapsed]),
        "bare": write_report([bare]),
        "several": write_report([healthy, collapsed, bare], folder / "several.html"),
        "four": write_report([healthy, collapsed, bare, healthy], folder / "four.html"),
    }


@pytest.mark.parametrize("name", ["one", "collapsed", "bare", "several"])
@pytest.mark.parametrize("width", [1280, 375])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_is_seen_on_a_desktop_and_on_a_phone(
    visit: Visit, reports: dict[str, Path], name: str, width: int, scheme: str
) -> None:
    found = visit.open(reports[name], width, color_scheme=scheme)
    assert (found["overflow"], found["outside"], found["cut"]) == (0, [], [])
    assert name == "several" or found["hidden"] == 0  # only tables of several runs may need to be pushed
    assert all(found["images"]) and all(w > 250 and h > 130 for w, h in found["charts"])
    rows = {"one": 1, "collapsed": 1, "bare": 0, "several": 2}[name]
    assert len(found["images"]) == rows * NUM_IMAGES * (len(FEATURE_STEPS) + 1)
    assert len(found["charts"]) > (20 if rows else 8)
    assert found["smallest"] > 9  # pixels of a line of type
    columns = len({round(box["x"]) for box in (each.bounding_box() for each in visit.page.locator(".panel").all())})
    assert columns == (3 if width > 1000 else 1)
    assert (visit.errors, visit.network_requests()) == ([], [])
    assert len([url for url in visit.requests if url.startswith("file:")]) == 1


def test_a_table_that_continues_at_the_side_is_marked(visit: Visit, reports: dict[str, Path]) -> None:
    pushed = "e => [e.scrollWidth > e.clientWidth + 1, e.previousElementSibling?.checkVisibility() === true"
    pushed += " && e.previousElementSibling.className === 'wide', getComputedStyle(e).backgroundImage]"
    for width, media in ((375, "screen"), (1280, "screen"), (A4_WIDTH, "print")):
        visit.open(reports["four"], width, media=media)
        found = visit.page.evaluate(f"() => [...document.querySelectorAll('.scroll')].map({pushed})")
        assert any(hidden for hidden, _, _ in found) == (width == 375)
        assert any(note for _, note, _ in found) == (width == 375)
        assert all(hidden for hidden, note, _ in found if note)
        assert all("gradient" in shadow for hidden, _, shadow in found if hidden)


def test_the_verdict_and_what_to_do_are_seen_first(visit: Visit, reports: dict[str, Path]) -> None:
    visit.open(reports["collapsed"], 1280)
    for text in ("Needs attention: collapse", "Alarms", "What to do"):
        place = visit.page.get_by_text(text).first
        assert place.is_visible() and place.bounding_box()["y"] < 900
    visit.page.get_by_text("All settings").click()
    assert visit.page.get_by_text("OFFICIAL_EPOCH_LENGTH: 50").is_visible()


@pytest.mark.parametrize("name", ["one", "several"])
def test_on_paper_nothing_is_cut_or_torn(visit: Visit, reports: dict[str, Path], name: str) -> None:
    found = visit.open(reports[name], A4_WIDTH, media="print")
    assert (found["overflow"], found["outside"], found["cut"], found["hidden"]) == (0, [], [], 0)
    assert all(found["images"]) and all(w > 250 for w, _ in found["charts"])
    torn = "e => getComputedStyle(e).breakInside !== 'avoid'"
    parts = "[...document.querySelectorAll('figure, .alarm, .row, tr')]"
    assert visit.page.evaluate(f"() => {parts}.filter({torn}).length") == 0
    assert not visit.page.locator("details, nav").first.is_visible()
    paper = visit.page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    visit.page.emulate_media(media="print", color_scheme="dark")
    assert paper == visit.page.evaluate("() => getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    printed = visit.page.pdf(prefer_css_page_size=True)
    assert printed.startswith(b"%PDF") and 4 <= len(re.findall(rb"/Type\s*/Page\b", printed)) <= 16
