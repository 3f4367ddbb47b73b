"""How a run is, without labels: numbers that the loss does not tell.

What the teacher asks for, and what a step did, at every line of the log. What the features of fixed images are like is
looked at less often, see `probe.py`. What all this means is said by `alarms.py`.

Legend: R rows of targets (class or masked patch tokens of all processes), K prototypes, D width.
"""

import logging
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dinov2 import distributed
from dinov2.analysis.feature_statistics import nearest_distance
from dinov2.config import Config
from dinov2.data.datasets.base import ImageDataset
from dinov2.train.monitor.probe import Probe
from dinov2.train.schedules import is_due
from dinov2.train.ssl_meta_arch import NUM_GLOBAL_CROPS, Predictions, SSLMetaArch, Targets

logger = logging.getLogger(__name__)

MAX_ROWS = 1024  # of one kind, micro-batch and process; more would cost time and tell nothing new
ROWS_AT_ONCE = 64


class TargetStats:
    """Sums over the targets and features of a step, micro-batch by micro-batch."""

    def __init__(self) -> None:
        self._of_kinds: dict[str, list[Tensor]] = {}
        self._distances: list[Tensor] = []

    @torch.no_grad()
    def add(self, targets: Targets, predictions: Predictions) -> None:
        """Take in what one micro-batch gave."""
        kinds = {"cls": None if targets.cls is None else targets.cls.flatten(0, 1), "patch": targets.patch}
        for kind, rows in kinds.items():
            if rows is not None:
                self._of_kinds.setdefault(kind, []).append(_sums(rows))
        one_crop = predictions.features.detach().chunk(NUM_GLOBAL_CROPS)[0]
        if len(one_crop) > 1:
            self._distances.append(nearest_distance(one_crop))

    def measured(self) -> dict[str, Tensor | float]:
        """The numbers by name, those of the targets over the rows of all processes; all processes must ask.

        `<kind>_target_entropy`: the mean entropy of a row, nats. `<kind>_target_information`: the entropy of the mean
        row less that, nats: what targets tell about their images, 0 if they are all alike.
        `<kind>_target_capacity`: ln min(R, K), nats: how much they could tell.
        `<kind>_target_perplexity`: the exponential of the former: how many prototypes the batch is spread over.
        `<kind>_prototypes_used`: how many are the largest of some row; `<kind>_largest_prototype`: the share of rows
        whose largest is the most frequent one. `koleo_distance`: from a class token of the student to the nearest one
        in its process's batch, at unit length.
        """
        measured: dict[str, Tensor | float] = {}
        for kind, parts in self._of_kinds.items():
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
    """Of targets (R, K): their number, the sum of their entropies, their sum (K,), how many are largest where (K,)."""
    rows = rows[:: math.ceil(len(rows) / MAX_ROWS)] if len(rows) else rows
    entropies = rows.new_zeros(())
    for part in rows.split(ROWS_AT_ONCE):
        entropies += torch.special.entr(part).sum()
    largest = rows.argmax(dim=1) if len(rows) else rows.new_empty(0, dtype=torch.int64)
    winners = torch.bincount(largest, minlength=rows.shape[1])
    counts = torch.stack([rows.new_tensor(float(len(rows))), entropies])
    return torch.cat([counts, rows.sum(dim=0), winners.to(rows.dtype)])


class HealthPanel:
    """When what is measured: at every line of the log, every `health.period` steps, and with every teacher dump.

    Args:
        cfg: of the run; `health.period` = 0 measures nothing, ever.
        model: has `student` and `teacher`.
        dataset: that is trained on.
        last_step: of the run.
    """

    def __init__(self, cfg: Config, model: SSLMetaArch, dataset: ImageDataset, *, last_step: int) -> None:
        self.model = model
        self.last_step = last_step
        self.period, self.dump_period = cfg.health.period, cfg.evaluation.eval_period_iterations
        self.probe = Probe(cfg, model, dataset) if self.period else None
        has_labels = self.probe is not None and self.probe.labeled is not None
        self.knn_period = (cfg.health.knn_period or 0) if has_labels else 0
        self.folder = Path(cfg.train.output_dir)

    def watch(self, step: int, *, line_is_due: bool) -> TargetStats | None:
        """What is to see the targets of a step, if anything is measured in it."""
        looked_at = self._is_due(step, self.period, self.dump_period, self.knn_period)
        return TargetStats() if self.probe and (line_is_due or looked_at) else None

    def _is_due(self, step: int, *periods: int) -> bool:
        """Whether one of the periods ends with a step, or the run begins or ends with it."""
        return step == 0 or any(is_due(step, period, self.last_step) for period in periods)

    def measured(self, step: int, watch: TargetStats | None, norms: Mapping[str, Tensor]) -> dict[str, float]:
        """What is known of a step when it is done, by name; see `TargetStats.measured` and `Probe`.

        And `grad_norm_<sub-module>` before clipping, `student_teacher_distance` (`relative_distance`).
        """
        if watch is None or self.probe is None:
            return {}
        values = watch.measured()
        values |= {f"grad_norm_{name}": norm for name, norm in norms.items()}
        values["student_teacher_distance"] = relative_distance(self.model.student, self.model.teacher)
        if self._is_due(step, self.period, self.dump_period, self.knn_period):
            looked = self.probe.look()
            if self._is_due(step, self.dump_period, self.knn_period):
                looked |= self.probe.knn()
            logger.info("health at step %d: %s", step, _in_words(looked))
            values |= looked
            if self._is_due(step, self.dump_period):
                self.probe.save_patch_features(self.folder / "health", step)
        return {name: float(value) for name, value in values.items()}


def _in_words(looked: Mapping[str, float]) -> str:
    """The numbers of a look that a person follows."""
    cls, patch = looked["probe_cls_rank_me"], looked["probe_patch_rank_me"]
    words = [
        f"effective rank {cls:.1f} (class tokens), {patch:.1f} (patches)",
        f"patch similarity {looked['probe_patch_similarity']:.2f}",
    ]
    return ", ".join([*words, *([f"k-NN {looked['knn']:.1f} %"] if "knn" in looked else [])])


@torch.no_grad()
def relative_distance(student: nn.Module, teacher: nn.Module) -> Tensor:
    """|student - teacher| / |teacher| over all parameters, wherever their shards are; a scalar on all processes."""
    sums = []
    for mine, average in zip(student.parameters(), teacher.parameters(), strict=True):
        difference, size = (t.to_local() if isinstance(t, DTensor) else t for t in (mine - average, average))
        copies = distributed.world_size() / _num_shards(average)
        sums.append(torch.stack([difference.square().sum(), size.square().sum()]).float() / copies)
    difference, size = distributed.all_reduce_sum(torch.stack(sums).sum(dim=0))
    return (difference / size).sqrt()


def _num_shards(tensor: Tensor) -> int:
    """How many different parts of a tensor there are on all processes."""
    if not isinstance(tensor, DTensor):
        return 1
    mesh = tensor.device_mesh
    return math.prod(mesh.size(dim) for dim, placed in enumerate(tensor.placements) if placed.is_shard())
