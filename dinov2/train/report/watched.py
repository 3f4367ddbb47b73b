"""What the numbers of a run allow to be watched, and until when."""

from statistics import median

from dinov2.train.report.run import Run

_TARGETS = ("cls_target_information", "patch_target_information", "cls_target_entropy")
# Alarms, and the numbers of which at least one is needed to raise them.
_NEEDED = {
    "collapse": (*_TARGETS, "probe_cls_rank_me", "probe_distinct_images"),
    "divergence": ("cls_target_information", "probe_patch_norm"),
    "decay of dense features": ("probe_patch_similarity",),
    "waiting for data": ("data_wait",),
}
# What says how the network is; that it waits for data says nothing of it.
HEALTH_KEYS = (*_NEEDED["collapse"], *_NEEDED["divergence"], *_NEEDED["decay of dense features"])


def watched(run: Run) -> list[str]:
    """Kinds of trouble that would have been seen."""
    return [kind for kind, keys in _NEEDED.items() if any(run.series(key) for key in keys)]


def health_steps(run: Run) -> list[float]:
    """The logged steps at which anything about the network's health was measured."""
    return [record["iteration"] for record in run.records if any(key in record for key in HEALTH_KEYS)]


def watched_until(run: Run) -> float | None:
    """The step after which nothing was measured any more; None if it still is, or never was."""
    steps = health_steps(run)
    if not steps or steps[-1] == run.records[-1]["iteration"]:
        return None
    switched_off = run.config is not None and run.config.health.period == 0
    usual = median(after - before for before, after in zip(steps, steps[1:], strict=False)) if len(steps) > 1 else 0
    return steps[-1] if switched_off or run.records[-1]["iteration"] - steps[-1] > usual else None


def unwatched(run: Run) -> str:
    """A sentence about health that was not measured, from some step on or never; empty if it was."""
    if not run.records:
        return ""
    until, cfg = watched_until(run), run.config
    if until is None and health_steps(run):
        return ""
    why = " (health.period=0)" if cfg is not None and cfg.health.period == 0 else ""
    after = "" if until is None else f" after step {until:,.0f}"
    return f"Its health was not measured{after}{why}."
