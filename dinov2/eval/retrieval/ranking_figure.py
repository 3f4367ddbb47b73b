"""A figure of queries and the images that were found first, framed by whether they are right."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont, ImageOps

from dinov2.data.images import AnyImage
from dinov2.data.retrieval import RetrievalBenchmark

CELL, FRAME, GAP, MARGIN, TITLE_HEIGHT = 128, 5, 8, 16, 28  # pixels
RIGHT, WRONG, JUNK, QUERY = "#1b9e4b", "#d62728", "#9a9a9a", "#1a1a1a"
CAPTION = "query, then the most similar images: green right, red wrong, gray neither (not counted)"


def draw_rankings(
    benchmark: RetrievalBenchmark, queries: Sequence[int], rankings: Sequence[Sequence[int]], columns: int = 8
) -> Image.Image:
    """Draw a row per query: the query and the first `columns` images of its ranking (indices of the database)."""
    width = 2 * MARGIN + (columns + 1) * (CELL + GAP) - GAP
    page = Image.new("RGB", (width, 2 * MARGIN + TITLE_HEIGHT + len(queries) * (CELL + GAP) - GAP), "white")
    ImageDraw.Draw(page).text((MARGIN, MARGIN), CAPTION, QUERY, ImageFont.load_default(14))
    for row, (query, ranking) in enumerate(zip(queries, rankings, strict=True)):
        truth = benchmark.ground_truth[query]
        positives, junk = {*truth.easy, *truth.hard}, set(truth.junk)
        cells = [(benchmark.queries.get_image(query), QUERY)]
        for index in list(ranking)[:columns]:
            color = RIGHT if index in positives else JUNK if index in junk else WRONG
            cells.append((benchmark.database.get_image(index), color))
        top = MARGIN + TITLE_HEIGHT + row * (CELL + GAP)
        for column, (image, color) in enumerate(cells):
            page.paste(_framed(image, color), (MARGIN + column * (CELL + GAP), top))
    return page


def _framed(image: AnyImage, color: str) -> Image.Image:
    """The image in a square of CELL pixels with a frame."""
    side = CELL - 2 * FRAME
    inside = ImageOps.pad(image.convert("RGB"), (side, side), Image.Resampling.LANCZOS, color="white")
    return ImageOps.expand(inside, FRAME, color)
