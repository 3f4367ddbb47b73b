"""Figures and tables of the page: key figures, results of evaluations, settings, environment."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from dinov2 import config
from dinov2.config import Config
from dinov2.report.curves import points_of
from dinov2.report.numbers import counted, duration, number, percent, result_text, rough, short
from dinov2.report.results import Result
from dinov2.report.run import Run

ABSENT = "\N{EN DASH}"

# --- Head ------------------------------------------------------------------------------------------------------------


def facts(run: Run) -> Mapping[str, str]:
    """Data, network and size of a run."""
    cfg = run.config
    if cfg is None:
        return {}
    sizes = {"wide": cfg.student.embed_dim, "blocks": cfg.student.depth}
    network = [cfg.student.arch, *(f"{size} {what}" for what, size in sizes.items() if size)]
    origins = [f"distilled from {cfg.distillation.teacher}"] if cfg.distillation.teacher else []
    origins += [f"from the weights of {source}" for source in list(config.sources_of(cfg).values())[:1]]
    origins += ["Gram anchoring"] if cfg.gram.loss_weight > 0 else []
    return {
        "data": cfg.train.dataset_path,
        **({"origin": ", ".join(origins)} if origins else {}),
        "network": ", ".join([*network, f"patches of {cfg.student.patch_size} pixels"]),
        "steps": counted(run.total_steps or 0, "step"),
        "batch": counted(run.global_batch(run.steps_done) or 0, "image") + " of each process" * (not run.sessions),
    }


def subtitle(runs: Sequence[Run]) -> str:
    """The facts that all runs share."""
    first, *others = map(facts, runs)
    shared = {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}
    return " \N{MIDDLE DOT} ".join(f"batches of {value}" if key == "batch" else value for key, value in shared.items())


def key_figures(run: Run) -> Mapping[str, tuple[str, str]]:
    """The most important numbers of a run, each with a remark that may be empty."""

    def last(name: str, text: Callable[[float], str], error: str = "", chance: str = "") -> tuple[str, str]:
        points = points_of(run, name)
        if not points:
            return "", ""
        step, value = points[-1]
        remarks = [] if run.is_late(step) else [run.step_text(step)]
        if known := run.value_at(error, step):
            remarks.append(f"standard error {known:.1f}")
        if known := run.value_at(chance, step):
            remarks.append(f"guessing up to {percent(known)}")
        return text(value), f"({', '.join(remarks)})" if remarks else ""

    figures = {
        "k-NN accuracy": last("knn", percent, chance="knn_chance"),
        "k-NN of patches, mIoU": last("patch_knn_miou", percent, "patch_knn_error", "patch_knn_chance"),
        "total loss": last("total_loss", number),
        "effective rank": last("probe_cls_rank_me", rough),
        "steps done": (f"{run.steps_done:,}", "" if run.total_steps is None else f"of {run.total_steps:,}"),
        "training time": (duration(run.seconds) if run.seconds else "", ""),
        "images per second": last("images_per_second", short),
    }
    return {name: (figure, remark) for name, (figure, remark) in figures.items() if figure}


def side_by_side(runs: Sequence[Run]) -> list[dict[str, str]]:
    """Key figures and facts of several runs."""
    columns = []
    for run in runs:
        figures = {name: " ".join(texts).strip() for name, texts in key_figures(run).items()}
        columns.append(figures | {name: text for name, text in facts(run).items() if name != "steps"})
    return columns


def comparison_rows(columns: Sequence[Mapping[str, str]]) -> list[tuple[str, list[str], bool]]:
    """(name, text of each column, whether these differ) of each name in any column."""
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [(name, [column.get(name, ABSENT) for column in columns]) for name in names]
    return [(name, texts, len(set(texts)) > 1) for name, texts in rows]


# --- Accuracy --------------------------------------------------------------------------------------------------------


def result_tables(runs: Sequence[Run]) -> list[tuple[str, list[list[str]]]]:
    """(caption, rows) of each evaluation of a teacher on the same data; a row has a column for each run."""
    tables: dict[tuple[str, str], dict[str, list[str]]] = {}
    for index, run in enumerate(runs):
        for each in run.results:
            rows = tables.setdefault((_subject(each), each.data), {})
            rows.setdefault(each.name, [ABSENT] * len(runs))[index] = result_text(each.value)
    return [
        (f"{subject}, in percent{f': {data}' if data else ''}.", [[name, *row] for name, row in rows.items()])
        for (subject, data), rows in tables.items()
    ]


def _subject(each: Result) -> str:
    name = {"knn": "k-NN", "log_regression": "Logistic regression", "linear": "Linear classification"}
    teacher = "" if each.teacher is None else f" of the teacher of step {each.teacher:,}"
    return name.get(each.evaluation, each.evaluation) + teacher


# --- Settings --------------------------------------------------------------------------------------------------------

_SET_BY_THE_RUN = {"train.output_dir", "optim.lr"}


class SettingTables(NamedTuple):
    """Settings that are not the default, as rows of key, default and value(s)."""

    different: list[list[str]]  # between the runs; a value for each
    common: list[list[str]]


def setting_tables(runs: Sequence[Run]) -> SettingTables:
    """The settings of the runs that have a configuration."""
    defaults = dict(_flat(config.to_dict(config.load())))
    columns = [_changed(run.config, defaults) for run in runs if run.config is not None]
    names = [name for name in defaults if any(name in column for column in columns)]
    names.sort(key=lambda name: name.startswith("compute_precision."))  # many, and of less interest
    rows = [[name, defaults[name], *(column.get(name, defaults[name]) for column in columns)] for name in names]
    different = [row for row in rows if len(set(row[2:])) > 1]
    return SettingTables(different, [row[:3] for row in rows if row not in different])


def _changed(cfg: Config, defaults: Mapping[str, str]) -> dict[str, str]:
    values = _flat(config.to_dict(cfg))
    return {key: value for key, value in values if value != defaults[key] and key not in _SET_BY_THE_RUN}


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys and values as texts."""
    for name, value in mapping.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", _yaml(value)


def _yaml(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{', '.join(map(_yaml, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value) or "''"


# --- Environment -----------------------------------------------------------------------------------------------------

_FACTS = {
    "device": "device",
    "processes": "processes",
    "cores": "cores per process",
    "threads": "threads per process",
    "system": "system",
    "python": "Python",
    "dinov2": "dinov2",
    "torch": "PyTorch",
    "torchvision": "torchvision",
    "numpy": "NumPy",
    "xformers": "xFormers",
    "cuda": "CUDA",
    "driver": "driver",
    "slurm_job": "SLURM job",
}


def session_facts(run: Run) -> Mapping[str, str]:
    """The environment of the latest session, and when all of them began; empty if none was recorded."""
    if not run.sessions:
        return {}
    latest = run.sessions[-1]
    found = {name: str(latest[key]) for key, name in _FACTS.items() if latest.get(key) is not None}
    if latest.get("commit"):
        changed = latest.get("changed_files")
        found["commit"] = f"{latest['commit']}{f', with {changed} changed file(s)' if changed else ''}"
    starts = [f"step {each.get('first_step', 0):,} on {_minute(each.get('date'))}" for each in run.sessions]
    found["started at"] = "; ".join(starts)
    if changes := [
        f"from step {each.get('first_step', 0):,}: {each['changed_settings']}"
        for each in run.sessions
        if each.get("changed_settings")
    ]:
        found["settings changed"] = "; ".join(changes)
    if len(run.datasets) > 1:
        found["datasets"] = "; ".join(f"from step {first:,} on {name}" for first, name in run.datasets)
    return found


def _minute(date: object) -> str:
    """2026-11-23T14:18:21+00:00 -> 2026-11-23 14:18 UTC"""
    return f"{str(date)[:16].replace('T', ' ')} UTC" if date else "an unknown day"
