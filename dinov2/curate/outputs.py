"""The output folder: a list of the images that are kept, what was dropped and why, and a page of examples."""

import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dinov2.curate.feature_table import FeatureTable
from dinov2.curate.images import Images
from dinov2.curate.page import Section, render_page
from dinov2.eval.results import counted
from dinov2.files import atomic_write

logger = logging.getLogger(__name__)

IMAGES_FILE, INDICES_FILE, DROPPED_FILE, NEIGHBORS_FILE, PAGE_FILE = FILES = (
    *("images.txt", "indices.txt", "dropped.json", "neighbors.jsonl", "index.html"),
)


class Selection(NamedTuple):
    """What a command selects."""

    kept: np.ndarray  # (m,) int64, rows of the table, ascending
    dropped: Iterable[Mapping[str, Any]]  # name and reason of each other row
    facts: Mapping[str, Any]  # numbers by name
    sections: list[Section]
    neighbors: Iterable[Mapping[str, Any]] = ()  # of each query


def check_output(folder: Path, *, overwrite: bool) -> None:
    """Raise a `ValueError` or `OSError` if an output folder is a file, or without `overwrite` not empty."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"--output {folder} is a file: give a folder")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        found = sorted(path.name for path in folder.iterdir())[0]
        raise ValueError(
            f"--output {folder} is not empty, it has {found}: give another folder, or --overwrite, which replaces "
            f"{', '.join(FILES)} and leaves other files"
        )


def write_selection(folder: Path, selection: Selection, images: Images, settings: Mapping[str, Any]) -> None:
    """Write the files of a selection; the list comes last, when all others are complete.

    Args:
        folder: Which is made; what a former command left there is replaced.
        selection: What to write.
        images: Those of the table that was selected from.
        settings: Flags of the command, as JSON.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
    table, count = images.table, len(selection.kept)
    facts = {"images": len(table), "kept": count, "dropped": len(table) - count} | dict(selection.facts)
    if table.labels is not None:
        facts["classes, before"] = class_balance(table.labels)
        facts["classes, after"] = class_balance(table.labels[selection.kept])
    if selection.neighbors:
        _write_lines(folder / NEIGHBORS_FILE, map(_as_json, selection.neighbors))
    _write_lines(folder / DROPPED_FILE, _json_lines({"settings": settings, "facts": facts}, selection.dropped))
    title = f"{settings['command']}: {', '.join(map(str, table.folders))}"
    with atomic_write(folder / PAGE_FILE) as file:
        file.write(render_page(title, facts, selection.sections))
    write_list(folder, selection.kept, images)
    logger.info("%s kept, %d dropped: %s", counted(count, "image"), len(table) - count, folder)


def write_list(folder: Path, kept: np.ndarray, images: Images) -> None:
    """Write `images.txt`, which `ImageList` reads; of images that are no files, `indices.txt` with their positions."""
    table = images.table
    if images.are_files:
        _write_lines(folder / IMAGES_FILE, _list_lines(kept.tolist(), images))
        logger.info("to train on them: train.dataset_path=ImageList:file=%s", folder / IMAGES_FILE)
        return
    logger.warning(
        "%s is no file, so that ImageList could not read it: %s has the positions of the images in what was given to "
        "the extraction (docs/curation.md shows how to write them to files). If images are files, --root FOLDER is "
        "where their names begin",
        images.path(0),
        folder / INDICES_FILE,
    )
    _write_lines(folder / INDICES_FILE, _index_lines(kept.tolist(), table))


def _list_lines(rows: list[int], images: Images) -> Iterator[str]:
    labels = images.table.labels
    for row in rows:
        path = images.path(row)
        if re.search(r"[\t\r\n]", path):
            raise ValueError(f"{path!r} cannot be in a list of images: rename the file and extract its features again")
        yield path if labels is None else f"{path}\t{labels[row]}"


def _index_lines(rows: list[int], table: FeatureTable) -> Iterator[str]:
    """Lines of position and name; with several folders of features, before them the number of the folder."""
    for row in rows:
        number, position = table.locate(row)
        folder = [str(number)] if len(table.folders) > 1 else []
        yield "\t".join([*folder, str(position), table.names[row]])


def class_balance(labels: np.ndarray) -> dict[str, Any]:
    """How evenly images are distributed over classes, by their labels (n,).

    Returns:
        Number of classes; images of the largest and smallest; entropy of the distribution over the classes in bits.
    """
    _, counts = np.unique(labels, return_counts=True)
    shares = counts / max(1, counts.sum())
    return {
        "classes": len(counts),
        "largest": int(counts.max(initial=0)),
        "smallest": int(counts.min(initial=counts.sum())),
        "entropy in bits": round(float(-(shares * np.log2(shares)).sum()), 3) + 0.0,
    }


def _json_lines(head: Mapping[str, Any], dropped: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """The lines of a JSON file with one line for each dropped image."""
    yield json.dumps(head)[:-1] + ', "dropped": ['
    previous = None
    for each in dropped:
        if previous is not None:
            yield previous + ","
        previous = _as_json(each)
    if previous is not None:
        yield previous
    yield "]}"


def _as_json(value: Mapping[str, Any]) -> str:
    return json.dumps(value)


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    with atomic_write(path) as file:
        for line in lines:
            file.write(os.fsencode(line) + b"\n")
