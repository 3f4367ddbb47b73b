"""What an alarm is raised by: one class for each sign of a failure.

A rule compares the run with itself: what values are normal depends on recipe, data and model. The limits were chosen on
small runs, healthy ones and runs made to fail in known ways (`tests/train/monitor`).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from enum import StrEnum

from dinov2.train.monitor.starting_point import START

Record = Mapping[str, float]

MIN_ROWS = 16  # of targets; fewer can be alike by chance
MIN_IMAGES = 8  # of the probe; fewer can have similar features by chance
ALL_ALIKE_RANK = 1.1  # an effective rank below which all images have the same features


class AlarmKind(StrEnum):
    """How a run fails. The value is the name in logs and reports."""

    COLLAPSE = "collapse"
    DIVERGENCE = "divergence"
    DENSE_DECAY = "decay of dense features"
    BELOW_START = "worse than the starting model"
    DATA_BOTTLENECK = "data bottleneck"

    @property
    def concerns_network(self) -> bool:
        """Whether the network is affected, and not only the speed of training."""
        return self is not AlarmKind.DATA_BOTTLENECK


class Rule(ABC):
    """One sign of one kind of failure; an instance keeps what it needs of the earlier records of a run."""

    kind: AlarmKind
    metrics: tuple[str, ...]  # that a record must have
    patience: int  # consecutive records with the sign that raise the alarm
    advice: str
    min_rows: int | None = None  # of targets, and
    min_images: int | None = None  # of the probe, for which the values of a record are meaningful; None: any

    def applies(self, record: Record) -> bool:
        """Whether a record has the metrics, with meaningful values."""
        if self.min_rows is not None and record.get("cls_target_capacity", math.inf) < math.log(self.min_rows):
            return False
        counts = [record.get(f"probe_{kind}images", math.inf) for kind in ("", "distinct_")]
        if self.min_images is not None and min(counts) < self.min_images:
            return False
        return all(name in record for name in self.metrics)

    @abstractmethod
    def check(self, record: Record, *, warm: bool) -> str | None:
        """Describe the sign of a failure in a record; "" if there is none, None if the record does not show it.

        `warm`: whether the warm-up of the learning rate is over.
        """


class FewPrototypes(Rule):
    """All images of a batch are assigned to very few prototypes."""

    kind, patience, min_rows = AlarmKind.COLLAPSE, 5, MIN_ROWS
    metrics = ("cls_target_perplexity", "cls_target_capacity")
    title = "class"
    advice = (
        "The targets hardly distinguish images. Usual causes: the teacher's outputs are not centered or balanced (try "
        "train.centering=sinkhorn_knopp), teacher.teacher_temp is too low, or optim.base_lr is too high."
    )
    LIMIT = 0.25  # of the maximal entropy; two of 128 prototypes: 0.14

    def check(self, record: Record, *, warm: bool) -> str | None:
        perplexity, capacity = (record[name] for name in self.metrics)
        if capacity < math.log(MIN_ROWS):
            return None
        if math.log(max(perplexity, 1.0)) >= self.LIMIT * capacity:
            return ""
        share = record.get(self.metrics[0].replace("target_perplexity", "largest_prototype"), math.nan)
        return (
            f"the {self.title} targets of a whole batch use {perplexity:.1f} prototypes; "
            f"{share:.0%} of them have the same largest entry"
        )


class FewPrototypesOfPatches(FewPrototypes):
    """The same of masked patches."""

    metrics = ("patch_target_perplexity", "patch_target_capacity")
    title = "patch"


class UninformativeTargets(Rule):
    """Targets no longer depend on their image, though they did before, or though the warm-up is over."""

    kind, patience, min_rows = AlarmKind.COLLAPSE, 5, MIN_ROWS
    metrics = ("cls_target_information", "cls_target_capacity")
    advice = (
        "Different images get the same target, so that there is nothing to learn. Check the data first (is it one "
        "image repeated?), then lower optim.base_lr, raise optim.warmup_epochs, and check that there are not many more "
        "prototypes (dino.head_n_prototypes) than rows in a batch."
    )
    LIMIT = 0.01  # of the maximal information
    highest = 0.0

    def check(self, record: Record, *, warm: bool) -> str | None:
        information, capacity = (record[name] for name in self.metrics)
        share = information / capacity
        self.highest = max(self.highest, share)
        if share >= self.LIMIT or not (warm or self.highest > 5 * self.LIMIT):
            return ""
        return f"targets carry {information:.3f} of at most {capacity:.1f} nats of information about their image"


class OneImage(Rule):
    """All probe images are the same."""

    kind, patience, metrics = AlarmKind.COLLAPSE, 1, ("probe_distinct_images",)
    advice = (
        "Nothing can be learned from one image. Check what train.dataset_path reads: a wrong folder, empty or black "
        "files, links that all point to one file?"
    )

    def check(self, record: Record, *, warm: bool) -> str | None:
        identical = record["probe_distinct_images"] <= 1
        return "all probe images, evenly spread over the dataset, are identical" if identical else ""


class AlikeFeatures(Rule):
    """What is common to the signs that features no longer distinguish images."""

    kind = AlarmKind.COLLAPSE
    advice = (
        "Features of different images become alike. Go back to eval/best or to an earlier checkpoint, with a lower "
        "optim.base_lr or a higher teacher momentum (teacher.momentum_teacher); check that dino.koleo_loss_weight is "
        "not 0 and that the images are not near duplicates."
    )
    highest = 0.0


class LostRank(AlikeFeatures):
    """The features of different images span ever fewer directions."""

    patience, metrics, min_images = 3, ("probe_cls_rank_me",), MIN_IMAGES
    LOST = 0.4

    def check(self, record: Record, *, warm: bool) -> str | None:
        rank = record["probe_cls_rank_me"]
        self.highest = max(self.highest, rank)
        if rank < self.LOST * self.highest:
            return f"the effective rank of the class tokens (RankMe) fell from {self.highest:.1f} to {rank:.1f}"
        if warm and rank < ALL_ALIKE_RANK:
            return f"the class tokens of different images are nearly equal: effective rank (RankMe) {rank:.2f}"
        return ""


class LostAccuracy(AlikeFeatures):
    """The k-NN accuracy falls."""

    patience, metrics = 2, ("knn",)
    LOST = 0.75

    def check(self, record: Record, *, warm: bool) -> str | None:
        accuracy = record["knn"]
        self.highest = max(self.highest, accuracy)
        if accuracy > self.LOST * self.highest or self.highest <= record.get("knn_chance", 0.0):
            return ""  # the latter was never better than guessing
        return f"the k-NN accuracy fell from {self.highest:.0f} to {accuracy:.0f} %"


class Divergence(Rule):
    """What is common to the signs of divergence."""

    kind = AlarmKind.DIVERGENCE
    advice = (
        "The optimization diverges. Lower optim.base_lr (by 3 to 10) or raise optim.warmup_epochs, check that "
        "optim.scaling_rule fits your batch, set optim.clip_grad, prefer bf16 to fp16; go back to an earlier "
        "checkpoint."
    )


class LostLoss(Divergence):
    """The loss rises again, and not because targets become more informative, which centering does to them at first."""

    patience, metrics, min_rows = 5, ("total_loss", "cls_target_information"), MIN_ROWS
    LOST, GAINED = 0.5, 0.02
    INFORMATION_LOST = 0.6
    first: float | None = None
    lowest, most_information = math.inf, 0.0

    def check(self, record: Record, *, warm: bool) -> str | None:
        loss, information = (record[name] for name in self.metrics)
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


class GrowingNorms(Divergence):
    """Patch tokens grow without becoming better."""

    patience, metrics = 2, ("probe_patch_norm", "probe_patch_rank_me")
    GROWN, LOST = 5.0, 0.6
    smallest, highest = math.inf, 0.0

    def check(self, record: Record, *, warm: bool) -> str | None:
        norm, rank = (record[name] for name in self.metrics)
        self.smallest, self.highest = min(self.smallest, norm), max(self.highest, rank)
        if norm < self.GROWN * self.smallest or rank > self.LOST * self.highest:
            return ""
        return (
            f"the norm of patch tokens grew from {self.smallest:.0f} to {norm:.0f} while their effective rank fell "
            f"from {self.highest:.0f} to {rank:.0f}"
        )


class SimilarPatches(Rule):
    """Patches of an image become similar while its class token stays good.

    Where segmentation by k-NN is measured and better than guessing, `LostSegmentation` decides instead: patches of one
    object may become alike because they are understood.
    """

    kind, patience, min_images = AlarmKind.DENSE_DECAY, 3, MIN_IMAGES
    metrics = ("probe_patch_similarity", "probe_cls_rank_me")
    advice = (
        "Class tokens may still get better, but segmentation, depth and matching will get worse. Known of long runs of "
        "large models. Use an earlier teacher for dense tasks; a higher ibot.loss_weight, registers "
        "(student.num_register_tokens=4) or a shorter schedule help."
    )
    RISEN = 0.25  # of the distance from the lowest value to 1
    CLASS_RANK_KEPT = 0.8  # else all features decay, which is another alarm
    lowest, highest_rank = 1.0, 0.0
    is_measured_by_labels = False

    def check(self, record: Record, *, warm: bool) -> str | None:
        if record.get("patch_knn_miou", 0.0) > record.get("patch_knn_chance", 0.0):
            self.is_measured_by_labels = True
        if self.is_measured_by_labels:
            return ""
        similarity, rank = (record[name] for name in self.metrics)
        self.lowest, self.highest_rank = min(self.lowest, similarity), max(self.highest_rank, rank)
        rising = similarity > self.lowest + self.RISEN * (1 - self.lowest)
        if not rising or rank < self.CLASS_RANK_KEPT * self.highest_rank:
            return ""
        return f"the mean similarity of two patches of an image rose from {self.lowest:.2f} to {similarity:.2f}"


class LostSegmentation(Rule):
    """Segmentation by k-NN of patches gets worse than its best while class tokens stay good.

    A fall is clear if it exceeds two standard errors of the best value, those of another draw of images. As all
    measurements are of the same images, their differences vary less than that.
    """

    kind, patience = AlarmKind.DENSE_DECAY, 3
    metrics = ("patch_knn_miou", "patch_knn_error", "probe_cls_rank_me")
    advice = (
        "Class tokens are still good, but segmentation, depth and matching get worse. Use an earlier teacher for dense "
        "tasks; with health.best_by=patch_knn_miou eval/best is the best one for them. A shorter schedule "
        "(optim.epochs), a higher ibot.loss_weight or registers (student.num_register_tokens=4) help."
    )
    best, limit = -math.inf, -math.inf
    at_best: Record = {}

    def check(self, record: Record, *, warm: bool) -> str | None:
        value, error, _ = (record[name] for name in self.metrics)
        if value > max(self.best, record.get("patch_knn_chance", 0.0)):
            self.best, self.limit, self.at_best = value, value - 2 * error, record
        if not value < self.limit or not self._class_tokens_hold(record):
            return ""
        return f"the mean IoU of segmentation by k-NN of patches fell from {self.best:.1f} to {value:.1f} %"

    def _class_tokens_hold(self, record: Record) -> bool:
        """Whether class tokens are as good as with the best patches: else all features decay, another alarm."""
        former, now = self.at_best.get("knn", 0.0), record.get("knn", 0.0)
        if now > record.get("knn_chance", 0.0):
            return now >= former - 2 * math.sqrt(former * (100 - former) / record.get("knn_images", math.inf))
        return record["probe_cls_rank_me"] >= SimilarPatches.CLASS_RANK_KEPT * self.at_best["probe_cls_rank_me"]


class BelowStart(Rule):
    """A run from weights has become worse than the model that it started from, and does not recover."""

    kind, patience = AlarmKind.BELOW_START, 3
    advice = (
        "Training destroys what the weights had learned; eval/start is better. Usual causes: optim.base_lr is too high "
        "or the backbone learns before the new heads do. Lower the rate (by 3 to 10), raise "
        "optim.freeze_backbone_steps and optim.backbone_warmup_steps, set optim.layerwise_decay=0.9, use more images."
    )
    start: float | None = None

    def check(self, record: Record, *, warm: bool) -> str | None:
        value = record[self.metrics[0]]
        if record["iteration"] == START:
            self.start = value
        if self.start is None:
            return None
        return self.finding(value, self.start, record) if value < self.limit(self.start, record) else ""

    @abstractmethod
    def limit(self, start: float, record: Record) -> float:
        """The value below which the run is worse."""

    @abstractmethod
    def finding(self, value: float, start: float, record: Record) -> str:
        """Describe a value below the limit."""


class LessAccurateThanStart(BelowStart):
    """The k-NN accuracy is below that of the starting model by more than its standard error twice."""

    metrics = ("knn", "knn_images", "drift_cls_cosine")

    def limit(self, start: float, record: Record) -> float:
        if start <= record.get("knn_chance", 0.0):
            return -math.inf  # there was nothing to lose
        return start - 2 * math.sqrt(start * (100 - start) / record["knn_images"])

    def finding(self, value: float, start: float, record: Record) -> str:
        return f"the k-NN accuracy is {value:.1f} %, that of the starting model {start:.1f} %"


class WorseSegmentationThanStart(BelowStart):
    """Segmentation by k-NN of patches is below that of the starting model by more than its standard error twice."""

    metrics = ("patch_knn_miou", "patch_knn_error", "drift_cls_cosine")
    start_error = 0.0

    def limit(self, start: float, record: Record) -> float:
        if record["iteration"] == START:
            self.start_error = record["patch_knn_error"]
        return start - 2 * self.start_error if start > record.get("patch_knn_chance", 0.0) else -math.inf

    def finding(self, value: float, start: float, record: Record) -> str:
        return f"the mean IoU of k-NN of patches is {value:.1f} %, that of the starting model {start:.1f} %"


class LowerRankThanStart(BelowStart):
    """The effective rank of class tokens is far below that of the starting model, whether there are labels or not."""

    metrics, min_images = ("probe_cls_rank_me", "drift_cls_cosine"), MIN_IMAGES
    LOST = 0.6

    def limit(self, start: float, record: Record) -> float:
        return self.LOST * start

    def finding(self, value: float, start: float, record: Record) -> str:
        return f"the effective rank of the class tokens (RankMe) is {value:.1f}, that of the starting model {start:.1f}"


class WaitingForData(Rule):
    """Steps wait for their images."""

    kind, patience, metrics = AlarmKind.DATA_BOTTLENECK, 5, ("data_wait", "data_time")
    advice = (
        "Use more loader processes (train.num_workers) or cores, put the images on a faster disk or store them "
        "smaller, or augment on the device (train.augment_on=device)."
    )
    LIMIT, START = 0.4, 40  # share of the time; steps in which the loader workers start
    MIN_SECONDS = 0.005  # a step; less is negligible
    first: float | None = None

    def check(self, record: Record, *, warm: bool) -> str | None:
        self.first = record["iteration"] if self.first is None else self.first
        share, seconds = (record[name] for name in self.metrics)
        if record["iteration"] < self.first + self.START:
            return None
        if share < self.LIMIT or seconds < self.MIN_SECONDS:
            return ""
        return f"steps spend {share:.0%} of their time waiting for images ({seconds:.2f} s a step)"


RULES = (
    *(FewPrototypes, FewPrototypesOfPatches, UninformativeTargets, OneImage, LostRank, LostAccuracy, LostLoss),
    *(GrowingNorms, SimilarPatches, LostSegmentation, LessAccurateThanStart, WorseSegmentationThanStart),
    *(LowerRankThanStart, WaitingForData),
)
