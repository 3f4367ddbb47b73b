"""What stops a run before it does harm: losses or gradients that are not finite, too many unreadable images."""

import logging
from collections import deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dinov2 import distributed
from dinov2.data.collate import Batch

logger = logging.getLogger(__name__)


class _Verdict(NamedTuple):
    """Which values of a step were not finite on any process."""

    names: tuple[str, ...]
    broken: Tensor  # of 0 and 1, on the CPU once `arrived`
    arrived: torch.cuda.Event | None  # None: it has


class NonFiniteGuard:
    """Refuses steps whose losses or gradients are not finite, on all processes alike, and stops after too many.

    The refusal is a number on the device, for `optim.step_unless`. What it was about is told one step later, so that
    the processor never waits for the step that the device is working on.

    Args:
        max_in_a_row: Refusals in a row that end the run.
    """

    def __init__(self, max_in_a_row: int) -> None:
        self.max_in_a_row = max_in_a_row
        self.in_a_row = 0
        self._unreported: deque[_Verdict] = deque()

    def refused(self, terms: Mapping[str, Tensor], norms: Mapping[str, Tensor]) -> Tensor:
        """1 if any loss term, or the gradient of any sub-module, is not finite on any process, else 0; a scalar."""
        values = {f"loss {name}": value for name, value in terms.items()}
        values |= {f"gradient of {name}": value for name, value in norms.items()}
        broken = torch.stack([(~value.detach().isfinite()).any().float() for value in values.values()])
        broken = distributed.all_reduce_max(broken)
        self._unreported.append(_Verdict(tuple(values), *_fetch(broken)))
        return broken.amax()

    def report(self, scaler: torch.amp.GradScaler, *, all_steps: bool = False) -> None:
        """Log the refusals of the steps before the latest one, or of `all_steps`.

        A gradient that overflows now and then is how a gradient scaler finds its scale: it does not count as long as
        the losses are finite and the scaler can lower the scale (1 without a scaler) to a sensible one.

        Raises:
            FloatingPointError: If too many steps in a row were refused.
        """
        while len(self._unreported) > (0 if all_steps else 1):
            verdict = self._unreported.popleft()
            if verdict.arrived is not None:
                verdict.arrived.synchronize()
            self._judge([name for name, bad in zip(verdict.names, verdict.broken.tolist(), strict=True) if bad], scaler)

    def _judge(self, culprits: Sequence[str], scaler: torch.amp.GradScaler) -> None:
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
                f"{self.in_a_row} steps in a row were not finite ({named}); no weight has moved since the last good "
                f"one. Usual cures: a lower optim.base_lr, a longer optim.warmup_epochs, bf16 or fp32 instead of fp16, "
                f"and without the newest checkpoint if its weights are ruined already "
                f"(train.max_nonfinite_steps={self.max_in_a_row} sets the patience)"
            )


class BadImageGuard:
    """Logs unreadable images, which the loader has replaced by others, and stops a run that has too many.

    Each image is logged once with its reason, and no more than `MAX_LINES` of them; what comes up again, or comes after
    those, is counted and logged whenever its number has doubled.
    """

    PATIENCE = 200
    """Images to see before a share means anything."""

    MAX_LINES = 100

    def __init__(self, max_share: float) -> None:
        self.max_share = max_share
        self.seen = 0
        self.bad = 0
        self._logged: set[str] = set()
        self._last = ""
        self._next_summary = self.MAX_LINES

    def check(self, batches: Sequence[Batch]) -> None:
        """Count the images of some batches.

        Raises:
            OSError: If the share of unreadable images so far is above the limit.
        """
        bad_images = [bad for batch in batches for bad in batch.bad_images]
        self.seen += sum(len(batch.global_crops) // 2 for batch in batches) + len(bad_images)
        self.bad += len(bad_images)
        for bad in bad_images:
            self._log(bad)
        if self.bad > self.max_share * self.seen and self.seen >= self.PATIENCE:
            raise OSError(
                f"{self.bad} of the first {self.seen} images drawn could not be read, more than "
                f"train.max_bad_image_share={self.max_share}; the last one was {self._last}"
            )

    def _log(self, bad: str) -> None:
        self._last = bad
        counted = f"unreadable image replaced by another ({self.bad} of {self.seen} drawn)"
        if bad not in self._logged and len(self._logged) < self.MAX_LINES:
            self._logged.add(bad)
            logger.warning("%s: %s", counted, bad)
        elif self.bad >= self._next_summary:
            self._next_summary = 2 * self.bad
            logger.warning("%s; the latest, among such as are not logged one by one: %s", counted, bad)


def _fetch(values: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """Begin to copy values to the CPU; the event says when they are there."""
    if not values.is_cuda:
        return values, None
    copy = values.to("cpu", non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return copy, arrived
