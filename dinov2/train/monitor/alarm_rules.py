"""What an alarm is raised by: one class for each sign of a failure, which keeps what it needs of earlier records.

A rule is called with every record that has its metrics (see the table in `alarms.py`) and compares the run with itself:
what values are normal depends on recipe, data and model. The limits were chosen on small runs, healthy ones and runs
made to fail in known ways (`tests/train/monitor`).
"""

import math
from collections.abc import Mapping

Record = Mapping[str, float]

MIN_ROWS = 16  # of targets; fewer can be alike by chance
MIN_IMAGES = 8  # of the probe; fewer can have similar features by chance
ALL_ALIKE_RANK = 1.1  # an effective rank below which all images have the same features


def has_enough_rows(record: Record) -> bool:
    """Whether the batch and the prototypes are large enough for statistics of the targets to be meaningful."""
    return record.get("cls_target_capacity", math.inf) >= math.log(MIN_ROWS)


def has_enough_images(record: Record) -> bool:
    """Whether the probe has enough images for the rank of their features to be meaningful."""
    return min(record.get(f"probe_{kind}images", math.inf) for kind in ("", "distinct_")) >= MIN_IMAGES


def always(_: Record) -> bool:
    """A rule without such a condition."""
    return True


class FewPrototypes:
    """All images of a batch are assigned to very few prototypes."""

    LIMIT = 0.25  # of the maximal entropy; two of 128 prototypes: 0.14
    NAMES = {"cls": "class", "patch": "patch"}

    def __init__(self, targets: str) -> None:
        self.targets = targets

    def __call__(self, record: Record, *, warm: bool) -> str | None:
        perplexity, capacity = (record[f"{self.targets}_target_{name}"] for name in ("perplexity", "capacity"))
        if capacity < math.log(MIN_ROWS):
            return None
        if math.log(max(perplexity, 1.0)) >= self.LIMIT * capacity:
            return ""
        share = record.get(f"{self.targets}_largest_prototype", math.nan)
        return (
            f"the {self.NAMES[self.targets]} targets of a whole batch use {perplexity:.1f} prototypes; "
            f"{share:.0%} of them have the same largest entry"
        )


class UninformativeTargets:
    """Targets no longer depend on their image, though they did before, or though the warm-up is over."""

    LIMIT = 0.01  # of the maximal information

    def __init__(self) -> None:
        self.highest = 0.0

    def __call__(self, record: Record, *, warm: bool) -> str | None:
        information, capacity = record["cls_target_information"], record["cls_target_capacity"]
        share = information / capacity
        self.highest = max(self.highest, share)
        if share >= self.LIMIT or not (warm or self.highest > 5 * self.LIMIT):
            return ""
        return f"targets carry {information:.3f} of at most {capacity:.1f} nats of information about their image"


class OneImage:
    """All probe images are the same."""

    def __call__(self, record: Record, *, warm: bool) -> str | None:
        identical = record["probe_distinct_images"] <= 1
        return "all probe images, evenly spread over the dataset, are identical" if identical else ""


class LostRank:
    """The features of different images span ever fewer directions."""

    LOST = 0.4

    def __init__(self) -> None:
        self.highest = 0.0

    def __call__(self, record: Record, *, warm: bool) -> str | None:
        rank = record["probe_cls_rank_me"]
        self.highest = max(self.highest, rank)
        if rank < self.LOST * self.highest:
            return f"the effective rank of the class tokens (RankMe) fell from {self.highest:.1f} to {rank:.1f}"
        if warm and rank < ALL_ALIKE_RANK:
            return f"the class tokens of different images are nearly equal: effective rank (RankMe) {rank:.2f}"
        return ""


class LostAccuracy:
    """The k-NN accuracy falls."""

    LOST = 0.75

    def __init__(self) -> None:
        self.highest = 0.0

    def __call__(self, record: Record, *, warm: bool) -> str | None:
        accuracy = record["knn"]
        self.highest = max(self.highest, accuracy)
        if accuracy > self.LOST * self.highest or self.highest <= record.get("knn_chance", 0.0):
            return ""  # the latter was never better than guessing
        return f"the k-NN accuracy fell from {self.highest:.0f} to {accuracy:.0f} %"


class LostLoss:
    """The loss rises again, and not because targets become more informative, which centering does to them at first."""

    LOST, GAINED = 0.5, 0.02
    INFORMATION_LOST = 0.6

    def __init__(self) -> None:
        self.first: float | None = None
        self.lowest = math.inf
        self.most_information = 0.0

    def __call__(self, record: Record, *, warm: bool) -> str | None:
        loss, information = record["total_loss"], record["cls_target_information"]
        self.first = loss if self.first is None else self.first
        self.lowest, self.most_information = min(self.lowest, loss), max(self.most_information, information)
        gained, lost = self.first - self.lowest, loss - self.lowest
        if (
            gained < self.GAINED * abs(self.first)
            or lost < self.LOST * gained
            or information > self.INFORMATION_LOST * self.most_information
        ):
            return ""
        return (
            f"the loss fell from {self.first:.2f} to {self.lowest:.2f} and is back at {loss:.2f}, while targets carry "
            "less and less information about their images"
        )


class GrowingNorms:
    """Patch tokens grow without becoming better."""

    GROWN, LOST = 5.0, 0.6

    def __init__(self) -> None:
        self.smallest, self.highest = math.inf, 0.0

    def __call__(self, record: Record, *, warm: bool) -> str | None:
        norm, rank = record["probe_patch_norm"], record["probe_patch_rank_me"]
        self.smallest, self.highest = min(self.smallest, norm), max(self.highest, rank)
        if norm < self.GROWN * self.smallest or rank > self.LOST * self.highest:
            return ""
        return (
            f"the norm of patch tokens grew from {self.smallest:.0f} to {norm:.0f} while their effective rank fell "
            f"from {self.highest:.0f} to {rank:.0f}"
        )


class SimilarPatches:
    """Patches of an image become similar while its class token stays good."""

    RISEN = 0.25  # of the distance from the lowest value to 1
    CLASS_RANK_KEPT = 0.8  # else all features decay, which is another alarm

    def __init__(self) -> None:
        self.lowest, self.highest_rank = 1.0, 0.0

    def __call__(self, record: Record, *, warm: bool) -> str | None:
        similarity, rank = record["probe_patch_similarity"], record["probe_cls_rank_me"]
        self.lowest, self.highest_rank = min(self.lowest, similarity), max(self.highest_rank, rank)
        rising = similarity > self.lowest + self.RISEN * (1 - self.lowest)
        if not rising or rank < self.CLASS_RANK_KEPT * self.highest_rank:
            return ""
        return f"the mean similarity of two patches of an image rose from {self.lowest:.2f} to {similarity:.2f}"


class WaitingForData:
    """Steps wait for their images."""

    LIMIT, START = 0.4, 40  # share of the time; steps in which the loader workers start
    MIN_SECONDS = 0.005  # a step; less is negligible

    def __init__(self) -> None:
        self.first: float | None = None

    def __call__(self, record: Record, *, warm: bool) -> str | None:
        self.first = record["iteration"] if self.first is None else self.first
        share, seconds = record["data_wait"], record["data_time"]
        if record["iteration"] < self.first + self.START:
            return None
        if share < self.LIMIT or seconds < self.MIN_SECONDS:
            return ""
        return f"steps spend {share:.0%} of their time waiting for images ({seconds:.2f} s a step)"
