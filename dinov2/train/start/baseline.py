"""The starting model as the first row of a run from weights, measured before the first step."""

import logging
from pathlib import Path

from dinov2 import distributed
from dinov2.config import Config
from dinov2.metrics_file import append_json
from dinov2.train.monitor.best_teacher import rate_teacher
from dinov2.train.monitor.starting_point import START, START_FOLDER
from dinov2.train.monitor.target_stats import HealthPanel
from dinov2.train.network_files import save_teacher
from dinov2.train.ssl_meta_arch import SSLMetaArch

logger = logging.getLogger(__name__)


def measure_baseline(cfg: Config, model: SSLMetaArch, panel: HealthPanel, metrics_file: Path) -> None:
    """Record the metrics and features of the starting model, and save it as a teacher like those that follow."""
    if panel.probe is None:
        return
    measured = panel.measure_start()
    if distributed.is_main():
        append_json(metrics_file, {"iteration": START, **measured})
    if cfg.evaluation.eval_period_iterations > 0:
        folder = metrics_file.parent / "eval" / START_FOLDER
        save_teacher(model.teacher, folder / "teacher_checkpoint.pth")
        if distributed.is_main():
            rate_teacher(folder, START, measured, cfg.health.best_by)
