"""Gram anchoring (DINOv3, section 4): similarities between patches stay those of an earlier model.

The earlier model, the Gram teacher, sees the global crops at a higher resolution and without changed colors. Its patch
tokens are brought to the grid of the student, whose similarities, of all patches of a global crop, follow its own.
"""

import logging
from typing import cast

import torch
from torch import Tensor, nn

from dinov2.config import Config, backbone_arguments, of_run
from dinov2.data.collate import Batch
from dinov2.loss.gram import gram_loss, gram_weight, resample_tokens
from dinov2.models import build_model
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.models.weights import check_numbers, load_state
from dinov2.train.parallel import local_tensors
from dinov2.train.schedules import num_steps
from dinov2.train.ssl_meta_arch import Losses, Predictions, SSLMetaArch, Targets
from dinov2.train.start.source_runs import (
    SAME_PIXELS,
    check_fits,
    check_heads,
    naming_key,
    teacher_backbone,
    weights_of_run,
)

logger = logging.getLogger(__name__)

_EQUAL = SAME_PIXELS | {"student.patch_size": "the anchor is a network like the student's"}


class GramAnchoringArch(SSLMetaArch):
    """Student and teacher, and the Gram teacher, which is part of checkpoints as it may come from this run."""

    def __init__(self, cfg: Config) -> None:
        super().__init__(cfg)
        backbone = build_model(**backbone_arguments(cfg), drop_path_rate=0.0)
        backbone.load_state_dict(self.teacher["backbone"].state_dict())
        self.gram_teacher = nn.ModuleDict({"backbone": backbone.requires_grad_(False)})
        self.gram_weight = 0.0

    @property
    def frozen_networks(self) -> list[nn.ModuleDict]:
        return [self.gram_teacher]

    def train(self, mode: bool = True) -> "GramAnchoringArch":
        super().train(mode)
        self.gram_teacher.eval()
        return self

    def load_frozen(self, *, resuming: bool = False) -> None:
        """Load the Gram teacher from `gram.teacher`, if it is an earlier run; a ValueError if it does not fit."""
        if not self.cfg.gram.teacher or resuming:  # a checkpoint has it
            return
        with naming_key("gram.teacher"):
            source = weights_of_run(self.cfg.gram.teacher)
            if (former := of_run(source)) is not None:
                check_fits(self.cfg.gram.teacher, former, self.cfg, _EQUAL)
                check_heads(self.cfg.gram.teacher, former, self.cfg)
            state = teacher_backbone(source)
            check_numbers(state, str(source))
            backbone = cast(DinoVisionTransformer, self.gram_teacher["backbone"])
            load_state(backbone, state, str(source), assign=backbone.cls_token.is_meta)
            backbone.requires_grad_(False)
        logger.info("Gram teacher: %s", source)

    def stage_facts(self) -> dict[str, str]:
        gram, last = self.cfg.gram, num_steps(self.cfg)
        copies = [str(step) for step in range(last) if is_refresh_due(self.cfg, step)]
        of_run = f"the teacher of this run before step {', '.join(copies) or 'none'}"
        rise = f", rising for {gram.rise_steps:,} steps" if gram.rise_steps else ""
        weight = f"weight {gram.loss_weight:g} from step {gram.start_step:,}{rise}"
        return {"Gram anchoring": f"{weight}; anchor: {gram.teacher or of_run}"}

    def begin_step(self, step: int) -> None:
        """Set the weight of a step, and copy the teacher to the Gram teacher if it is due."""
        gram = self.cfg.gram
        self.gram_weight = gram_weight(
            step,
            start=0.0,
            peak=0.0,
            end=gram.loss_weight,
            warmup_steps=gram.start_step,
            total_steps=num_steps(self.cfg),
            cosine_steps=gram.rise_steps,
        )
        if not gram.teacher and is_refresh_due(self.cfg, step):
            with torch.no_grad():
                copies, latest = (
                    local_tensors(networks["backbone"].parameters()) for networks in (self.gram_teacher, self.teacher)
                )
                torch._foreach_copy_(copies, latest)
            logger.info("step %d: the Gram teacher is the teacher of this run now", step)

    def losses(self, batch: Batch, targets: Targets, predictions: Predictions) -> Losses:
        """The terms of pretraining, and the Gram loss from the step on at which it has a weight."""
        losses = super().losses(batch, targets, predictions)
        if self.gram_weight == 0:
            return losses
        assert predictions.patches is not None, "they are computed with the scores"
        gram = gram_loss(predictions.patches.unflatten(0, (len(batch.global_crops), -1)), self._anchor(batch))
        term = self.gram_weight * gram
        return Losses(
            losses.total + term, losses.terms | {"gram_loss": term}, losses.published | {"gram_loss": term.detach()}
        )

    @torch.no_grad()
    def _anchor(self, batch: Batch) -> Tensor:
        """Patch tokens of the Gram teacher on the grid of the student, (2B, N, D)."""
        assert batch.gram_crops is not None, "the loader makes them"
        with self._precision("teacher", "backbone") as dtype:
            [features] = self.gram_teacher["backbone"]([batch.gram_crops.to(dtype)], is_training=True)
        side, patch_size = batch.gram_crops.shape[-1], self.cfg.student.patch_size
        larger, grid = side // patch_size, batch.global_crops.shape[-1] // patch_size
        return resample_tokens(features["x_norm_patchtokens"].float(), (larger, larger), (grid, grid))

    def _needed_patches(self, batch: Batch) -> Tensor:
        return torch.arange(batch.masks.numel(), device=batch.masks.device)

    def _masked(self, patch_tokens: Tensor, batch: Batch) -> Tensor:
        return patch_tokens[batch.mask_index]


def is_refresh_due(cfg: Config, step: int) -> bool:
    """Whether the teacher is copied to the Gram teacher before a step: at `teacher_step`, and some periods after it."""
    gram, since = cfg.gram, step - cfg.gram.teacher_step
    if since == 0:
        return True
    return (
        gram.refresh_period > 0
        and since > 0
        and since % gram.refresh_period == 0
        and since // gram.refresh_period <= gram.max_refreshes
    )
