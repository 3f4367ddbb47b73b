"""Alarms: signs in a run's metrics that it fails, each with advice.

The table `RULES` lists all of them. Every rule reads the records of `training_metrics.json` in order. An alarm is
raised when `patience` consecutive records that have the rule's metrics show its sign, and is over with the first one
that does not. A value that cannot inform, such as an effective rank of two images or a k-NN accuracy that guessing
reaches, raises none.
"""

import logging
from collections.abc import Callable, Collection, Sequence
from enum import StrEnum
from functools import partial
from typing import NamedTuple, Protocol

from dinov2.train.monitor import alarm_rules as rules
from dinov2.train.monitor.alarm_rules import Record

logger = logging.getLogger(__name__)

MIN_STEPS = 10  # from the first to the last record that an alarm is raised by, as single steps scatter


class AlarmKind(StrEnum):
    """How a run fails. The value is the name in logs and reports."""

    COLLAPSE = "collapse"
    DIVERGENCE = "divergence"
    DENSE_DECAY = "decay of dense features"
    DATA_STARVATION = "data starvation"

    @property
    def concerns_network(self) -> bool:
        """Whether the network is affected, and not only the speed of training."""
        return self is not AlarmKind.DATA_STARVATION


class Check(Protocol):
    """The state of one rule in one run."""

    def __call__(self, record: Record, *, warm: bool) -> str | None:
        """Describe the sign of a failure in a record that has all metrics of the rule.

        `warm`: whether the warm-up of the learning rate is over. Returns what was found; "" if nothing was, None if the
        record cannot tell.
        """
        ...


class Rule(NamedTuple):
    """One sign of one kind of failure.

    Attributes:
        kind: Kind of the alarm.
        metrics: Metrics that a record must have.
        patience: Consecutive records with the sign that raise the alarm.
        new_check: Makes the check of a run.
        advice: What to do.
        applies: Whether the values of a record are meaningful.
    """

    kind: AlarmKind
    metrics: tuple[str, ...]
    patience: int
    new_check: Callable[[], Check]
    advice: str
    applies: Callable[[Record], bool] = rules.always


_FEW_PROTOTYPES = (
    "The targets hardly distinguish images. Usual causes: the teacher's outputs are not centered or balanced (try "
    "train.centering=sinkhorn_knopp), teacher.teacher_temp is too low, or optim.base_lr is too high."
)
_ALIKE_TARGETS = (
    "Different images get the same target, so that there is nothing to learn. Check the data first (is it one image "
    "repeated?), then lower optim.base_lr, raise optim.warmup_epochs, and check that there are not many more "
    "prototypes (dino.head_n_prototypes) than rows in a batch."
)
_ONE_IMAGE = (
    "Nothing can be learned from one image. Check what train.dataset_path reads: a wrong folder, empty or black "
    "files, links that all point to one file?"
)
_ALIKE_FEATURES = (
    "Features of different images become alike. Go back to eval/best or to an earlier checkpoint, with a lower "
    "optim.base_lr or a higher teacher momentum (teacher.momentum_teacher); check that dino.koleo_loss_weight is not 0 "
    "and that the images are not near duplicates."
)
_DIVERGENCE = (
    "The optimization diverges. Lower optim.base_lr (by 3 to 10) or raise optim.warmup_epochs, check that "
    "optim.scaling_rule fits your batch, set optim.clip_grad, prefer bf16 to fp16; go back to an earlier checkpoint."
)
_DENSE_DECAY = (
    "Class tokens may still get better, but segmentation, depth and matching will get worse. Known of long runs of "
    "large models. Use an earlier teacher for dense tasks; a higher ibot.loss_weight, registers "
    "(student.num_register_tokens=4) or a shorter schedule help."
)
_DATA_STARVATION = (
    "Use more loader processes (train.num_workers) or cores, put the images on a faster disk or store them "
    "smaller, or augment on the device (train.augment_on=device)."
)

RULES = (
    Rule(
        AlarmKind.COLLAPSE,
        ("cls_target_perplexity", "cls_target_capacity"),
        patience=5,
        new_check=partial(rules.FewPrototypes, "cls"),
        advice=_FEW_PROTOTYPES,
        applies=rules.has_enough_rows,
    ),
    Rule(
        AlarmKind.COLLAPSE,
        ("patch_target_perplexity", "patch_target_capacity"),
        patience=5,
        new_check=partial(rules.FewPrototypes, "patch"),
        advice=_FEW_PROTOTYPES,
        applies=rules.has_enough_rows,
    ),
    Rule(
        AlarmKind.COLLAPSE,
        ("cls_target_information", "cls_target_capacity"),
        patience=5,
        new_check=rules.UninformativeTargets,
        advice=_ALIKE_TARGETS,
        applies=rules.has_enough_rows,
    ),
    Rule(
        AlarmKind.COLLAPSE,
        ("probe_distinct_images",),
        patience=1,
        new_check=rules.OneImage,
        advice=_ONE_IMAGE,
    ),
    Rule(
        AlarmKind.COLLAPSE,
        ("probe_cls_rank_me",),
        patience=3,
        new_check=rules.LostRank,
        advice=_ALIKE_FEATURES,
        applies=rules.has_enough_images,
    ),
    Rule(
        AlarmKind.COLLAPSE,
        ("knn",),
        patience=2,
        new_check=rules.LostAccuracy,
        advice=_ALIKE_FEATURES,
    ),
    Rule(
        AlarmKind.DIVERGENCE,
        ("total_loss", "cls_target_information"),
        patience=5,
        new_check=rules.LostLoss,
        advice=_DIVERGENCE,
        applies=rules.has_enough_rows,
    ),
    Rule(
        AlarmKind.DIVERGENCE,
        ("probe_patch_norm", "probe_patch_rank_me"),
        patience=2,
        new_check=rules.GrowingNorms,
        advice=_DIVERGENCE,
    ),
    Rule(
        AlarmKind.DENSE_DECAY,
        ("probe_patch_similarity", "probe_cls_rank_me"),
        patience=3,
        new_check=rules.SimilarPatches,
        advice=_DENSE_DECAY,
        applies=rules.has_enough_images,
    ),
    Rule(
        AlarmKind.DATA_STARVATION,
        ("data_wait", "data_time"),
        patience=5,
        new_check=rules.WaitingForData,
        advice=_DATA_STARVATION,
    ),
)


def monitored_kinds(metrics: Collection[str]) -> list[AlarmKind]:
    """The kinds of alarms that can be raised if these metrics are logged."""
    found = {rule.kind for rule in RULES if set(rule.metrics) <= set(metrics)}
    return [kind for kind in AlarmKind if kind in found]


class Alarm(NamedTuple):
    """A failure of a run, current or past: between the `first` and the `last` record with its sign."""

    kind: str  # an `AlarmKind`
    first: int  # iterations
    last: int
    over: bool  # a later record no longer has the sign
    finding: str
    advice: str


class AlarmMonitor:
    """Reads the records of a run and logs the alarms that are raised or end.

    Of `history`, the records so far, nothing is logged; alarms raised there continue.
    """

    def __init__(self, history: Sequence[Record] = ()) -> None:
        self.alarms: list[Alarm] = []
        self._checks = [(rule, rule.new_check()) for rule in RULES]
        self._signs: dict[Rule, list[int]] = {}  # iterations of consecutive records, until an alarm is raised
        self._active: dict[Rule, int] = {}  # the index of the alarm
        self._highest_lr = 0.0
        for record in history:
            self._apply_all(record)

    def update(self, record: Record) -> None:
        """Read a record and log the alarms that it raises or ends."""
        for alarm in self._apply_all(record):
            if alarm.over:
                logger.info("alarm over, since step %d: %s", int(record["iteration"]), alarm.kind)
            else:
                logger.warning("ALARM, %s: since step %d %s. %s", alarm.kind, alarm.first, alarm.finding, alarm.advice)

    def summary(self) -> str:
        """The kinds of all alarms of the run, for its last log line."""
        kinds = list(dict.fromkeys(f"{alarm.kind}{' (over)' if alarm.over else ''}" for alarm in self.alarms))
        return f"ALARMS were raised: {', '.join(kinds)}" if kinds else "no alarms"

    def _apply_all(self, record: Record) -> list[Alarm]:
        """The alarms that begin or end with a record."""
        lr = record.get("lr", 0.0)
        self._highest_lr = max(self._highest_lr, lr)
        warm = lr < self._highest_lr  # before the learning rate falls a network may not have learned anything yet
        found = [
            self._apply(rule, check(record, warm=warm), int(record["iteration"]))
            for rule, check in self._checks
            if rule.applies(record) and all(name in record for name in rule.metrics)
        ]
        return [alarm for alarm in found if alarm is not None]

    def _apply(self, rule: Rule, finding: str | None, step: int) -> Alarm | None:
        """The alarm of a rule, if it begins or ends with this finding."""
        if finding is None:
            return None
        index = self._active.get(rule)
        if not finding:
            self._signs.pop(rule, None)
            if index is None:
                return None
            del self._active[rule]
            self.alarms[index] = self.alarms[index]._replace(over=True)
            return self.alarms[index]
        if index is not None:
            self.alarms[index] = self.alarms[index]._replace(last=step, finding=finding)
            return None
        steps = self._signs.setdefault(rule, [])
        steps.append(step)
        if len(steps) < rule.patience or (rule.patience > 1 and step - steps[0] < MIN_STEPS):
            return None
        self._active[rule] = len(self.alarms)
        self.alarms.append(Alarm(rule.kind, steps[0], step, False, finding, rule.advice))
        return self.alarms[-1]


def find_alarms(records: Sequence[Record]) -> list[Alarm]:
    """The alarms of a run, in the order in which they began."""
    return sorted(AlarmMonitor(records).alarms, key=lambda alarm: alarm.first)
