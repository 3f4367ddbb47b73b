"""Alarms: signs in a run's metrics that it fails, each with advice.

Every rule (`alarm_rules.py`) reads the records of `training_metrics.json` in order. An alarm is raised when `patience`
consecutive records that have the rule's metrics show its sign, and is over with the first one that does not. A value
that cannot inform, such as an effective rank of two images or a k-NN accuracy that guessing reaches, raises none.
"""

import logging
from collections.abc import Collection, Sequence
from typing import NamedTuple

from dinov2.train.monitor.alarm_rules import RULES, AlarmKind, Record, Rule

logger = logging.getLogger(__name__)

MIN_STEPS = 10  # from the first to the last record that an alarm is raised by, as single steps scatter


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
    """Logs the alarms that the records of a run raise or end, but not those of the `history` so far."""

    def __init__(self, history: Sequence[Record] = ()) -> None:
        self.alarms: list[Alarm] = []
        self._rules = [rule() for rule in RULES]
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
            self._apply(rule, rule.check(record, warm=warm), int(record["iteration"]))
            for rule in self._rules
            if rule.applies(record)
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
