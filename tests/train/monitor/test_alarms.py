"""Alarms: each kind of failure raises its own, and healthy runs raise none; on made-up records."""

import math
from collections.abc import Sequence
from itertools import pairwise

import pytest

from dinov2.train.monitor.alarms import Alarm, AlarmMonitor, Record, find_alarms

NUM_LINES = 40


def healthy(index: int) -> dict[str, float]:
    """A record of a healthy run; records are 20 steps apart."""
    progress = index / NUM_LINES
    return {
        "iteration": 20 * index,
        "lr": 1e-3 * min(10 * progress, 1.2 - progress),
        "total_loss": 8 - 4 * progress,
        "data_wait": 0.08,
        "data_time": 0.05,
        "cls_target_capacity": math.log(128),
        "cls_target_perplexity": 120.0,
        "cls_target_information": 0.002 + progress,
        "cls_largest_prototype": 0.05,
        "probe_distinct_images": 64.0,
        "knn": 70 + 10 * progress,
        "probe_cls_rank_me": 1.05 + 40 * progress,
        "probe_patch_rank_me": 100 + 40 * progress,
        "probe_patch_similarity": 0.3 - 0.1 * progress,
        "probe_patch_norm": 40.0 + 10 * progress,
        "knn_images": 1000.0,
        "patch_knn_miou": 40 + 10 * progress,
        "patch_knn_error": 1.5,
        "patch_knn_chance": 9.0,
    }


def run(start: int = NUM_LINES, **changed: float) -> list[Record]:
    """The records of a run that is healthy up to a record and has other values from then on."""
    return [{**healthy(index), **(changed if index >= start else {})} for index in range(NUM_LINES)]


def kinds(records: Sequence[Record]) -> set[str]:
    return {alarm.kind for alarm in find_alarms(records)}


def test_a_healthy_run_raises_none() -> None:
    assert find_alarms(run()) == []


def test_an_empty_run_and_one_without_health_raise_none() -> None:
    assert find_alarms([]) == []
    assert find_alarms([{"iteration": step, "total_loss": 8 - step / 10} for step in range(20)]) == []


@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        ("collapse", {"cls_target_perplexity": 2.0, "cls_largest_prototype": 0.55}),
        ("collapse", {"cls_target_information": 0.01}),
        ("collapse", {"probe_cls_rank_me": 3.0}),
        ("collapse", {"probe_distinct_images": 1.0}),
        ("collapse", {"knn": 36.0}),
        ("divergence", {"total_loss": 7.5, "cls_target_information": 0.2}),
        ("divergence", {"probe_patch_norm": 900.0, "probe_patch_rank_me": 30.0}),
        ("decay of dense features", {"patch_knn_miou": 41.0}),
        ("data bottleneck", {"data_wait": 0.6}),
    ],
)
def test_each_sign_raises_its_alarm_and_no_other(kind: str, changed: dict[str, float]) -> None:
    [alarm] = find_alarms(run(20, **changed))
    assert (alarm.kind, alarm.first, alarm.last, alarm.over) == (kind, 400, 780, False)
    assert alarm.finding and alarm.advice


def without_maps(records: Sequence[Record]) -> list[Record]:
    return [{name: value for name, value in record.items() if "patch_knn" not in name} for record in records]


def test_patches_that_become_alike_are_a_decay_of_dense_features_unless_labels_say_otherwise() -> None:
    records = run(20, probe_patch_similarity=0.7)
    [alarm] = find_alarms(without_maps(records))
    assert (alarm.kind, alarm.first, alarm.last) == ("decay of dense features", 400, 780)
    assert alarm.finding == "the mean similarity of two patches of an image rose from 0.25 to 0.70"
    assert find_alarms(records) == [], "the mean IoU rises"
    rarely = [
        record if record["iteration"] % 200 == 0 else each
        for record, each in zip(records, without_maps(records), strict=True)
    ]
    assert find_alarms(rarely) == [], "which need not be measured with every record"
    unknown = [{**record, "patch_knn_chance": 60.0} for record in records]
    assert kinds(unknown) == {"decay of dense features"}, "labels that say nothing"


def test_patches_that_become_alike_with_all_else_are_no_decay_of_dense_features_alone() -> None:
    assert kinds(without_maps(run(20, probe_patch_similarity=0.7, probe_cls_rank_me=5.0))) == {"collapse"}


@pytest.mark.parametrize(
    "changed",
    [
        {"patch_knn_miou": 42.5},  # less than two standard errors below the best, 44.75
        {"patch_knn_miou": 41.0, "knn": 66.0},  # class tokens get worse, too: 2.7 points are two standard errors
        {"patch_knn_miou": 5.0, "patch_knn_chance": 50.0},  # was never better than guessing
        {"patch_knn_miou": math.nan},
        {"patch_knn_miou": 41.0, "knn": 5.0, "knn_chance": 100.0, "probe_cls_rank_me": 15.0},  # k-NN is no information
    ],
)
def test_segmentation_that_varies_or_falls_with_all_else_is_no_decay_of_dense_features(
    changed: dict[str, float],
) -> None:
    records = [{**record, "patch_knn_chance": changed.get("patch_knn_chance", 9.0)} for record in run(20, **changed)]
    assert "decay of dense features" not in kinds(records)


def test_segmentation_that_falls_without_labels_of_images_is_a_decay_while_the_rank_holds() -> None:
    records = [{k: v for k, v in record.items() if k != "knn"} for record in run(20, patch_knn_miou=41.0)]
    [alarm] = find_alarms(records)
    assert alarm.kind == "decay of dense features" and (alarm.first, alarm.last) == (400, 780)
    assert alarm.finding == "the mean IoU of segmentation by k-NN of patches fell from 44.8 to 41.0 %"
    assert "health.best_by=patch_knn_miou" in alarm.advice
    lost = [{**record, "probe_cls_rank_me": 12.0} if record["iteration"] >= 400 else record for record in records]
    assert "decay of dense features" not in kinds(lost), "20.5 before"


def test_two_measurements_with_worse_segmentation_are_no_alarm() -> None:
    records = run()
    records[20:22] = [{**line, "patch_knn_miou": 30.0} for line in records[20:22]]
    assert find_alarms(records) == []
    records[22] = {**records[22], "patch_knn_miou": 30.0}
    assert [(alarm.kind, alarm.over) for alarm in find_alarms(records)] == [("decay of dense features", True)]


def test_features_that_are_alike_after_the_warm_up_are_a_collapse_and_before_it_are_not() -> None:
    alike = {"probe_cls_rank_me": 1.01, "cls_target_information": 0.001}
    records = run(0, **alike)
    begun = min(alarm.first for alarm in find_alarms(records))
    fallen = next(after["iteration"] for before, after in pairwise(records) if after["lr"] < before["lr"])
    assert begun == fallen
    assert kinds(records) == {"collapse"}


def test_a_bad_line_or_two_are_no_alarm() -> None:
    records = run()
    records[20:22] = [{**line, "data_wait": 0.9, "total_loss": 8.0} for line in records[20:22]]
    assert find_alarms(records) == []


def test_a_loss_that_rises_with_richer_targets_is_none() -> None:
    assert find_alarms(run(20, total_loss=7.5, cls_target_information=1.5)) == []


def test_an_alarm_is_over_when_its_sign_is_gone_and_may_come_again() -> None:
    records = run()
    for start in (5, 20):
        records[start : start + 8] = [{**line, "data_wait": 0.6} for line in records[start : start + 8]]
    assert [(a.first, a.last, a.over) for a in find_alarms(records)] == [(100, 240, True), (400, 540, True)]


def test_an_alarm_is_logged_once_and_continues_in_a_resumed_run(caplog: pytest.LogCaptureFixture) -> None:
    records = run(20, data_wait=0.6)
    first = AlarmMonitor()
    with caplog.at_level("INFO", "dinov2.train.monitor.alarms"):
        for record in records[:30]:
            first.update(record)
        assert [r.levelname for r in caplog.records] == ["WARNING"]
        assert "data bottleneck" in caplog.text and "train.num_workers" in caplog.text
        caplog.clear()
        resumed = AlarmMonitor(records[:30])
        for record in records[30:]:
            resumed.update(record)
        assert not caplog.records, "the alarm is active already"
        resumed.update({**healthy(NUM_LINES), "iteration": 800})
        assert "over" in caplog.text
    assert resumed.alarms == [find_alarms(records)[0]._replace(over=True)]
    assert isinstance(resumed.alarms[0], Alarm)


# --- Values that cannot inform --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed",
    [
        {"knn": 0.0, "knn_chance": 0.0},  # there never was more
        {"knn": 36.0, "knn_chance": 90.0},  # guessing reaches as much
        {"probe_cls_rank_me": 1.0, "probe_images": 2.0, "probe_distinct_images": 2.0},
        {"probe_cls_rank_me": 1.0, "probe_images": 64.0, "probe_distinct_images": 4.0},
        {"probe_patch_similarity": 0.9, "probe_images": 2.0},
        {"data_wait": 0.9, "data_time": 0.0004},
        {"cls_target_capacity": math.log(2), "cls_target_information": 0.0, "cls_target_perplexity": 1.0},
        {"cls_target_capacity": math.log(2), "patch_target_capacity": math.log(99), "patch_target_perplexity": 1.0},
        {"cls_target_capacity": math.log(2), "cls_target_information": 0.0, "total_loss": 9.0},
    ],
)
def test_a_value_that_cannot_inform_raises_no_alarm(changed: dict[str, float]) -> None:
    start = 0 if "knn" in changed and changed["knn"] == 0 else 20
    assert find_alarms(run(start, **changed)) == []


def test_a_fall_from_above_chance_is_an_alarm() -> None:
    assert kinds(run(20, knn=36.0, knn_chance=20.0)) == {"collapse"}


@pytest.mark.parametrize("num_steps", [1, 2, 3, 8])
def test_a_run_of_a_few_steps_raises_none_but_that_there_is_one_image(num_steps: int) -> None:
    fallen = {"knn": 1.0, "probe_cls_rank_me": 1.0, "cls_target_information": 0.0, "cls_target_perplexity": 1.0}
    first = {**healthy(NUM_LINES), "iteration": 0}
    records = [first, *({**first, **fallen, "iteration": step, "lr": 1e-5} for step in range(1, num_steps))]
    assert find_alarms(records) == []
    assert [alarm.kind for alarm in find_alarms([{**records[0], "probe_distinct_images": 1.0}])] == ["collapse"]
