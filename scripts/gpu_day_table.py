"""Markdown of what `gpu_day.py` has recorded."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Result = Mapping[str, Any]


def merge(records: Sequence[Result]) -> dict[str, Any]:
    """Several runs as one: of a stage that several of them ran, the last one with a result counts."""
    whole: dict[str, Any] = {**records[0], "stages": {}}
    for record in records:
        for name, stage in record["stages"].items():
            if "result" in stage or "result" not in whole["stages"].get(name, {}):
                whole["stages"][name] = stage
    return whole


def table(record: Result) -> str:
    """A table of training steps, then one of all other stages."""
    stages: dict[str, Any] = dict(record["stages"])
    machine = (stages.pop("environment", {})).get("result") or {}
    title = f"{machine.get('device', 'unknown device')}, torch {machine.get('torch', 'unknown')}, {record['date']}"
    steps = {name: stage for name, stage in stages.items() if name.startswith("step: ") and stage.get("result")}
    heading = (
        "| network | images | precision | options | images/s | ms per step, [least, most] | share of a matrix product's"
        " speed | peak memory, GiB | predicted | predicted / measured |"
    )
    lines = [
        f"{title}{'; tiny sizes, which say nothing about speed' if record.get('small') else ''}:",
        *(["", heading, "| --- " * 10 + "|"] if steps else []),
        *(f"| {' | '.join(step_cells(name, stage['result']))} |" for name, stage in steps.items()),
        *("", "| stage | result |", "| --- | --- |"),
        *(f"| {name} | {shown(name, stage)} |" for name, stage in stages.items() if name not in steps),
    ]
    return "\n".join(lines) + "\n"


def step_cells(name: str, result: Result) -> list[str]:
    """The cells of a training step, `step: network, images, precision, options`."""
    network, images, precision, *options = name.removeprefix("step: ").split(", ")
    median, least, most = (1000 * seconds for seconds in result["seconds_per_step"]["ours"])
    peak, predicted = result["peak_memory_bytes"].get("ours"), result["predicted_memory_bytes"]
    return [
        *(network, images, precision, ", ".join(options)),
        f"{result['images_per_second']['ours']:,.0f}",
        f"{median:.1f} [{least:.1f}, {most:.1f}]",
        f"{result['model_flops_utilization']:.1%}",
        f"{peak / 2**30:.1f}" if peak else "-",
        f"{predicted / 2**30:.1f}",
        f"{predicted / peak:.2f}" if peak else "-",
    ]


def shown(name: str, stage: Result) -> str:
    """Status, unless it is ok, and the result in words."""
    words = [f"**{stage['status']}** {stage.get('reason', '')}".strip()] if stage["status"] != "ok" else []
    form = FORMS.get(name.partition(",")[0])
    if form and stage.get("result"):
        try:
            words.append(form(stage["result"]))
        except (KeyError, TypeError, ValueError) as error:
            words.append(f"an incomplete result: {type(error).__name__} {error}")
    return "; ".join(words).replace("|", "/").replace("\n", " ")


# --- Results in words ------------------------------------------------------------------------------------------------


def agreement(result: Result) -> str:
    parts = []
    for precision in ("fp32", "bf16"):
        if found := result.get(precision):
            differences = (f"{name} {small_number(value)}" for name, value in found["differences"].items())
            verdict = "agrees" if found["agrees"] else "**differs**"
            parts.append(f"{precision} {verdict}, relative differences: {', '.join(differences)}")
    return "; ".join(parts)


def small_number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.1e}"


def attention(result: Result) -> str:
    parts = []
    for precision, found in result["results"].items():
        ways = (
            f"{name} {time:.3g}" + (f" ({found['ratio'][f'{name} / sdpa'][0]:.2f} of sdpa)" if name != "sdpa" else "")
            for name, time in found["milliseconds"].items()
        )
        parts.append(f"{precision}, ms: {', '.join(ways)}")
        parts += not_run(found)
    return "; ".join(parts)


def tests(result: Result) -> str:
    counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(result["tests"].items()))
    return "; ".join([counts, *(line.partition(" ")[2] for line in result["failures"])])


def data(result: Result) -> str:
    parts = (
        f"crops by the {place}: {found['images_per_second']['ours']:,.0f} images/s"
        for place in ("device", "cpu")
        if (found := result.get(place))
    )
    return "; ".join(parts)


def training(result: Result) -> str:
    parts = []
    for name in ("run", "resumed"):
        if found := result.get(name):
            parts.append(f"{name} to step {found['steps']}")
            parts[-1] += f" from {found['first_step']} in {found['seconds']:.0f} s" if "seconds" in found else ""
            parts[-1] += f", {1000 * found['seconds_per_step']:.1f} ms per step" if found["seconds_per_step"] else ""
            if losses := [found[key] for key in ("first_loss", "last_loss") if found.get(key) is not None]:
                parts[-1] += f", loss {' to '.join(f'{loss:.3f}' for loss in losses)}"
    for name, accuracies in result.get("accuracy", {}).items():
        parts.append(f"k-NN of {name}: " + ", ".join(f"{value:.1f} % (k = {k})" for k, value in accuracies.items()))
    return "; ".join(parts)


def rows(result: Result) -> str:
    return "; ".join(
        f"{dtype}, ms: " + ", ".join(f"{way} {times[0]:.3f}" for way, times in ways.items())
        for dtype, ways in result["milliseconds"].items()
    )


def features(result: Result) -> str:
    speeds = ", ".join(f"{name} {speed:,.0f}" for name, speed in result["images_per_s"].items())
    return "; ".join([f"images/s: {speeds}", *time_ratios(result), *not_run(result)])


def nearest(result: Result) -> str:
    times = ", ".join(f"{name} {time:.3f} s" for name, time in result["seconds"].items())
    return "; ".join([times, *time_ratios(result)])


def time_ratios(result: Result) -> list[str]:
    return [f"{name} {median:.2f} [{least:.2f}, {most:.2f}]" for name, (median, least, most) in result["ratio"].items()]


def not_run(result: Result) -> list[str]:
    return [f"{name} did not run: {reason}" for name, reason in result.get("not_run", {}).items()]


FORMS: dict[str, Callable[[Result], str]] = {
    "agreement": agreement,
    "attention": attention,
    "tests": tests,
    "data": data,
    "training": training,
    "rows": rows,
    "features": features,
    "k-NN": nearest,
}
