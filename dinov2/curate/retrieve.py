"""The images of a pool that are nearest to some queries."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from dinov2.curate.feature_table import check_comparable
from dinov2.curate.images import Images
from dinov2.curate.outputs import Selection
from dinov2.curate.page import EXAMPLES, Example, Section, Shown, spread
from dinov2.curate.search import Neighbors, SearchOptions, make_search, nearest_cosines, sample_rows, with_progress


def retrieve_nearest(images: Images, queries: Images, *, k: int, options: SearchOptions) -> Selection:
    """Select the k nearest images of each query, each image once (arXiv 2304.07193, appendix A).

    Args:
        images: The pool to select from.
        queries: What is looked for. A query that is in the pool is its own nearest image.
        k: Images for a query.
        options: How neighbors are searched.
    """
    table = images.table
    check_comparable(table, queries.table)
    k = min(k, len(table))
    search = make_search(table, queries.table, k=k, options=options)
    found = Neighbors.none(len(queries.table), k)
    for part, near in with_progress(search.batches(queries.table, k), len(queries.table)):
        found.rows[part], found.similarity[part] = near
    kept = np.unique(found.rows[found.rows >= 0])
    is_kept = np.zeros(len(table), bool)
    is_kept[kept] = True
    reason = f"not among the {k} nearest of a query"
    dropped = ({"name": table.names[row], "reason": reason} for row in np.flatnonzero(~is_kept).tolist())
    cosines = nearest_cosines(queries.table, table, options.seed)
    facts = search.facts() | {"queries": len(queries.table), "neighbors": int((found.rows >= 0).sum())}
    facts |= {"cosine of a query and its nearest image, quantiles": cosines}
    return Selection(
        kept, dropped, facts, _sections(images, queries, found, options.seed), _records(images, queries, found)
    )


def _records(images: Images, queries: Images, found: Neighbors) -> Iterator[dict[str, Any]]:
    for query, (rows, values) in enumerate(zip(found.rows.tolist(), found.similarity.tolist(), strict=True)):
        near = [[images.table.names[row], round(value, 4)] for row, value in zip(rows, values, strict=True) if row >= 0]
        yield {"query": queries.table.names[query], "neighbors": near}


def _sections(images: Images, queries: Images, found: Neighbors, seed: int) -> list[Section]:
    """Queries with their neighbors: the least similar to any, and random ones."""

    def example(query: int) -> Example:
        near = zip(found.rows[query].tolist(), found.similarity[query].tolist(), strict=True)
        shown = [Shown(images, row, f"{value:.3f}") for row, value in near if row >= 0]
        return Example("", [Shown(queries, query, "query"), *shown])

    order = np.argsort(found.similarity[:, 0], kind="stable")
    return [
        Section("Queries with the least similar images", [example(query) for query in spread(order)]),
        Section("Random queries", [example(int(query)) for query in sample_rows(len(order), EXAMPLES, seed)]),
    ]
