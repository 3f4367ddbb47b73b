"""Which of a run's teachers to use: `eval/best` is a link to the best of the folders `eval/training_<iteration>`.

Each has a `health.json` that says by what it is judged: by default k-NN accuracy where the run has labels, else RankMe
of class tokens, which goes along with accuracy on many datasets (Garrido et al. 2022, arXiv 2210.02885) but is no
measurement of it. A k-NN accuracy that guessing reaches says nothing: such a teacher is rated by the next measure.
"""

import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from dinov2.files import atomic_write, read_json

logger = logging.getLogger(__name__)

SIGNALS = {
    "auto": ("knn", "probe_cls_rank_me"),
    "knn": ("knn",),
    "cls_rank_me": ("probe_cls_rank_me",),
    "patch_rank_me": ("probe_patch_rank_me",),
}
"""What teachers are judged by, for each choice of `health.best_by`: the first that was measured."""

_ALL_SIGNALS = {signal for signals in SIGNALS.values() for signal in signals}


class Rating(NamedTuple):
    """How good a teacher is; larger is better."""

    iteration: int
    signal: str
    value: float


def rate_teacher(folder: Path, iteration: int, measured: Mapping[str, float], best_by: str = "auto") -> None:
    """Write the rating of the teacher in `eval/training_<iteration>`, and let `eval/best` point to the best so far.

    Args:
        folder: that of the teacher.
        iteration: after which it was written.
        measured: of that iteration; without one of the signals that says something there is no rating.
        best_by: a key of `SIGNALS`.

    Raises:
        OSError: if the rating cannot be written. Where there are no links that is only said.
    """
    signal = next((name for name in SIGNALS[best_by] if _is_informative(name, measured)), None)
    if signal is None:
        if measured:
            logger.info("the teacher of step %d is not rated: no measure of %s says anything", iteration, best_by)
        return
    with atomic_write(folder / "health.json") as file:
        file.write(json.dumps(Rating(iteration, signal, measured[signal])._asdict()).encode())
    rated = {path.parent: _read(path) for path in folder.parent.glob("training_*/health.json")}
    signal = next(name for name in SIGNALS[best_by] if name in {rating.signal for rating in rated.values() if rating})
    comparable = {place: rating for place, rating in rated.items() if rating and rating.signal == signal}
    best = max(comparable, key=lambda place: (round(comparable[place].value, 3), comparable[place].iteration))
    link, made = folder.parent / "best", folder.parent / ".best"
    try:
        made.unlink(missing_ok=True)
        made.symlink_to(best.name, target_is_directory=True)
        os.replace(made, link)
    except OSError as error:
        logger.warning("cannot make the link %s to %s: %s", link, best.name, error)
    logger.info("best teacher so far: %s (%s %.4g)", best, signal, comparable[best].value)


def _is_informative(signal: str, measured: Mapping[str, float]) -> bool:
    """Whether a value was measured, and is one that training rather than chance can have brought about."""
    if signal != "knn" and measured.get("probe_distinct_images", math.inf) < 2:
        return False  # there is no rank of the features of one image
    least = measured.get("knn_chance", 0.0) if signal == "knn" else 0.0
    value = measured.get(signal, math.nan)
    return math.isfinite(value) and value > least


def _read(path: Path) -> Rating | None:
    """The rating in a file; None, with a warning, if it is damaged or cannot be read."""
    try:
        return read_rating(path)
    except (OSError, ValueError) as error:
        logger.warning("the teacher beside it is left out: %s", error)
        return None


def read_rating(path: Path) -> Rating:
    """The rating of a teacher, `health.json` in its folder `eval/training_<iteration>`.

    Raises:
        OSError: naming the file, if it cannot be read.
        ValueError: naming the file, if it is damaged.
    """
    match content := read_json(path):
        case {"iteration": int(iteration), "signal": str(signal), "value": int() | float() as value}:
            number = float(value) if abs(value) < 1e300 else math.nan
            folder = path.resolve().parent.name
            if signal in _ALL_SIGNALS and math.isfinite(number) and folder in (f"training_{iteration}", "best"):
                return Rating(iteration, signal, number)
    raise ValueError(f"{path} is damaged: it is no rating of the teacher in its folder: {str(content)[:100]}")
