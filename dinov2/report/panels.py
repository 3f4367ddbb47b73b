"""Which curves the page shows, in which order, and what a reader should know about each."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from dinov2.report.run import Run

Points = list[tuple[float, float]]


class Curve(NamedTuple):
    """One quantity of a run."""

    key: str  # in the records, or of `DERIVED`
    label: str = ""  # what tells it from the others of its panel


class Panel(NamedTuple):
    """One chart: quantities that are compared with one another."""

    title: str
    caption: str  # what it is, what healthy looks like
    curves: tuple[Curve, ...]
    log: bool = False
    percent: bool = False


class Group(NamedTuple):
    """Charts about one question."""

    title: str
    question: str
    panels: tuple[Panel, ...]


def _kinds(ending: str) -> tuple[Curve, Curve]:
    return Curve(f"cls_{ending}", "class tokens"), Curve(f"patch_{ending}", "masked patches")


def _probed(ending: str) -> tuple[Curve, Curve]:
    return Curve(f"probe_cls_{ending}", "class tokens"), Curve(f"probe_patch_{ending}", "patches")


GROUPS = (
    Group(
        "Losses",
        "Does the student learn to predict the teacher? The loss falls fast, then slowly. It may rise for a while as "
        "the teacher's targets sharpen, and a low loss alone does not mean good features.",
        (
            Panel("Total loss", "What is optimized: the weighted sum of the terms.", (Curve("total_loss"),)),
            Panel(
                "DINO, local crops",
                "Small crops predict the class token of large ones. Falls.",
                (Curve("dino_local_crops_loss"),),
            ),
            Panel(
                "DINO, global crops",
                "Each large crop predicts the other. Falls.",
                (Curve("dino_global_crops_loss"),),
            ),
            Panel("iBOT", "Masked patches predict the teacher's features of them. Falls.", (Curve("ibot_loss"),)),
            Panel(
                "KoLeo",
                "Pushes the images of a batch apart. Low is well spread; a steep rise means that features get alike.",
                (Curve("koleo_loss"),),
            ),
        ),
    ),
    Group(
        "Features",
        "Do the teacher's features get better? The same images are looked at again and again.",
        (
            Panel(
                "k-NN accuracy",
                "Percent of labeled images whose most similar others have the same class. Rises, then levels off.",
                (Curve("knn"),),
                percent=True,
            ),
            Panel(
                "Effective rank",
                "How many dimensions the features really use (RankMe). Rises or stays; near 1 they have collapsed.",
                _probed("rank_me"),
            ),
            Panel(
                "Similarity of patches",
                "Mean cosine between the patches of one image. Creeping up to 1: dense features decay.",
                (Curve("probe_patch_similarity"),),
            ),
            Panel(
                "Feature norms",
                "Mean length of features, and of the longest patch of an image. Settles; steady growth is a warning.",
                (*_probed("norm"), Curve("probe_patch_norm_max", "longest patch")),
            ),
            Panel(
                "Nearest neighbor in the batch",
                "Distance from a class token to the most similar one. Falling to 0: all images look alike.",
                (Curve("koleo_distance"),),
            ),
        ),
    ),
    Group(
        "Teacher's targets",
        "Do the targets say something about each image? All alike or all uniform, there is nothing to learn.",
        (
            Panel(
                "Information",
                "What targets tell about their image, in nats, and the most they could. At 0 they are all the same.",
                (*_kinds("target_information"), Curve("cls_target_capacity", "at most")),
            ),
            Panel(
                "Entropy",
                "How undecided one target is, in nats. Between 0 and the logarithm of the number of prototypes.",
                _kinds("target_entropy"),
            ),
            Panel(
                "Perplexity",
                "Over how many prototypes a batch is spread. High and steady; near 1 is collapse.",
                _kinds("target_perplexity"),
            ),
            Panel(
                "Prototypes used",
                "How many are some image's first choice. Should not dwindle.",
                _kinds("prototypes_used"),
            ),
            Panel(
                "Share of the largest prototype",
                "Of the rows whose first choice is the most popular one, 0 to 1. Small; near 1 is collapse.",
                _kinds("largest_prototype"),
            ),
        ),
    ),
    Group(
        "Optimization",
        "Are the steps of a sensible size?",
        (
            Panel(
                "Gradient norms",
                "Before clipping, on a logarithmic scale. Settle; growth without end is divergence.",
                (
                    Curve("grad_norm_backbone", "backbone"),
                    Curve("grad_norm_dino_head", "DINO head"),
                    Curve("grad_norm_ibot_head", "iBOT head"),
                ),
                log=True,
            ),
            Panel(
                "Student to teacher",
                "Relative distance of their weights. Rises with the learning rate, then falls.",
                (Curve("student_teacher_distance"),),
            ),
        ),
    ),
    Group(
        "Speed",
        "Is the machine kept busy?",
        (
            Panel("Images per second", "Over all processes. Steady.", (Curve("images_per_second"),)),
            Panel(
                "Waiting for data",
                "Percent of the time of a step. Near 0; where it is large, loading limits the run.",
                (Curve("data_wait_percent"),),
                percent=True,
            ),
        ),
    ),
    Group(
        "Schedules",
        "As configured, whatever happens.",
        (
            Panel(
                "Learning rate",
                "Up during warm-up, then down. That of the last layer is 0 while it is frozen.",
                (Curve("lr", "all"), Curve("last_layer_lr", "last layer")),
            ),
            Panel("Weight decay", "", (Curve("wd"),)),
            Panel("Teacher momentum", "Share of the old teacher in the new one.", (Curve("mom"),)),
            Panel("Teacher temperature", "Lower makes sharper targets.", (Curve("teacher_temp"),)),
        ),
    ),
)

# What a line of the metrics file says that never changes, is for alarms alone, or is shown in another form.
NOT_SHOWN = {
    *("iteration", "iter_time", "data_time", "data_wait", "current_batch_size"),
    *("patch_target_capacity", "probe_images", "probe_distinct_images", "knn_chance"),
}


def _images_per_second(run: Run) -> Points:
    found = []
    for record in run.records:
        batch, time = run.global_batch(record["iteration"]), record.get("iter_time", 0.0)
        if batch and time > 0:
            found.append((record["iteration"], batch / time))
    return found


def _data_wait(run: Run) -> Points:
    """In percent; computed from the times where it was not logged."""
    found = []
    for record in run.records:
        time = record.get("iter_time", 0.0)
        computed = record.get("data_time", 0.0) / time if time > 0 else None
        share = record.get("data_wait", computed)
        if share is not None:
            found.append((record["iteration"], 100 * share))
    return found


DERIVED: dict[str, Callable[[Run], Points]] = {
    "images_per_second": _images_per_second,
    "data_wait_percent": _data_wait,
}


def points_of(run: Run, key: str) -> Points:
    """(step, value) of a quantity of the records, or of one that is computed from them."""
    return DERIVED[key](run) if key in DERIVED else run.series(key)


def groups_for(runs: Sequence[Run]) -> list[Group]:
    """The groups without what no run has; last, what is logged and not known here.

    With several runs every quantity gets a panel of its own, so that the lines of a panel are the runs.
    """
    found = []
    for group in [*GROUPS, _unknown(runs)]:
        panels: list[Panel] = []
        for panel in group.panels:
            curves = tuple(curve for curve in panel.curves if any(points_of(run, curve.key) for run in runs))
            parts = [(curve,) for curve in curves] if len(runs) > 1 else [curves] if curves else []
            panels += [panel._replace(curves=part, title=_title(panel, part, len(runs))) for part in parts]
        if panels:
            found.append(group._replace(panels=tuple(panels)))
    return found


def _title(panel: Panel, curves: tuple[Curve, ...], num_runs: int) -> str:
    label = curves[0].label
    return f"{panel.title}, {label}" if label and num_runs > 1 else panel.title


def _unknown(runs: Sequence[Run]) -> Group:
    known = {curve.key for group in GROUPS for panel in group.panels for curve in panel.curves} | NOT_SHOWN
    logged = {key: None for run in runs for record in run.records for key in record}  # in order
    panels = tuple(Panel(key.replace("_", " "), "", (Curve(key),)) for key in logged if key not in known)
    return Group("Also logged", "", panels)
