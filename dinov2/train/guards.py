"""What stops a run before it does harm: losses or gradients that are not finite, too many unreadable images."""

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dinov2 import distributed
from dinov2.data.collate import Batch

logger = logging.getLogger(__name__)


class NonFiniteGuard:
    """Tells whether a step may be taken, on all processes alike; raises after `max_in_a_row` refusals in a row."""

    def __init__(self, max_in_a_row: int) -> None:
        self.max_in_a_row = max_in_a_row
        self.in_a_row = 0

    def accepts(self, terms: Mapping[str, Tensor], norms: Mapping[str, Tensor], loss_scale: float) -> bool:
        """Whether every loss term and the gradient of every sub-module are finite; to be asked before the step.

        A gradient that overflows now and then is how a gradient scaler finds its scale: refused, but not counted as
        long as the losses are finite and the scaler can lower the scale (1 without a scaler) to a sensible one.

        Raises:
            FloatingPointError: if too many steps in a row were refused.
        """
        losses = {f"loss {name}": value for name, value in terms.items()}
        gradients = {f"gradient of {name}": value for name, value in norms.items()}
        culprits = _culprits(losses | gradients)
        if not culprits:
            self.in_a_row = 0
            return True
        if loss_scale > 1 and not any(culprit.startswith("loss") for culprit in culprits):
            logger.info("step skipped by the gradient scaler at %g: %s", loss_scale, ", ".join(culprits))
            return False
        self.in_a_row += 1
        logger.warning("step skipped, not finite: %s (%d in a row)", ", ".join(culprits), self.in_a_row)
        if self.in_a_row >= self.max_in_a_row:
            raise FloatingPointError(
                f"{self.in_a_row} steps in a row were not finite ({', '.join(culprits)}); weights and checkpoints are "
                f"those of the last good step. Usual cures: a lower optim.base_lr, a longer optim.warmup_epochs, "
                f"bf16 or fp32 instead of fp16 (train.max_nonfinite_steps={self.max_in_a_row} sets the patience)"
            )
        return False


class BadImageGuard:
    """Logs unreadable images, which the loader has replaced by others, and stops a run that has too many."""

    PATIENCE = 200
    """Images to see before a share means anything."""

    def __init__(self, max_share: float) -> None:
        self.max_share = max_share
        self.seen = 0
        self.bad = 0

    def check(self, batches: Sequence[Batch]) -> None:
        """Count the images of some batches.

        Raises:
            OSError: if the share of unreadable images so far is above the limit.
        """
        bad_images = [path for batch in batches for path in batch.bad_images]
        self.seen += sum(len(batch.global_crops) // 2 for batch in batches)
        self.bad += len(bad_images)
        for path in bad_images:
            logger.warning("unreadable image replaced by another (%d of %d so far): %s", self.bad, self.seen, path)
        if self.bad > self.max_share * self.seen and self.seen >= self.PATIENCE:
            raise OSError(
                f"{self.bad} of the first {self.seen} images could not be read, more than train.max_bad_image_share="
                f"{self.max_share}; the last one was {bad_images[-1] if bad_images else 'named above'}"
            )


def _culprits(values: Mapping[str, Tensor]) -> list[str]:
    """Names of the values that are not finite on any process: one reduction and one look for all of them."""
    broken = torch.stack([(~value.detach().isfinite()).any().float() for value in values.values()])
    flags = distributed.all_reduce_max(broken).tolist()
    return [name for name, flag in zip(values, flags, strict=True) if flag]
