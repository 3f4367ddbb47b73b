"""The metrics of a training run: every key of `training_metrics.json` with its meaning, unit and direction."""

from typing import Literal, NamedTuple

Group = Literal["loss", "features", "targets", "optimization", "speed", "schedule"]
Direction = Literal["rises", "falls", "none"]


class Metric(NamedTuple):
    """One quantity of a training run."""

    name: str  # key in `training_metrics.json`
    group: Group
    meaning: str  # what is measured, and which values indicate a problem; one or two sentences
    unit: str = ""  # empty for numbers without a unit
    direction: Direction = "none"  # trend over a healthy run
    chart: str = ""  # title of the chart that shows it together with related metrics; empty if it is not drawn
    label: str = ""  # distinguishes it from the other metrics of its chart


def _loss(name: str, chart: str, meaning: str) -> Metric:
    return Metric(name, "loss", meaning, direction="falls", chart=chart)


def _tokens(ending: str, chart: str, meaning: str, direction: Direction = "none") -> tuple[Metric, Metric]:
    """A statistic of the teacher's features of the probe images: of class tokens and of patch tokens."""
    of_class = Metric(f"probe_cls_{ending}", "features", meaning, "", direction, chart, "class tokens")
    return of_class, of_class._replace(name=f"probe_patch_{ending}", label="patches")


def _frozen_teacher(name: str, chart: str) -> Metric:
    """The same of the frozen teacher of a distillation."""
    meaning = f"{name} of the frozen teacher of a distillation, which is measured once, at step 0."
    return Metric(f"frozen_teacher_{name}", "features", meaning, "%", chart=chart, label="frozen teacher")


def _drift(ending: str, meaning: str) -> tuple[Metric, Metric]:
    """Similarity of the teacher's features to those of the model that the run started from."""
    title = f"Similarity to the start, {'CKA' if ending == 'cka' else ending}"
    of_class = Metric(f"drift_cls_{ending}", "features", meaning, "", "falls", title, "class tokens")
    return of_class, of_class._replace(name=f"drift_patch_{ending}", label="patches")


def _targets(
    ending: str, chart: str, meaning: str, unit: str = "", direction: Direction = "none"
) -> tuple[Metric, Metric]:
    """A statistic of the teacher's targets: of class tokens and of masked patches."""
    of_class = Metric(f"cls_{ending}", "targets", meaning, unit, direction, chart, "class tokens")
    return of_class, of_class._replace(name=f"patch_{ending}", label="masked patches")


def _gradient(part: str, label: str) -> Metric:
    meaning = "Norm of the gradient before clipping, on a logarithmic scale. Growth without end is divergence."
    return Metric(f"grad_norm_{part}", "optimization", meaning, chart="Gradient norms", label=label)


def _schedule(name: str, chart: str, meaning: str, label: str = "") -> Metric:
    return Metric(name, "schedule", meaning, chart=chart, label=label)


_KNN = "Share of labeled images whose nearest neighbors have the same class. Rises, then levels off."
_PATCH_KNN = "Mean IoU of labeled images, each patch segmented by the most similar ones of others. A fall: dense decay."
_SIMILARITY = "Mean cosine similarity of two patches of one image. A slow rise toward 1: dense features decay."
_NEAREST = "Mean distance of a normalized class token to the nearest one. At 0 all images look alike."
_LARGEST = "Share of targets, 0 to 1, whose largest entry is the most frequent one. Near 1: collapse."
_LAG = "Distance of their weights, relative to the norm of the teacher's. Rises with the learning rate, then falls."
_NORM = "Mean length of tokens before the last norm, and of the longest patch token. Steady growth is a warning."
_INFORMATION = "Mutual information of targets and images, and its maximum. At 0 all targets are the same."
_LR = "Rises during warm-up, then falls. The rate of the last layer, and of the backbone, is 0 while it is frozen."

METRICS: tuple[Metric, ...] = (
    Metric("iteration", "schedule", "Index of the optimizer step, from 0."),
    # Losses: medians of the last 20 steps.
    _loss("total_loss", "Total loss", "The optimized objective: the weighted sum of all loss terms."),
    _loss("dino_local_crops_loss", "DINO, local crops", "Local crops predict the class token of global crops."),
    _loss("dino_global_crops_loss", "DINO, global crops", "Each global crop predicts the class token of the other."),
    _loss("gram_loss", "Gram", "Similarities between patches, compared with those of the Gram teacher."),
    _loss("ibot_loss", "iBOT", "Masked patches, all in a distillation, predict the teacher's tokens of them."),
    _loss("koleo_loss", "KoLeo", "Spreads the class tokens of a batch. A steep rise: features become alike."),
    # Features: the teacher on the fixed images of the probe.
    Metric("knn", "features", _KNN, "%", "rises", "k-NN accuracy", "teacher"),
    _frozen_teacher("knn", "k-NN accuracy"),
    Metric("knn_chance", "features", "k-NN accuracy that guessing reaches.", "%"),
    Metric("knn_images", "features", "Number of labeled images of the k-NN accuracy.", "images"),
    Metric("patch_knn_miou", "features", _PATCH_KNN, "%", "rises", "k-NN of patches, mIoU", "teacher"),
    _frozen_teacher("patch_knn_miou", "k-NN of patches, mIoU"),
    Metric("patch_knn_error", "features", "Standard error of patch_knn_miou for another draw of images.", "%"),
    _frozen_teacher("patch_knn_error", ""),
    Metric("patch_knn_chance", "features", "patch_knn_miou that guessing reaches.", "%"),
    Metric("patch_knn_images", "features", "Number of images that are segmented for patch_knn_miou.", "images"),
    *_drift("cka", "Centered kernel alignment with the features of the starting model. 1: the same but for rotation."),
    *_drift("cosine", "Mean cosine similarity to the same tokens of the starting model. 1: the same."),
    *_tokens("rank_me", "Effective rank", "Number of dimensions in use (RankMe). Near 1: collapse.", "rises"),
    Metric("probe_patch_similarity", "features", _SIMILARITY, chart="Similarity of patches"),
    *_tokens("norm", "Feature norms", _NORM),
    Metric("probe_patch_norm_max", "features", _NORM, chart="Feature norms", label="longest patch"),
    Metric("koleo_distance", "features", _NEAREST, "", "rises", "Nearest neighbor in the batch"),
    Metric("probe_images", "features", "Number of probe images.", "images"),
    Metric("probe_distinct_images", "features", "Number of different probe images.", "images"),
    # Targets of the teacher in one step.
    *_targets("target_information", "Information", _INFORMATION, "nats", "rises"),
    Metric("cls_target_capacity", "targets", _INFORMATION, "nats", chart="Information", label="maximum"),
    Metric("patch_target_capacity", "targets", "Maximum of patch_target_information.", "nats"),
    *_targets("target_entropy", "Entropy", "Mean entropy of a target, 0 to the logarithm of the prototypes.", "nats"),
    *_targets("target_perplexity", "Perplexity", "Effective number of prototypes of a batch. Near 1: collapse."),
    *_targets("prototypes_used", "Prototypes used", "Prototypes that are the largest entry of some target."),
    *_targets("largest_prototype", "Share of the largest prototype", _LARGEST),
    _gradient("backbone", "backbone"),
    _gradient("dino_head", "DINO head"),
    _gradient("ibot_head", "iBOT head"),
    Metric("student_teacher_distance", "optimization", _LAG, chart="Student to teacher"),
    # Speed: means of the last 20 steps.
    Metric("iter_time", "speed", "Time of a step.", "s"),
    Metric("data_time", "speed", "Time that a step waits for its batch.", "s"),
    Metric("data_wait", "speed", "data_time / iter_time, 0 to 1."),
    _schedule("lr", "Learning rate", _LR, "all"),
    _schedule("last_layer_lr", "Learning rate", _LR, "last layer"),
    _schedule("backbone_lr", "Learning rate", _LR, "backbone"),
    _schedule("wd", "Weight decay", "Weight decay of AdamW."),
    _schedule("mom", "Teacher momentum", "Share of the old teacher in the new one."),
    _schedule("teacher_temp", "Teacher temperature", "A lower one makes sharper targets."),
    _schedule("current_batch_size", "", "Images of a micro-batch of one process."),
)

BY_NAME = {metric.name: metric for metric in METRICS}

_TRACKER_GROUPS: dict[Group, str] = {"loss": "loss", "schedule": "schedule", "speed": "time"}


def tracker_name(name: str) -> str:
    """The name under which trackers sort a metric into panels: loss/, schedule/, time/ or health/."""
    if name in BY_NAME:
        return f"{_TRACKER_GROUPS.get(BY_NAME[name].group, 'health')}/{name}"
    return f"{'loss' if name.endswith('_loss') else 'health'}/{name}"
