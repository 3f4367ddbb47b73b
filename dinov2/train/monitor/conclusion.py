"""What a run has reached, in a sentence with the evidence.

Whether continuing from weights helped, with the file to use, or how near a student comes to its frozen teacher.
"""

import math
from collections.abc import Mapping, Sequence

from dinov2.train.monitor.best_teacher import Rating
from dinov2.train.monitor.starting_point import START, START_FOLDER

Record = Mapping[str, float]

NO_LABELS = (
    "Whether continuing {helped} was not measured, as {reason}: {signals}. These signals "
    "do not show which model is better; compare eval/" + START_FOLDER + " with eval/best on your task, for example by "
    "dinov2/run/eval/knn.py."
)


def conclude(records: Sequence[Record], best: Rating | None) -> str:
    """Compare the best teacher of a run with the model that it started from and, in a distillation, the frozen teacher.

    "" for other runs.
    """
    return f"{_since_start(records, best)} {_beside_frozen_teacher(records, best)}".strip()


def _since_start(records: Sequence[Record], best: Rating | None) -> str:
    """The sentences for a run from weights; else ""."""
    start = next((record for record in records if record["iteration"] == START), None)
    if start is None:
        return ""
    last = next((record for record in reversed(records) if "probe_cls_rank_me" in record), start)
    if last is start:
        return "Whether continuing helped is not known yet: nothing was measured after the start."
    measured = [record for record in records if "knn" in record and record is not start]
    dense = _dense_features(start, best, [record for record in records if "patch_knn_miou" in record])
    if not measured or start.get("knn", 0.0) <= start.get("knn_chance", 0.0):
        reason = "k-NN of the starting model is not better than guessing"
        text = _without_labels(start, last, reason if measured else "there are no labels (health.knn_dataset)", dense)
    else:
        text = _compare(start, best, measured)
    return f"{text} {dense}".rstrip()


def _without_labels(start: Record, last: Record, reason: str, dense: str) -> str:
    """The sentence without k-NN accuracies; `dense` is that on dense features, which it does not contradict."""
    signals = {"effective rank": "probe_cls_rank_me", "similarity of patches": "probe_patch_similarity"}
    texts = [f"{text} {start[key]:.3g} -> {last[key]:.3g}" for text, key in signals.items()]
    if "drift_cls_cka" in last:
        texts.append(f"similarity of features to those of the start (CKA) {last['drift_cls_cka']:.2f}")
    helped = "improved class tokens" if dense else "helped"
    return NO_LABELS.format(helped=helped, reason=reason, signals=", ".join(texts))


def _compare(start: Record, best: Rating | None, measured: Sequence[Record]) -> str:
    """The sentence for k-NN accuracies."""
    count = start.get("knn_images", 0.0)
    evidence = f"k-NN on {count:,.0f} images, each classified by the others"
    chosen = _record_of(best, measured)
    if best is None or chosen is None:
        return _not_better(start["knn"], measured[-1]["knn"], count, evidence)
    gain = chosen["knn"] - start["knn"]
    error = standard_error(start["knn"], chosen["knn"], count)
    change = (
        f"{start['knn']:.1f} -> {chosen['knn']:.1f} % by {evidence} ({gain:+.1f} points, standard error {error:.1f})"
    )
    if gain > 2 * error:
        return f"Continuing helped: {change}. Use eval/best, the teacher of step {best.iteration:,}."
    verdict = "It is not clear that continuing helped" if gain > -2 * error else "Continuing made class tokens worse"
    return (
        f"{verdict}: {change}. Compare eval/{START_FOLDER} with eval/best, the teacher of "
        f"step {best.iteration:,}, on test images."
    )


def _record_of(best: Rating | None, measured: Sequence[Record]) -> Record | None:
    """The record of the best teacher; None if that is the starting model."""
    if best is None or best.iteration == START:
        return None
    return next((record for record in measured if record["iteration"] == best.iteration), None)


def _dense_features(start: Record, best: Rating | None, measured: Sequence[Record]) -> str:
    """A sentence on segmentation by k-NN of patches, if there are class maps; else ""."""
    if len(measured) < 2 or "patch_knn_miou" not in start:
        return ""
    chosen = _record_of(best, measured)
    now = measured[-1] if chosen is None else chosen
    change = now["patch_knn_miou"] - start["patch_knn_miou"]
    error = math.hypot(start["patch_knn_error"], now["patch_knn_error"])
    verdict = "did not change measurably" if abs(change) <= 2 * error else "improved" if change > 0 else "got worse"
    teacher = "the last teacher" if chosen is None else f"the teacher of step {now['iteration']:,.0f}"
    return (
        f"Dense features {verdict}: mean IoU {start['patch_knn_miou']:.1f} -> {now['patch_knn_miou']:.1f} % of "
        f"{teacher} by k-NN of patches on {now['patch_knn_images']:,.0f} images ({change:+.1f} points, standard error "
        f"{error:.1f}, guessing up to {now['patch_knn_chance']:.1f} %)."
    )


def _beside_frozen_teacher(records: Sequence[Record], best: Rating | None) -> str:
    """The sentence on a distillation of which the frozen teacher was measured; else ""."""
    frozen = next((record for record in records if any(name.startswith("frozen_teacher_") for name in record)), {})
    measured = [record for record in records if "knn" in record or "patch_knn_miou" in record]
    now = _record_of(best, measured) or next(reversed(measured), {})
    texts = []
    for name, text in {"knn": "k-NN", "patch_knn_miou": "mean IoU of k-NN of patches"}.items():
        reference = f"frozen_teacher_{name}"
        if name not in now or reference not in frozen:
            continue
        values = now[name], frozen[reference]
        if name == "knn":
            error = standard_error(*values, now["knn_images"])
        else:
            error = math.hypot(now["patch_knn_error"], frozen["frozen_teacher_patch_knn_error"])
        texts.append(
            f"{text} {values[0]:.1f} %, that of the frozen teacher {values[1]:.1f} % ({values[0] - values[1]:+.1f} "
            f"points, standard error {error:.1f})"
        )
    return f"At step {now['iteration']:,.0f}: {'; '.join(texts)}." if texts else ""


def _not_better(start: float, last: float, count: float, evidence: str) -> str:
    """The sentence for a run of which no saved teacher is better than its start."""
    error = standard_error(start, last, count)
    is_worse = start - last > 2 * error
    verdict = "Continuing did not help: " if is_worse else "No difference that matters was measured: "
    return (
        f"{verdict}no saved teacher is better than the starting model, {start:.1f} -> {last:.1f} % of the last one by "
        f"{evidence} ({last - start:+.1f} points, standard error {error:.1f}). Use eval/{START_FOLDER}, the starting "
        "model."
    )


def standard_error(first: float, second: float, count: float) -> float:
    """Standard error of the difference of two accuracies in percent, as if of two independent samples of `count`."""
    return math.sqrt(sum(value * (100 - value) for value in (first, second)) / max(count, 1))
