"""Training of a head on the frozen tokens of a backbone: one loop for segmentation and depth, resumed exactly."""

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from dinov2 import distributed
from dinov2.data.randomness import seed_for
from dinov2.eval.dense.process_wide import make_process_wide
from dinov2.eval.dense.protocols import Training
from dinov2.eval.linear_checkpoint import LinearCheckpointer
from dinov2.eval.skip_unreadable import skip_unreadable_batches
from dinov2.files import atomic_write
from dinov2.meters import MetricLogger

logger = logging.getLogger(__name__)

RUNNING, FINAL, BEST = "running_checkpoint_head", "head_final", "head_best.pth"

Layers = list[tuple[Tensor, Tensor]]
Score = dict[str, float]


class HeadRun(NamedTuple):
    """Where and how often a training is saved and validated."""

    output_dir: Path
    resume: bool
    eval_period: int  # iterations between validations
    save_period: int  # iterations between checkpoints that are overwritten
    identity: dict[str, Any]  # settings; a checkpoint of others is refused
    validated_on: str
    best_by: str | None = None  # score by which the best validated head is kept; None: the last one is kept
    seed: int = 0


def train_head(
    head: nn.Module,
    features: Callable[[Tensor], Layers],
    loss_of: Callable[[nn.Module, Layers, Tensor, int], Tensor],
    batches_from: Callable[[int], Iterable[tuple[Tensor, Tensor]]],
    validate: Callable[[], Score],
    training: Training,
    run: HeadRun,
) -> list[dict[str, Any]]:
    """Train a head in place, from the newest checkpoint if there is one; returns the history of validations.

    Args:
        head: The trained module; its batch norms and dropouts act on the images of all processes.
        features: Images (B, 3, h, w) -> patch tokens (B, D, h', w') and class token (B, D) of each layer, frozen.
        loss_of: (head, layers, maps, iteration) -> loss of the batch of this process; all batches have equal weight.
        batches_from: Iteration -> batches of this rank from there on.
        validate: Scores of the head as it is, by all processes together.
        training, run: Settings.
    """
    device = distributed.device()
    make_process_wide(head)
    optimizer = AdamW(
        head.parameters(), lr=training.learning_rate, betas=training.betas, weight_decay=training.weight_decay
    )
    scheduler = LambdaLR(optimizer, training.lr_factor)
    checkpointer = LinearCheckpointer(
        run.output_dir, head, optimizer, scheduler, run=run.identity, validated_on=run.validated_on
    )
    start, history = checkpointer.load_latest() if run.resume else (0, [])
    model = DistributedDataParallel(head) if distributed.is_enabled() else head
    best = _BestHead(run)
    progress = MetricLogger("  ", is_main=distributed.is_main())
    batches = skip_unreadable_batches(batches_from(start))
    logged = progress.log_every(batches, 50, "Training:", training.iterations, start)
    for step, (images, maps) in enumerate(logged, start):
        layers = features(images.to(device, non_blocking=True))
        torch.manual_seed(seed_for(run.seed, "dense dropout", step))
        loss = loss_of(model, layers, maps.to(device, non_blocking=True), step)
        optimizer.param_groups[0]["betas"] = (training.first_beta(step), training.betas[1])
        optimizer.zero_grad()
        loss.backward()
        if training.clip_norm is not None:
            nn.utils.clip_grad_norm_(head.parameters(), training.clip_norm)
        optimizer.step()
        progress.update(loss=loss.detach())
        progress.note(**({"lr": optimizer.param_groups[0]["lr"]} if progress.line_is_due() else {}))
        scheduler.step()

        finished = step + 1
        is_last = finished == training.iterations  # validated by the caller, unless the best head is kept
        if run.best_by is not None if is_last else finished % run.eval_period == 0:
            history.append({"iteration": finished, **_validated(head, validate)})
            logger.info("validation: %s", ", ".join(f"{name} {value:.5g}" for name, value in history[-1].items()))
            best.offer(head, history)
        if is_last or finished % run.save_period == 0:
            checkpointer.save(FINAL if is_last else RUNNING, step, history)
    best.restore(head, history)
    return history


class _BestHead:
    """The head of the best validation, in a file; a run that continues finds it there."""

    def __init__(self, run: HeadRun) -> None:
        self.key, self.path = run.best_by, run.output_dir / BEST

    def offer(self, head: nn.Module, history: list[dict[str, Any]]) -> None:
        """Keep the head if the last validation is better than all others."""
        if self.key is None or not distributed.is_main():
            return
        *earlier, last = (record[self.key] for record in history)
        if all(last > score for score in earlier):
            with atomic_write(self.path) as file:
                torch.save({"head": head.state_dict(), "score": last}, file)

    def restore(self, head: nn.Module, history: list[dict[str, Any]]) -> None:
        """Load the kept head into this one."""
        key = self.key
        if key is None:
            return
        distributed.barrier()
        kept = torch.load(self.path, map_location="cpu", weights_only=True)
        head.load_state_dict(kept["head"])
        number = max(range(len(history)), key=lambda index: history[index][key])
        logger.info("the head after iteration %d is used, the best of the validations", history[number]["iteration"])


def _validated(head: nn.Module, validate: Callable[[], Score]) -> Score:
    """Scores in evaluation mode; the random state of training is drawn anew in each step."""
    head.eval()
    scores = validate()
    head.train()
    return scores
