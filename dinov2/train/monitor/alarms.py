"""What a run's numbers mean: alarms in plain words, each with what to do about it.

Every rule hears the records of `training_metrics.json` one after the other and finds something or not. An alarm begins
when it has found something in `patience` records in a row that it could judge, and is over with the first one in which
it does not. Rules compare a run with itself: what numbers are normal depends on recipe, data and size. The limits were
chosen on small runs, healthy ones and such made to fail in known ways (`tests/train/monitor`). A number that
cannot inform, such as an effective rank of two images or a k-NN accuracy that guessing reaches, raises none.
"""

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple

logger = logging.getLogger(__name__)

Record = Mapping[str, float]


class Alarm(NamedTuple):
    """Something is wrong with a run, or was."""

    kind: str  # collapse | diverging | starved by data | dense features decaying
    first: int  # iteration of the first record that says so
    last: int  # and of the last one
    over: bool  # whether a later record no longer does
    finding: str  # what was seen
    advice: str  # what to do


class Rule(ABC):
    """One sign of one kind of failure. `judge` may keep what it needs of former records."""

    kind: str
    advice: str
    patience: int

    @abstractmethod
    def judge(self, record: Record) -> str | None:
        """What is wrong, in words; '' if nothing is, None if this record cannot tell."""


class FewPrototypes(Rule):
    """All images of a batch are assigned to very few prototypes."""

    kind = "collapse"
    advice = (
        "The targets hardly tell images apart. Usual causes: the teacher's outputs are not centered or balanced (try "
        "train.centering=sinkhorn_knopp), teacher.teacher_temp too low, or optim.base_lr too high."
    )
    patience = 5
    LIMIT = 0.25  # of the entropy that there could be; two of 128 prototypes: 0.14

    def __init__(self, targets: str) -> None:
        self.targets = targets

    def judge(self, record: Record) -> str | None:
        perplexity, capacity = (record.get(f"{self.targets}_target_{name}") for name in ("perplexity", "capacity"))
        if perplexity is None or capacity is None or has_few_rows(record) or capacity < math.log(MIN_ROWS):
            return None
        if math.log(max(perplexity, 1.0)) >= self.LIMIT * capacity:
            return ""
        share = record.get(f"{self.targets}_largest_prototype", math.nan)
        return (
            f"the {WORDS[self.targets]} targets of a whole batch are spread over {perplexity:.1f} prototypes; "
            f"{share:.0%} of the rows have the same largest one"
        )


class AlikeTargets(Rule):
    """Targets say next to nothing about their image, though they did, or though the warm-up is over."""

    kind = "collapse"
    advice = (
        "Different images get the same target, so that there is nothing to learn. Look at the data first (is it one "
        "image over and over?), then lower optim.base_lr, raise optim.warmup_epochs, and check that there are not many "
        "more prototypes (dino.head_n_prototypes) than rows in a batch."
    )
    patience = 5
    LIMIT = 0.01  # of the information that there could be

    def __init__(self) -> None:
        self.warm_up = WarmUp()
        self.most = 0.0

    def judge(self, record: Record) -> str | None:
        information, capacity = record.get("cls_target_information"), record.get("cls_target_capacity")
        warm = self.warm_up.is_over(record)
        if information is None or capacity is None or has_few_rows(record):
            return None
        share = information / capacity
        self.most = max(self.most, share)
        if share >= self.LIMIT or not (warm or self.most > 5 * self.LIMIT):
            return ""
        return f"the targets tell {information:.3f} of at most {capacity:.1f} nats about which image they are of"


class OneImage(Rule):
    """There is but one image."""

    kind = "collapse"
    advice = (
        "Nothing can be learnt from one image over and over. Look at what train.dataset_path reads: a wrong folder, "
        "empty or black files, links that all point to one file?"
    )
    patience = 1

    def judge(self, record: Record) -> str | None:
        distinct = record.get("probe_distinct_images")
        if distinct is None:
            return None
        return "" if distinct > 1 else "all images that were looked at, evenly spread over the dataset, are the same"


class LostRank(Rule):
    """The features of different images lie in ever fewer directions."""

    kind = "collapse"
    advice = (
        "Features of different images become alike. Go back to eval/best or to a checkpoint before this began, with a "
        "lower optim.base_lr or a higher teacher momentum (teacher.momentum_teacher); check that "
        "dino.koleo_loss_weight is not 0 and that the images are not near duplicates."
    )
    patience = 3
    LOST, ALL_ALIKE = 0.4, 1.1

    def __init__(self) -> None:
        self.warm_up = WarmUp()
        self.highest = 0.0

    def judge(self, record: Record) -> str | None:
        warm, rank = self.warm_up.is_over(record), record.get("probe_cls_rank_me")
        if rank is None or has_few_images(record):
            return None
        self.highest = max(self.highest, rank)
        if rank < self.LOST * self.highest:
            return f"the effective rank of the class tokens (RankMe) fell from {self.highest:.1f} to {rank:.1f}"
        if warm and rank < self.ALL_ALIKE:
            return f"the class tokens of different images are all but the same: effective rank (RankMe) {rank:.2f}"
        return ""


class LostAccuracy(Rule):
    """k-NN gets worse."""

    kind = "collapse"
    advice = LostRank.advice
    patience = 2
    LOST = 0.75

    def __init__(self) -> None:
        self.highest = 0.0

    def judge(self, record: Record) -> str | None:
        accuracy = record.get("knn")
        if accuracy is None:
            return None
        self.highest = max(self.highest, accuracy)
        if accuracy > self.LOST * self.highest or self.highest <= record.get("knn_chance", 0.0):
            return ""  # or never was more than guessing
        return f"the k-NN accuracy fell from {self.highest:.0f} to {accuracy:.0f} %"


class LostLoss(Rule):
    """The loss goes back up, and not because targets get richer, which is what centering does to them at first."""

    kind = "diverging"
    advice = (
        "The optimization runs away. Lower optim.base_lr (by 3 to 10) or raise optim.warmup_epochs, mind that "
        "optim.scaling_rule fits your batch, set optim.clip_grad, prefer bf16 to fp16; go back to a checkpoint."
    )
    patience = 5
    LOST, WON = 0.5, 0.02
    INFORMATION_LOST = 0.6

    def __init__(self) -> None:
        self.first: float | None = None
        self.lowest = math.inf
        self.most = 0.0

    def judge(self, record: Record) -> str | None:
        loss, information = record.get("total_loss"), record.get("cls_target_information")
        if loss is None or information is None or has_few_rows(record):
            return None
        self.first = loss if self.first is None else self.first
        self.lowest, self.most = min(self.lowest, loss), max(self.most, information)
        won, lost = self.first - self.lowest, loss - self.lowest
        if (
            won < self.WON * abs(self.first)
            or lost < self.LOST * won
            or information > self.INFORMATION_LOST * self.most
        ):
            return ""
        return (
            f"the loss fell from {self.first:.2f} to {self.lowest:.2f} and is at {loss:.2f} again, while targets tell "
            f"ever less about their images"
        )


class Exploding(Rule):
    """Tokens grow without becoming better."""

    kind = "diverging"
    advice = LostLoss.advice
    patience = 2
    GROWN, LOST = 5.0, 0.6

    def __init__(self) -> None:
        self.smallest, self.highest = math.inf, 0.0

    def judge(self, record: Record) -> str | None:
        norm, rank = record.get("probe_patch_norm"), record.get("probe_patch_rank_me")
        if norm is None or rank is None:
            return None
        self.smallest, self.highest = min(self.smallest, norm), max(self.highest, rank)
        if norm < self.GROWN * self.smallest or rank > self.LOST * self.highest:
            return ""
        return (
            f"patch tokens grew from a length of {self.smallest:.0f} to {norm:.0f} while their effective rank fell "
            f"from {self.highest:.0f} to {rank:.0f}"
        )


class DecayingPatches(Rule):
    """Patches of an image become alike while its class token stays good."""

    kind = "dense features decaying"
    advice = (
        "Class tokens may still get better, but segmentation, depth and matching will get worse. Known of long runs of "
        "large models. Use an earlier teacher for dense tasks; a higher ibot.loss_weight, registers "
        "(student.num_register_tokens=4) or a shorter schedule help."
    )
    patience = 3
    RISEN = 0.25  # of the way from its lowest value to 1
    CLASS_RANK_KEPT = 0.8  # else everything decays, which is another alarm

    def __init__(self) -> None:
        self.lowest, self.highest_rank = 1.0, 0.0

    def judge(self, record: Record) -> str | None:
        similarity, rank = record.get("probe_patch_similarity"), record.get("probe_cls_rank_me")
        if similarity is None or rank is None or has_few_images(record):
            return None
        self.lowest, self.highest_rank = min(self.lowest, similarity), max(self.highest_rank, rank)
        rising = similarity > self.lowest + self.RISEN * (1 - self.lowest)
        if not rising or rank < self.CLASS_RANK_KEPT * self.highest_rank:
            return ""
        return f"the mean similarity of two patches of an image rose from {self.lowest:.2f} to {similarity:.2f}"


class Starved(Rule):
    """Steps wait for their images."""

    kind = "starved by data"
    advice = (
        "Give the loading more processes (train.num_workers) or cores, put the images on a faster disk or store them "
        "smaller, or let the device cut the crops (train.augment_on=device)."
    )
    patience = 5
    LIMIT, BEGINNING = 0.4, 40  # steps, in which loading gets under way
    MIN_SECONDS = 0.005  # a step; less is no loss

    def __init__(self) -> None:
        self.first: float | None = None

    def judge(self, record: Record) -> str | None:
        self.first = record["iteration"] if self.first is None else self.first
        share, seconds = record.get("data_wait"), record.get("data_time")
        if share is None or seconds is None or record["iteration"] < self.first + self.BEGINNING:
            return None
        if share < self.LIMIT or seconds < self.MIN_SECONDS:
            return ""
        return f"{share:.0%} of the time goes into waiting for images ({seconds:.2f} s a step)"


class WarmUp:
    """Whether the learning rate has begun to fall: before that a network may not have learnt a thing yet."""

    def __init__(self) -> None:
        self.highest = 0.0

    def is_over(self, record: Record) -> bool:
        lr = record.get("lr", 0.0)
        self.highest = max(self.highest, lr)
        return lr < self.highest


MIN_ROWS = 16  # of targets; fewer can be alike by chance
MIN_IMAGES = 8  # whose features make a rank; fewer can be alike by chance
MIN_STEPS = 10  # from the first to the last record that an alarm is raised by, as single steps scatter
WORDS = {"cls": "class", "patch": "patch"}


def has_few_rows(record: Record) -> bool:
    """Whether the images of a step, or the prototypes, are too few for their targets to say anything."""
    return record.get("cls_target_capacity", math.inf) < math.log(MIN_ROWS)


def has_few_images(record: Record) -> bool:
    """Whether the images of the probe are too few for the rank of their features to say anything."""
    return min(record.get(f"probe_{kind}images", math.inf) for kind in ("", "distinct_")) < MIN_IMAGES


class AlarmMonitor:
    """Hears the records of a run and tells of alarms that begin or end.

    Args:
        history: the records so far, of which nothing is told; alarms that have begun there go on.
    """

    def __init__(self, history: Sequence[Record] = ()) -> None:
        self.alarms: list[Alarm] = []
        self._rules = [
            *(FewPrototypes("cls"), FewPrototypes("patch"), AlikeTargets(), OneImage(), LostRank(), LostAccuracy()),
            *(LostLoss(), Exploding(), DecayingPatches(), Starved()),
        ]
        self._began: dict[Rule, list[int]] = {}  # iterations of the records in a row, until there is an alarm
        self._ringing: dict[Rule, int] = {}  # the position of the alarm
        for record in history:
            self._take(record)

    def hear(self, record: Record) -> None:
        """Take in a record; what begins or ends with it is logged."""
        for alarm in self._take(record):
            if alarm.over:
                logger.info("alarm over, since step %d: %s", int(record["iteration"]), alarm.kind)
            else:
                logger.warning("ALARM, %s: since step %d %s. %s", alarm.kind, alarm.first, alarm.finding, alarm.advice)

    def summary(self) -> str:
        """What to say of the run at its end."""
        kinds = list(dict.fromkeys(f"{alarm.kind}{' (over)' if alarm.over else ''}" for alarm in self.alarms))
        return f"ALARMS were raised: {', '.join(kinds)}" if kinds else "no alarms"

    def _take(self, record: Record) -> list[Alarm]:
        return [alarm for rule in self._rules for alarm in self._apply(rule, record)]

    def _apply(self, rule: Rule, record: Record) -> list[Alarm]:
        """The alarm of a rule, if it begins or ends with this record."""
        finding, step = rule.judge(record), int(record["iteration"])
        if finding is None:
            return []
        position = self._ringing.get(rule)
        if not finding:
            self._began.pop(rule, None)
            if position is None:
                return []
            del self._ringing[rule]
            self.alarms[position] = self.alarms[position]._replace(over=True)
            return [self.alarms[position]]
        if position is not None:
            self.alarms[position] = self.alarms[position]._replace(last=step, finding=finding)
            return []
        steps = self._began.setdefault(rule, [])
        steps.append(step)
        if len(steps) < rule.patience or (rule.patience > 1 and step - steps[0] < MIN_STEPS):
            return []
        self._ringing[rule] = len(self.alarms)
        self.alarms.append(Alarm(rule.kind, steps[0], step, False, finding, rule.advice))
        return self.alarms[-1:]


def find_alarms(records: Sequence[Record]) -> list[Alarm]:
    """The alarms of a run, in the order in which they began."""
    return sorted(AlarmMonitor(records).alarms, key=lambda alarm: alarm.first)
