"""The best teacher of a run: `eval/best` links to the best of the folders `eval/training_<iteration>` and `eval/start`.

Each folder has a `health.json` with the rating of its teacher: by default k-NN accuracy where the run has labels, else
RankMe of class tokens, which correlates with accuracy on many datasets (Garrido et al. 2022, arXiv 2210.02885) but does
not measure it. A value that guessing reaches is not informative: then the next metric is used.
"""

import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from dinov2.files import atomic_write, read_json
from dinov2.train.monitor.starting_point import START, START_FOLDER

logger = logging.getLogger(__name__)

SIGNALS = {
    "auto": ("knn", "probe_cls_rank_me"),
    "knn": ("knn",),
    "patch_knn_miou": ("patch_knn_miou",),
    "cls_rank_me": ("probe_cls_rank_me",),
    "patch_rank_me": ("probe_patch_rank_me",),
}
"""Metrics that rate a teacher, for each choice of `health.best_by`; the first informative one is used."""

_CHANCE = {"knn": "knn_chance", "patch_knn_miou": "patch_knn_chance"}
"""For the metrics that need labels, that of guessing."""

_ALL_SIGNALS = {signal for signals in SIGNALS.values() for signal in signals}


class Rating(NamedTuple):
    """The rating of the teacher that was saved after an iteration: the value of a metric; larger is better."""

    iteration: int
    signal: str
    value: float


def rate_teacher(folder: Path, iteration: int, measured: Mapping[str, float], best_by: str = "auto") -> None:
    """Write the rating of the teacher in its `folder` of `eval`, and link `eval/best` to the best so far.

    Of the metrics `measured` in that iteration, those of `SIGNALS[best_by]` are used; without an informative one there
    is no rating.
    """
    signal = next((name for name in SIGNALS[best_by] if _is_informative(name, measured)), None)
    if signal is None:
        if measured:
            logger.info("the teacher of step %d is not rated: no metric of %s is informative", iteration, best_by)
        return
    with atomic_write(folder / "health.json") as file:
        file.write(json.dumps(Rating(iteration, signal, measured[signal])._asdict()).encode())
    files = [path for pattern in ("training_*", START_FOLDER) for path in folder.parent.glob(f"{pattern}/health.json")]
    rated = {path.parent: _read(path) for path in files}
    signal = next(name for name in SIGNALS[best_by] if name in {rating.signal for rating in rated.values() if rating})
    comparable = {path: rating for path, rating in rated.items() if rating and rating.signal == signal}
    best = max(comparable, key=lambda path: _preference(comparable[path]))
    link, new_link = folder.parent / "best", folder.parent / ".best"
    try:
        new_link.unlink(missing_ok=True)
        new_link.symlink_to(best.name, target_is_directory=True)
        os.replace(new_link, link)
    except OSError as error:
        logger.warning("cannot create the link %s to %s: %s", link, best.name, error)
    logger.info("best teacher so far: %s (%s %.4g)", best, signal, comparable[best].value)


def _preference(rating: Rating) -> tuple[float, float]:
    """Sorts ratings: of equal values the later teacher is preferred, but the starting model to all of them."""
    return round(rating.value, 3), math.inf if rating.iteration == START else rating.iteration


def _is_informative(signal: str, measured: Mapping[str, float]) -> bool:
    """Whether a value was measured, and is better than chance."""
    if signal not in _CHANCE and measured.get("probe_distinct_images", math.inf) < 2:
        return False  # the features of one image have no rank
    least = measured.get(_CHANCE[signal], 0.0) if signal in _CHANCE else 0.0
    value = measured.get(signal, math.nan)
    return math.isfinite(value) and value > least


def _read(path: Path) -> Rating | None:
    """The rating in a file; None, with a warning, if it is damaged or cannot be read."""
    try:
        return read_rating(path)
    except (OSError, ValueError) as error:
        logger.warning("the teacher in that folder is left out: %s", error)
        return None


def read_rating(path: Path) -> Rating:
    """Read the rating of a teacher, `health.json` in its folder; a ValueError that names the file if it is damaged."""
    match content := read_json(path):
        case {"iteration": int(iteration), "signal": str(signal), "value": int() | float() as value}:
            number = float(value) if abs(value) < 1e300 else math.nan
            folder = path.resolve().parent.name
            own = START_FOLDER if iteration == START else f"training_{iteration}"
            if signal in _ALL_SIGNALS and math.isfinite(number) and folder in (own, "best"):
                return Rating(iteration, signal, number)
    raise ValueError(f"{path} is damaged: not a rating of the teacher in its folder: {str(content)[:100]}")


def best_rating(output_dir: Path) -> Rating | None:
    """The rating of the teacher that `eval/best` of a run links to; None if there is none, or it is damaged."""
    path = output_dir / "eval" / "best" / "health.json"
    return _read(path) if path.exists() else None
