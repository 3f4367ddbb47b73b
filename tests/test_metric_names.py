"""The table of metrics is consistent, and has every metric that alarms, ratings and trackers use."""

from itertools import groupby

from dinov2.metric_names import BY_NAME, METRICS, tracker_name
from dinov2.train.monitor.alarms import RULES, AlarmKind, monitored_kinds
from dinov2.train.monitor.best_teacher import SIGNALS


def test_names_are_unique_and_the_metrics_of_a_chart_are_adjacent() -> None:
    assert len(BY_NAME) == len(METRICS)
    charts = [chart for chart, _ in groupby(metric.chart for metric in METRICS if metric.chart)]
    assert len(charts) == len(set(charts))


def test_every_metric_has_a_meaning_and_shared_charts_have_labels() -> None:
    for metric in METRICS:
        assert metric.meaning.endswith(".")
        assert metric.label or sum(metric.chart == other.chart for other in METRICS) == 1 or not metric.chart


def test_alarms_and_ratings_use_metrics_of_the_table() -> None:
    used = {name for rule in RULES for name in rule.metrics}
    assert used | {signal for signals in SIGNALS.values() for signal in signals} <= set(BY_NAME)


def test_a_kind_of_alarm_is_monitored_if_all_metrics_of_one_of_its_rules_are_logged() -> None:
    assert monitored_kinds(BY_NAME) == list(AlarmKind)
    assert monitored_kinds([]) == monitored_kinds(["data_wait"]) == []
    assert monitored_kinds(["data_wait", "data_time"]) == [AlarmKind.DATA_BOTTLENECK]


def test_trackers_sort_losses_that_are_not_in_the_table_with_the_others() -> None:
    names = ("new_loss", "total_loss", "new", "cls_target_entropy", "mom", "data_time")
    assert [tracker_name(name) for name in names] == [
        *("loss/new_loss", "loss/total_loss", "health/new"),
        *("health/cls_target_entropy", "schedule/mom", "time/data_time"),
    ]
