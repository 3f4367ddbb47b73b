"""The method: student, teacher, and the losses of a batch.

The teacher sees the unmasked global crops and gives targets (`SSLMetaArch.targets`). The student sees the masked global
crops and the local crops and gives predictions, and three losses compare them with the targets (`SSLMetaArch.forward`).

Legend: B images, L local crops each, N patches of a global crop, M masked patches in the batch, D width,
K prototypes. Rows of crops are crop-major: crop 0 of all images, then crop 1, ...
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dinov2.config import DTYPES, Config, backbone_arguments
from dinov2.data.collate import Batch
from dinov2.layers import DINOHead
from dinov2.loss import DINOLoss, KoLeoLoss, iBOTPatchLoss
from dinov2.loss.targets import sinkhorn_knopp_in_pieces
from dinov2.models import build_model
from dinov2.models.vision_transformer import DinoVisionTransformer

NUM_GLOBAL_CROPS = 2
METHOD_STATE = ("student.", "teacher.", "dino_loss.", "ibot_patch_loss.")
"""Prefixes of the tensors that another run can start from; those of a stage alone are not among them."""


class Targets(NamedTuple):
    """Target probabilities from the teacher; None if the loss is off."""

    cls: Tensor | None  # (2, B, K) probabilities for student crops 0 and 1, from the *other* crop
    patch: Tensor | None  # (M, K) probabilities


class Predictions(NamedTuple):
    """Scores of the student; None if the loss is off."""

    global_cls: Tensor | None  # (2B, K) scores
    local_cls: Tensor | None  # (L*B, K) scores
    patch: Tensor | None  # (M, K) scores
    features: Tensor  # (2B, D) class tokens before the head
    patches: Tensor | None = None  # (patches of `_needed_patches`, D) tokens of the global crops before the head


class Losses(NamedTuple):
    """The weighted terms and their sum, which is optimized; and the terms as the release displays them."""

    total: Tensor
    terms: dict[str, Tensor]
    published: dict[str, Tensor]

    def detach(self) -> "Losses":
        """Returns the losses without their graph."""
        terms, published = ({k: v.detach() for k, v in d.items()} for d in (self.terms, self.published))
        return Losses(self.total.detach(), terms, published)


def mean_losses(parts: Sequence[Losses]) -> Losses:
    """Average the losses of several micro-batches, term by term."""

    def mean(values: Iterable[Tensor]) -> Tensor:
        return torch.stack(list(values)).mean(dim=0)

    return Losses(
        mean(part.total for part in parts),
        {name: mean(part.terms[name] for part in parts) for name in parts[0].terms},
        {name: mean(part.published[name] for part in parts) for name in parts[0].published},
    )


def build_networks(cfg: Config, drop_path_rate: float = 0.0) -> nn.ModuleDict:
    """Build a backbone and its heads by name: `backbone`, `dino_head` and, where patches have one, `ibot_head`."""
    backbone = build_model(**backbone_arguments(cfg), drop_path_rate=drop_path_rate)
    networks: dict[str, nn.Module] = {"backbone": backbone}
    separate = cfg.ibot.loss_weight > 0 and cfg.ibot.separate_head
    for name, head in ({"dino_head": cfg.dino} | ({"ibot_head": cfg.ibot} if separate else {})).items():
        networks[name] = DINOHead(
            backbone.embed_dim,
            head.head_n_prototypes,
            nlayers=head.head_nlayers,
            hidden_dim=head.head_hidden_dim,
            bottleneck_dim=head.head_bottleneck_dim,
        )
    return nn.ModuleDict(networks)


class SSLMetaArch(nn.Module):
    """Student and teacher networks and the objective of DINOv2 (paper section 4).

    `student` and `teacher` contain `backbone`, `dino_head` and, with separate heads, `ibot_head`. The teacher starts as
    a copy of the student, has no gradients, and stays in eval mode.

    Later stages of the method (`dinov2.train.stages`) derive from it: they replace the networks that give targets, or
    add a term.
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = cfg
        self.use_dino = cfg.dino.loss_weight > 0
        self.use_ibot = cfg.ibot.loss_weight > 0
        self.use_koleo = cfg.dino.koleo_loss_weight > 0
        if not (self.use_dino or self.use_ibot):
            raise ValueError("dino.loss_weight and ibot.loss_weight are both 0: nothing to train")
        self.separate_head = self.use_ibot and cfg.ibot.separate_head

        self.student = build_networks(cfg, cfg.student.drop_path_rate)
        self.teacher = build_networks(cfg)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)

        patch_prototypes = (cfg.ibot if self.separate_head else cfg.dino).head_n_prototypes
        self.dino_loss = DINOLoss(cfg.dino.head_n_prototypes)
        self.ibot_patch_loss = iBOTPatchLoss(patch_prototypes)
        self.koleo_loss = KoLeoLoss()

    @property
    def student_backbone(self) -> DinoVisionTransformer:
        return cast(DinoVisionTransformer, self.student["backbone"])

    @property
    def target_networks(self) -> nn.ModuleDict:
        """The networks that give targets."""
        return self.teacher

    @property
    def has_frozen_teacher(self) -> bool:
        """Whether the targets come from another network than the moving average of the student."""
        return self.target_networks is not self.teacher

    @property
    def frozen_networks(self) -> list[nn.ModuleDict]:
        """Networks besides student and teacher, which do not learn and are not in checkpoints."""
        return []

    @property
    def shared_networks(self) -> list[nn.ModuleDict]:
        """Further frozen networks, which the processes of the whole job run together, also those of other students."""
        return []

    def load_frozen(self, *, resuming: bool = False) -> None:
        """Load the frozen and shared weights, before sharding; those in checkpoints not when `resuming` from one."""

    def stage_facts(self) -> dict[str, str]:
        """What a stage adds to the plan of a run, by name."""
        return {}

    def begin_step(self, step: int) -> None:
        """What a stage does before the losses of a step are computed."""

    def check_frozen(self) -> None:
        """Raise a ValueError if they are not those that a resumed run has begun with."""

    def train(self, mode: bool = True) -> "SSLMetaArch":
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, batch: Batch, targets: Targets) -> tuple[Losses, Predictions]:
        """Compute the student's predictions for a batch and their losses, which have gradients, against `targets`."""
        predictions = self.predictions(batch)
        return self.losses(batch, targets, predictions), predictions

    @torch.no_grad()
    def targets(self, batches: Sequence[Batch], teacher_temp: float) -> list[Targets]:
        """Compute the teacher's targets for the unmasked global crops of all micro-batches of a step of this process.

        They are balanced or centered jointly, so that k micro-batches have the targets of k processes. Centers are
        updated. `teacher_temp` is the temperature of the softmax.
        """
        # Swap the crops: the student of crop 0 must predict the class token of crop 1, and vice versa.
        scores = [self._heads("teacher", _swapped(cls), None, patch) for cls, patch in self._teacher_tokens(batches)]
        cls_scores, _, patch_scores = zip(*scores, strict=True)
        cls = self._probabilities(self.dino_loss, cls_scores, teacher_temp) if self.use_dino else [None] * len(batches)
        patch = (
            self._probabilities(self.ibot_patch_loss, patch_scores, teacher_temp)
            if self.use_ibot
            else [None] * len(batches)
        )
        return [
            Targets(None if c is None else c.unflatten(0, (NUM_GLOBAL_CROPS, -1)), p)
            for c, p in zip(cls, patch, strict=True)
        ]

    def _probabilities(
        self, loss: DINOLoss | iBOTPatchLoss, scores: Sequence[Tensor], teacher_temp: float
    ) -> list[Tensor]:
        """Convert teacher scores to targets by the method `train.centering`."""
        if self.cfg.train.centering == "sinkhorn_knopp":
            return sinkhorn_knopp_in_pieces(scores, teacher_temp)
        probabilities = [loss.softmax_center_teacher(part, teacher_temp) for part in scores]
        loss.update_center(*scores)
        return probabilities

    def _teacher_tokens(self, batches: Sequence[Batch]) -> Iterator[tuple[Tensor, Tensor]]:
        """Class tokens (2B, D) and tokens of the masked patches (M, D) of the teacher for each micro-batch."""
        for batch in batches:
            with self._precision("teacher", "backbone") as dtype:
                crops, patches = [self._target_crops(batch.global_crops).to(dtype)], [_padded_mask_index(batch)]
                [features] = self.target_networks["backbone"](crops, patches=patches, is_training=True)
            yield features["x_norm_clstoken"], features["x_norm_patchtokens"][: len(batch.mask_index)]

    def _target_crops(self, crops: Tensor) -> Tensor:
        """Global crops as the networks that give targets see them."""
        return crops

    def _student_masks(self, batch: Batch) -> Tensor | None:
        """The patches of the global crops that the student does not see."""
        return batch.masks if self.use_ibot else None

    @torch.no_grad()
    def teacher_features(self, images: Tensor) -> dict[str, Tensor]:
        """Compute features of images (n, 3, H, W) by the teacher's backbone, float32, by name."""
        return self._features(self.teacher, images)

    @torch.no_grad()
    def frozen_teacher_features(self, images: Tensor) -> dict[str, Tensor]:
        """As `teacher_features`, of global crops by the networks that give targets, whose width may be another one."""
        return self._features(self.target_networks, self._target_crops(images))

    def _features(self, networks: nn.ModuleDict, images: Tensor) -> dict[str, Tensor]:
        with self._precision("teacher", "backbone") as dtype:
            [features] = networks["backbone"]([images.to(dtype)], is_training=True)
        return {name: value.float() for name, value in features.items() if value is not None}

    def predictions(self, batch: Batch) -> Predictions:
        """Run the student on the masked global crops and the local crops, packed in one pass."""
        has_locals = len(batch.local_crops) > 0
        crops = [batch.global_crops, batch.local_crops] if has_locals else [batch.global_crops]
        masks = [self._student_masks(batch), None][: len(crops)]
        patches = [self._needed_patches(batch), batch.mask_index[:0]][: len(crops)]  # of local crops the class token
        with self._precision("student", "backbone") as dtype:
            features = self.student["backbone"](
                [crop.to(dtype) for crop in crops], masks, patches=patches, is_training=True
            )
        global_cls = features[0]["x_norm_clstoken"]
        local_cls = features[1]["x_norm_clstoken"] if has_locals else None
        patch_tokens = features[0]["x_norm_patchtokens"]
        scores = self._heads("student", global_cls, local_cls, self._masked(patch_tokens, batch))
        return Predictions(*scores, global_cls, patch_tokens)

    def _needed_patches(self, batch: Batch) -> Tensor:
        """Indices of the patches of the global crops whose tokens the losses need, of all crops together."""
        return _padded_mask_index(batch)

    def _masked(self, patch_tokens: Tensor, batch: Batch) -> Tensor:
        """Those of the tokens of `_needed_patches` that are masked: (M, D)."""
        return patch_tokens[: len(batch.mask_index)]

    def _heads(
        self, side: str, global_cls: Tensor, local_cls: Tensor | None, patch_tokens: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Compute scores of class tokens and masked patch tokens, with one pass per head."""
        groups: dict[str, Tensor] = {}
        if self.use_dino:
            groups["global"] = global_cls
            if local_cls is not None:
                groups["local"] = local_cls
        if self.use_ibot and not self.separate_head:
            groups["patch"] = patch_tokens
        scores = self._head(side, "dino_head", groups)
        if self.separate_head:
            scores |= self._head(side, "ibot_head", {"patch": patch_tokens})
        return scores.get("global"), scores.get("local"), scores.get("patch")

    def _head(self, side: str, name: str, groups: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute scores of groups of tokens in one pass: {group: (rows, D)} -> {group: (rows, K)}."""
        if not groups:
            return {}
        networks = self.student if side == "student" else self.target_networks
        with self._precision(side, name) as dtype:
            joint = networks[name](torch.cat([tokens.to(dtype) for tokens in groups.values()]))
        return dict(zip(groups, joint.split([len(tokens) for tokens in groups.values()]), strict=True))

    def losses(self, batch: Batch, targets: Targets, predictions: Predictions) -> Losses:
        """Compute the weighted terms and their sum.

        The 2 L pairs of a local crop with a teacher crop and the 2 pairs of a global crop with the other teacher crop
        have equal shares of the DINO weight. KoLeo is applied to each global crop separately. `published` has the terms
        as logged by the release: DINO without its weight, KoLeo at half, iBOT at half and without its weight.
        """
        cfg = self.cfg
        terms: dict[str, Tensor] = {}
        published: dict[str, Tensor] = {}
        num_local = len(batch.local_crops) * NUM_GLOBAL_CROPS // len(batch.global_crops)
        pairs = max(num_local * NUM_GLOBAL_CROPS, 1) + NUM_GLOBAL_CROPS
        if targets.cls is not None and predictions.global_cls is not None:
            if predictions.local_cls is not None:
                share = pairs / cfg.dino.local_crops_loss_weight
                local = self.dino_loss([predictions.local_cls], targets.cls.unbind()) / share
                terms["dino_local_crops_loss"] = cfg.dino.loss_weight * local
                published["dino_local_crops_loss"] = local
            loss = self.dino_loss([predictions.global_cls], [targets.cls.flatten(0, 1)])
            published["dino_global_crops_loss"] = loss * NUM_GLOBAL_CROPS / pairs
            terms["dino_global_crops_loss"] = cfg.dino.loss_weight * published["dino_global_crops_loss"]
        if self.use_koleo:
            crops = predictions.features.chunk(NUM_GLOBAL_CROPS)
            koleo = torch.stack([self.koleo_loss(features) for features in crops]).sum()
            terms["koleo_loss"] = cfg.dino.koleo_loss_weight * koleo
            published["koleo_loss"] = terms["koleo_loss"] / NUM_GLOBAL_CROPS
        if targets.patch is not None and predictions.patch is not None:
            ibot = self.ibot_patch_loss.forward_masked(
                predictions.patch, targets.patch, batch.masks, masks_weight=batch.mask_weight
            )
            terms["ibot_loss"] = cfg.ibot.loss_weight * ibot
            published["ibot_loss"] = ibot / NUM_GLOBAL_CROPS
        return Losses(torch.stack(list(terms.values())).sum(), terms, published)

    @contextmanager
    def _precision(self, side: str, module: str) -> Iterator[torch.dtype]:
        """Autocast to the `param_dtype` of a network, which its inputs must have too; parameters stay float32."""
        networks = self.cfg.compute_precision.student if side == "student" else self.cfg.compute_precision.teacher
        dtype = DTYPES[getattr(networks, module).mixed_precision.param_dtype]
        with torch.autocast(self.dino_loss.center.device.type, dtype, enabled=dtype != torch.float32):
            yield dtype


def _swapped(rows: Tensor) -> Tensor:
    """Rows of crops with those of crop 0 and 1 exchanged."""
    return torch.cat(rows.chunk(NUM_GLOBAL_CROPS)[::-1])


def _padded_mask_index(batch: Batch) -> Tensor:
    """Indices of the masked patches, padded to a fixed number, as compiled blocks require."""
    return F.pad(batch.mask_index, (0, batch.upperbound - len(batch.mask_index)))
