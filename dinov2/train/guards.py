"""Guards that stop a run: against losses or gradients that are not finite, and too many unreadable images."""

import logging
from collections import deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dinov2 import distributed
from dinov2.data.collate import Batch

logger = logging.getLogger(__name__)


class _Check(NamedTuple):
    """Which values of a step were not finite on any process."""

    names: tuple[str, ...]
    nonfinite: Tensor  # 0 or 1 for each name, on the CPU once `copied`
    copied: torch.cuda.Event | None  # None: on the CPU already


class NonFiniteGuard:
    """Skips steps whose losses or gradients are not finite, on all processes alike, and stops the run after too many.

    The decision is a tensor on the device, for `optim.step_unless`. It is logged one step later, so that the host never
    waits for the current step of the device. `max_in_a_row` consecutive skipped steps stop the run.
    """

    def __init__(self, max_in_a_row: int) -> None:
        self.max_in_a_row = max_in_a_row
        self.in_a_row = 0
        self._unreported: deque[_Check] = deque()

    def refused(self, terms: Mapping[str, Tensor], norms: Mapping[str, Tensor]) -> Tensor:
        """Returns a scalar: 1 if any loss term or gradient of a sub-module is not finite on any process, else 0."""
        values = {f"loss {name}": value for name, value in terms.items()}
        values |= {f"gradient of {name}": value for name, value in norms.items()}
        nonfinite = ~torch.stack([value.detach().float() for value in values.values()]).isfinite()
        nonfinite = distributed.all_reduce_max(nonfinite.float())
        self._unreported.append(_Check(tuple(values), *_fetch(nonfinite)))
        return nonfinite.amax()

    def is_over(self) -> bool:
        """Whether the last reported step was not skipped, in any run of the job; all processes must call this."""
        with distributed.whole_job():
            return int(distributed.all_reduce_max(torch.tensor(self.in_a_row))) == 0

    def report(self, scaler: torch.amp.GradScaler, *, all_steps: bool = False) -> None:
        """Log skipped steps before the latest one; with `all_steps` also that one, for which the host then waits.

        Occasional overflows of gradients are how a gradient scaler finds its scale. They do not count as long as the
        losses are finite and the scale is above 1. Too many consecutive skipped steps are a FloatingPointError.
        """
        while len(self._unreported) > (0 if all_steps else 1):
            check = self._unreported.popleft()
            if check.copied is not None:
                check.copied.synchronize()
            self._report_step(
                [name for name, bad in zip(check.names, check.nonfinite.tolist(), strict=True) if bad], scaler
            )

    def _report_step(self, culprits: Sequence[str], scaler: torch.amp.GradScaler) -> None:
        if not culprits:
            self.in_a_row = 0
            return
        named = ", ".join(culprits)
        if scaler.get_scale() > 1 and not any(culprit.startswith("loss") for culprit in culprits):
            logger.info("step skipped by the gradient scaler, whose scale is now %g: %s", scaler.get_scale(), named)
            return
        self.in_a_row += 1
        logger.warning("step skipped, not finite: %s (%d in a row)", named, self.in_a_row)
        if self.in_a_row >= self.max_in_a_row:
            raise FloatingPointError(
                f"{self.in_a_row} steps in a row were not finite ({named}); weights are unchanged since the last "
                f"finite one. Remedies: a lower optim.base_lr, a longer optim.warmup_epochs, bf16 or fp32 instead "
                f"of fp16, and an older checkpoint if the weights of the newest one are damaged "
                f"(train.max_nonfinite_steps={self.max_in_a_row} sets this limit)"
            )


class BadImageGuard:
    """Logs unreadable images, which the loader replaces by others, and stops a run with more than a share of them.

    Each image is logged once with its reason, up to `MAX_LINES` images. Repetitions and further images are counted, and
    logged whenever their number has doubled.
    """

    MIN_IMAGES = 200  # minimum number of images for a meaningful fraction

    MAX_LINES = 100

    def __init__(self, max_share: float) -> None:
        self.max_share = max_share
        self.seen = 0
        self.bad = 0
        self._logged: set[str] = set()
        self._last = ""
        self._next_summary = self.MAX_LINES

    def check(self, batches: Sequence[Batch]) -> None:
        """Count the images of some batches; an OSError if the fraction of unreadable ones is above the limit."""
        bad_images = [bad for batch in batches for bad in batch.bad_images]
        self.seen += sum(len(batch.global_crops) // 2 for batch in batches) + len(bad_images)
        self.bad += len(bad_images)
        for bad in bad_images:
            self._log(bad)
        if self.bad > self.max_share * self.seen and self.seen >= self.MIN_IMAGES:
            number = f"{len(self._logged)} or more" if len(self._logged) == self.MAX_LINES else len(self._logged)
            raise OSError(
                f"{self.bad} of the first {self.seen} images drawn ({number} different) could not be read, more than "
                f"train.max_bad_image_share={self.max_share}: remove them or raise it; the last one was {self._last}"
            )

    def _log(self, bad: str) -> None:
        self._last = bad
        counted = f"unreadable image replaced by another ({self.bad} of {self.seen} drawn)"
        if bad not in self._logged and len(self._logged) < self.MAX_LINES:
            self._logged.add(bad)
            logger.warning("%s: %s", counted, bad)
        elif self.bad >= self._next_summary:
            self._next_summary = 2 * self.bad
            logger.warning("%s; the latest one not logged individually: %s", counted, bad)


def _fetch(values: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """Start copying values to the CPU; returns the copy, and an event that signals its completion."""
    if not values.is_cuda:
        return values, None
    copy = values.to("cpu", non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return copy, copied
