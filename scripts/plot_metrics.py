"""Draws the loss terms and schedules of a training run.

python scripts/plot_metrics.py OUT/training_metrics.json [--output OUT/losses.png]
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

SCHEDULES = {"lr": "learning rate", "mom": "teacher momentum"}


def read_metrics(path: Path) -> dict[str, list[float]]:
    """The columns of a metrics file, `iteration` among them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is empty.
    """
    records = [json.loads(line) for line in path.read_text().splitlines()]
    if not records:
        raise ValueError(f"{path} is empty")
    return {name: [record.get(name, math.nan) for record in records] for name in records[0]}


def plot_metrics(path: Path, output: Path, title: str = "") -> None:
    """One panel for the total loss, one for each term, one for each schedule, over the iterations."""
    from matplotlib.figure import Figure

    metrics = read_metrics(path)
    iterations = metrics["iteration"]
    terms = [name for name in metrics if name.endswith("_loss") and name != "total_loss"]
    columns = max(math.ceil(len(terms) / 2), 1)
    cells = terms + ["."] * (2 * columns - len(terms))
    mosaic: Any = [["total_loss", *cells[:columns], "lr"], ["total_loss", *cells[columns:], "mom"]]
    figure = Figure(figsize=(4.6 + 3.2 * (columns + 1), 5.6), layout="constrained")
    axes = figure.subplot_mosaic(mosaic, width_ratios=[1.6] + [1] * (columns + 1))
    for name, panel in axes.items():
        colour = "tab:green" if name in SCHEDULES else "tab:blue"
        panel.plot(iterations, metrics[name], color=colour, linewidth=2, marker=".")
        panel.set_title(SCHEDULES.get(name, name.replace("_", " ")))
        panel.set_xlabel("step")
        panel.grid(alpha=0.3)
    figure.suptitle(title or str(path))
    figure.savefig(output, dpi=110)


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Plot a training run's losses and schedules")
    parser.add_argument("metrics", type=Path, help="training_metrics.json of a run")
    parser.add_argument("--output", type=Path, help="picture to write (default: losses.png beside the metrics)")
    return parser


def main(args: argparse.Namespace) -> int:
    output = args.output or args.metrics.with_name("losses.png")
    plot_metrics(args.metrics, output)
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main(get_args_parser().parse_args()))
