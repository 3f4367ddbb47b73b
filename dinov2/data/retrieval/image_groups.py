"""A list of images in groups: for each query the other images of its group are to be found."""

import logging
from collections import defaultdict
from pathlib import Path
from typing import Any

from dinov2.data.datasets.image_list import read_rows
from dinov2.data.retrieval.benchmark import GroundTruth, QuerySet, RetrievalBenchmark

logger = logging.getLogger(__name__)

ROLES = ("query", "database")


def read_image_groups(*, file: str, root: str | None = None, **transforms: Any) -> RetrievalBenchmark:
    """Open a list: a `.csv` file (else columns are separated by tabs) whose first line names its columns.

    The columns `path` and `group` are required. With a column `role`, the images are queries or belong to the database;
    without it each image is a query in a database of all images. A query itself is neither right nor wrong.

    Args:
        file: The list.
        root: Folder that paths are relative to; default: the folder of the list.
        **transforms: See `ImageDataset`.

    Raises:
        OSError, ValueError: The list or its first image is missing, or a line is malformed.
    """
    path = Path(file)
    folder = path.parent if root is None else Path(root)
    rows = _read(path)
    if not (folder / rows[0]["path"]).is_file():
        raise FileNotFoundError(f"no image {folder / rows[0]['path']}, the first in {path}")
    has_roles = "role" in rows[0]
    queries = [row for row in rows if not has_roles or row["role"] == "query"]
    database = [row for row in rows if not has_roles or row["role"] == "database"]
    if not queries or not database:
        raise ValueError(f"{path} has {len(queries)} queries and {len(database)} images of the database")
    members, copies = defaultdict(list), defaultdict(list)
    for index, row in enumerate(database):
        members[row["group"]].append(index)
        copies[row["path"]].append(index)
    truth = []
    for row in queries:
        itself = copies[row["path"]]
        positives = [index for index in members[row["group"]] if index not in itself]
        truth.append(GroundTruth(easy=positives, hard=(), junk=itself))
    logger.info("%s: %d groups", path, len({row["group"] for row in rows}))
    query_set, images = (QuerySet(folder, [row["path"] for row in part], **transforms) for part in (queries, database))
    return RetrievalBenchmark(query_set, images, truth, settings=("all",))


def _read(path: Path) -> list[dict[str, str]]:
    """The rows of a list by column, of `path`, `group` and, if it is there, `role`."""
    lines = read_rows(path)
    number, header = next(lines, (0, []))
    if not {"path", "group"} <= set(header):
        raise ValueError(f"the first line of {path} must name the columns path and group, got {header}")
    kept: dict[str, int] = {name: header.index(name) for name in ("path", "group", "role") if name in header}
    rows: list[dict[str, str]] = []
    for number, line in lines:
        if len(line) != len(header):
            raise ValueError(f"line {number} of {path} has {len(line)} columns, the first has {len(header)}: {line}")
        row = {name: line[column].strip() for name, column in kept.items()}
        if "" in row.values() or row.get("role", "query") not in ROLES:
            raise ValueError(f"line {number} of {path} has an empty cell or a role other than {ROLES}: {line}")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} lists no image")
    return rows
