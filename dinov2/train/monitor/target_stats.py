"""Health metrics of a run, without labels.

Statistics of the teacher's targets and of the step are measured at every logged step, features of fixed images less
often (`probe.py`). `dinov2.metric_names` describes all metrics, `alarms.py` interprets them.

Shapes: R rows of targets (class or masked patch tokens of all processes), K prototypes, D feature width.
"""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinov2 import distributed
from dinov2.analysis.feature_statistics import nearest_distance
from dinov2.config import Config
from dinov2.data.datasets.base import ImageDataset
from dinov2.train.monitor.probe import Probe
from dinov2.train.parallel import is_sharded, local_tensors
from dinov2.train.schedules import is_due
from dinov2.train.ssl_meta_arch import NUM_GLOBAL_CROPS, Predictions, SSLMetaArch, Targets

logger = logging.getLogger(__name__)

MAX_ROWS = 1024  # of one kind of targets, micro-batch and process; more would only cost time
ROWS_AT_ONCE = 64


class TargetStats:
    """Statistics of the targets and features of a step, accumulated over its micro-batches."""

    def __init__(self) -> None:
        self._sums_of: dict[str, list[Tensor]] = {}
        self._distances: list[Tensor] = []

    @torch.no_grad()
    def add(self, targets: Targets, predictions: Predictions) -> None:
        """Add the targets and predictions of one micro-batch."""
        kinds = {"cls": None if targets.cls is None else targets.cls.flatten(0, 1), "patch": targets.patch}
        for kind, rows in kinds.items():
            if rows is not None:
                self._sums_of.setdefault(kind, []).append(_sums(rows))
        one_crop = predictions.features.detach().chunk(NUM_GLOBAL_CROPS)[0]
        if len(one_crop) > 1:
            self._distances.append(nearest_distance(one_crop))

    def compute(self) -> dict[str, Tensor | float]:
        """Compute the metrics by name (meanings in `dinov2.metric_names`); all processes must call it together.

        `<kind>_target_...` for `<kind>` in cls, patch are over the rows of all processes: entropy is the mean of a
        row; information the entropy of the mean row less that, and capacity, ln min(R, K), its maximum; perplexity
        the exponential of the entropy of the mean row. `koleo_distance` is within the batch of each process.
        """
        measured: dict[str, Tensor | float] = {}
        for kind, parts in self._sums_of.items():
            sums = distributed.all_reduce_sum(torch.stack(parts).sum(dim=0))
            (total, entropies), by_prototype = sums[:2], sums[2:].unflatten(0, (2, -1))
            total = total.clamp_min(1)  # masks may be missing in a batch
            target, winners = by_prototype / total
            of_mean = torch.special.entr(target).sum()
            capacity = total.clamp_max(len(target)).log()
            measured |= {
                f"{kind}_target_entropy": entropies / total,
                f"{kind}_target_information": of_mean - entropies / total,
                f"{kind}_target_perplexity": of_mean.exp(),
                f"{kind}_target_capacity": capacity,
                f"{kind}_prototypes_used": (winners > 0).sum(),
                f"{kind}_largest_prototype": winners.max(),
            }
        if self._distances:
            measured["koleo_distance"] = distributed.all_reduce_mean(torch.stack(self._distances).mean())
        return measured


def _sums(rows: Tensor) -> Tensor:
    """Sums over targets (R, K): count, entropies, targets (K,), and how often each entry is the largest (K,)."""
    rows = rows[:: math.ceil(len(rows) / MAX_ROWS)] if len(rows) else rows
    entropies = rows.new_zeros(())
    for part in rows.split(ROWS_AT_ONCE):
        entropies += torch.special.entr(part).sum()
    largest = rows.argmax(dim=1) if len(rows) else rows.new_empty(0, dtype=torch.int64)
    # Not by `bincount` and `new_tensor`, for which the host waits for the device.
    winners = rows.new_zeros(rows.shape[1]).index_add_(0, largest, rows.new_ones(len(rows)))
    counts = torch.stack([rows.new_full((), len(rows)), entropies])
    return torch.cat([counts, rows.sum(dim=0), winners])


class HealthPanel:
    """Measures health at logged steps, every `health.period` steps (0: never), and with saved teachers."""

    def __init__(self, cfg: Config, model: SSLMetaArch, dataset: ImageDataset, *, last_step: int) -> None:
        self.model = model
        self.last_step = last_step
        self.period, self.dump_period = cfg.health.period, cfg.evaluation.eval_period_iterations
        self.probe = Probe(cfg, model, dataset) if self.period else None
        has_labels = self.probe is not None and self.probe.has_labels
        self.knn_period = (cfg.health.knn_period or 0) if has_labels else 0
        self.folder = Path(cfg.train.output_dir)

    def measure_start(self) -> dict[str, float]:
        """Measure and keep the features of the model that the run starts from, before the first step."""
        assert self.probe is not None, "something is measured"
        measured = self.probe.measure(is_start=True) | self.probe.measure_by_labels()
        if self.probe.start is not None and distributed.is_main():
            try:
                self.probe.start.save(self.folder / "health")
            except OSError as error:  # on one process only, for which the others would wait
                logger.warning("%s: after an interruption the run will not be compared with its start", error)
        logger.info("health of the starting model: %s", _summary(measured))
        return measured

    def target_stats(self, step: int, *, line_is_due: bool) -> TargetStats | None:
        """New statistics for the targets of a step; None if nothing is measured in it."""
        probe_is_due = self._is_due(step, self.period, self.dump_period, self.knn_period)
        return TargetStats() if self.probe and (line_is_due or probe_is_due) else None

    def _is_due(self, step: int, *periods: int) -> bool:
        """Whether a step is the first or last of the run, or the last of one of the periods."""
        return step == 0 or any(is_due(step, period, self.last_step) for period in periods)

    def measure(self, step: int, stats: TargetStats | None, norms: Mapping[str, Tensor]) -> dict[str, float]:
        """Metrics of a finished step by name, with gradient `norms` by sub-module; empty without `stats`."""
        if stats is None or self.probe is None:
            return {}
        values = stats.compute()
        values |= {f"grad_norm_{name}": norm for name, norm in norms.items()}
        values["student_teacher_distance"] = relative_distance(self.model.student, self.model.teacher)
        if self._is_due(step, self.period, self.dump_period, self.knn_period):
            measured = self.probe.measure()
            if self._is_due(step, self.dump_period, self.knn_period):
                measured |= self.probe.measure_by_labels()
            logger.info("health at step %d: %s", step, _summary(measured))
            if step == 0 and (frozen := self.probe.measure_frozen_teacher()):
                logger.info("the teacher of the distillation: %s", _accuracies(frozen, "frozen_teacher_"))
                measured |= frozen
            values |= measured
            if self._is_due(step, self.dump_period):
                self.probe.save_patch_features(self.folder / "health", step)
        # Fetched together, so that the host waits once.
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        fetched = torch.stack([tensor.double() for tensor in tensors.values()]).tolist()
        numbers = dict(zip(tensors, fetched, strict=True))
        return {name: numbers[name] if name in numbers else float(value) for name, value in values.items()}


def _summary(measured: Mapping[str, float]) -> str:
    """The most important metrics of the probe, for the log."""
    ranks = f"effective rank {measured['probe_cls_rank_me']:.1f} (class tokens), {measured['probe_patch_rank_me']:.1f}"
    similarity = f"patch similarity {measured['probe_patch_similarity']:.2f}"
    return ", ".join(filter(None, [f"{ranks} (patches)", similarity, _accuracies(measured)]))


def _accuracies(measured: Mapping[str, float], prefix: str = "") -> str:
    """What was measured by labels, of names with a prefix; "" without labels."""
    texts = {"knn": "k-NN {:.1f} %", "patch_knn_miou": "k-NN of patches {:.1f} % mIoU"}
    return ", ".join(text.format(measured[prefix + name]) for name, text in texts.items() if prefix + name in measured)


@torch.no_grad()
def relative_distance(student: nn.Module, teacher: nn.Module) -> Tensor:
    """|student - teacher| / |teacher| over all parameters, sharded or not; a scalar, equal on all processes."""
    ours, theirs = list(student.parameters()), list(teacher.parameters())
    averages = local_tensors(theirs)
    differences = torch._foreach_sub(local_tensors(ours), averages)
    copies = [math.sqrt(distributed.world_size() / _num_shards(average)) for average in theirs]
    norms = torch._foreach_norm(differences) + torch._foreach_norm(averages)
    shares = torch.stack(torch._foreach_div(norms, copies + copies)).float().square()
    difference, size = distributed.all_reduce_sum(shares.unflatten(0, (2, -1)).sum(dim=1))
    return (difference / size).sqrt()


def _num_shards(tensor: Tensor) -> int:
    """The number of different shards of a tensor over all processes."""
    if not is_sharded(tensor):
        return 1
    sharded: Any = tensor
    mesh, placements = sharded.device_mesh, sharded.placements
    return math.prod(mesh.size(dim) for dim, placed in enumerate(placements) if placed.is_shard())
