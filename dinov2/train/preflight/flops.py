"""Floating-point operations of a training step, from the networks alone; a multiply-add counts as two.

Counted are matrix products. Each weight matrix multiplies every token that reaches it: not those of sequences that
stochastic depth drops; in the last block the feed-forward network, and after it the heads, take the class tokens and
masked patches only. A backward pass costs two forward passes, less the gradient of the pixels, which nobody needs.

Not counted, together well below a percent: norms, activations, losses, the padding of the masked patches to a fixed
number. Nor are the scores that fused attention computes again in its backward pass, half of its forward pass.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import nn

from dinov2.config import Config
from dinov2.layers import Block
from dinov2.layers.packing import Segments
from dinov2.layers.stochastic_depth import num_kept
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.train.preflight.memory import masked_patches_per_image
from dinov2.train.ssl_meta_arch import NUM_GLOBAL_CROPS, SSLMetaArch

H200_FLOPS = 790e12
"""FLOPs per second that a large product in half precision is expected to reach on an H200: 80 % of its data sheet."""


class Forward(NamedTuple):
    """FLOPs of a forward pass by part."""

    patches: float  # their embedding
    linear: float  # layers of the blocks
    attention: float  # scores and weighted sums
    heads: float


class Rows(NamedTuple):
    """Tokens that a block computes, for a micro-batch."""

    attention: int  # tokens of its attention
    feed_forward: float  # tokens of its feed-forward network
    pairs: int  # of tokens that attend to each other


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of an optimizer step of one process, all micro-batches together."""

    teacher: Forward
    student: Forward
    recomputed: float  # by activation checkpointing

    @property
    def backward(self) -> float:
        return 2 * sum(self.student) - self.student.patches

    @property
    def heads(self) -> float:
        """Share of the heads in teacher, student and backward pass."""
        return self.teacher.heads + 3 * self.student.heads

    @property
    def model(self) -> float:
        """What the method needs: everything but what is recomputed."""
        return sum(self.teacher) + sum(self.student) + self.backward

    @property
    def total(self) -> float:
        return self.model + self.recomputed


def step_flops(
    cfg: Config, model: SSLMetaArch, masked_patches: float | None = None, *, share_of_job: float = 1.0
) -> StepFlops:
    """Count the FLOPs of a step of networks that may be on the meta device.

    Args:
        masked_patches: Number of masked patches in a micro-batch; None: the mean.
        share_of_job: Processes of this student as a fraction of the job; the others compute tokens of its teacher, too.
    """
    images = cfg.train.batch_size_per_gpu
    masked = masked_patches_per_image(cfg) * images if masked_patches is None else masked_patches
    groups = crop_sequences(cfg)
    teacher, student = (
        Forward._make(cfg.train.accumulate_steps * flops for flops in _forward(model, networks, seen, masked))
        for networks, seen in ((model.target_networks, groups[:1]), (model.student, groups))
    )
    if model.shared_networks:  # each image once in the whole job; the heads are of each student
        teacher = Forward._make(part * share_of_job for part in teacher)._replace(heads=teacher.heads)
    if cfg.gram.loss_weight > 0:  # its teacher sees larger crops, and all its patches are needed
        side = cfg.gram.crops_scale * cfg.crops.global_crops_size // cfg.student.patch_size
        seen = ((groups[0][0], 1 + cfg.student.num_register_tokens + side**2),)
        anchor = _forward(model, model.frozen_networks[0], seen, groups[0][0] * side**2)
        teacher = Forward._make(
            ours + cfg.train.accumulate_steps * its for ours, its in zip(teacher, anchor, strict=True)
        )
    again = student.linear + student.attention if cfg.train.activation_checkpointing == "full" else 0.0
    return StepFlops(teacher, student, again)


def crop_sequences(cfg: Config) -> Segments:
    """Sequences of a micro-batch (number, tokens): of global crops, and of local crops if there are any."""
    crops, extra = cfg.crops, 1 + cfg.student.num_register_tokens
    sizes = (NUM_GLOBAL_CROPS, crops.global_crops_size), (crops.local_crops_number, crops.local_crops_size)
    return tuple(
        (number * cfg.train.batch_size_per_gpu, extra + (size // cfg.student.patch_size) ** 2)
        for number, size in sizes
        if number
    )


def product_speed(dtype: torch.dtype, device: torch.device, *, side: int, repeats: int) -> float:
    """FLOPs per second of a product of two square matrices, the best of three times `repeats` products."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        for _ in range(repeats):
            a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 * repeats / best


def rows_of_blocks(backbone: DinoVisionTransformer, groups: Segments, masked: float) -> Iterator[Rows]:
    """What each block computes for sequences (number, tokens), of which the losses need `masked` patches."""
    blocks = cast(list[Block], list(backbone.blocks))
    for block in blocks:
        kept = [(num_kept(count, block.sample_drop_ratio), length) for count, length in groups]
        tokens = sum(count * length for count, length in kept)
        needed = sum(count for count, _ in groups) + masked if block is blocks[-1] else tokens
        yield Rows(tokens, needed, sum(count * length**2 for count, length in kept))


def _forward(model: SSLMetaArch, networks: nn.ModuleDict, groups: Segments, masked: float) -> Forward:
    """FLOPs of a forward pass of student or teacher."""
    backbone = cast(DinoVisionTransformer, networks["backbone"])
    extra, num_sequences = 1 + backbone.num_register_tokens, sum(count for count, _ in groups)
    linear = attention = 0.0
    for block, rows in zip(cast(list[Block], backbone.blocks), rows_of_blocks(backbone, groups, masked), strict=True):
        linear += 2 * (rows.attention * _weights(block.attn) + rows.feed_forward * _weights(block.mlp))
        attention += 4 * backbone.embed_dim * rows.pairs
    has_heads = "dino_head" in networks
    heads = masked * _weights(networks["ibot_head" if model.separate_head else "dino_head"]) if has_heads else 0
    heads += num_sequences * _weights(networks["dino_head"]) if has_heads and model.use_dino else 0
    return Forward(
        patches=2 * sum(count * (length - extra) for count, length in groups) * _weights(backbone.patch_embed),
        linear=linear,
        attention=attention,
        heads=2 * heads,
    )


def _weights(module: nn.Module) -> int:
    """Number of weights that multiply each row, those of matrices and the projection of patches; not gains."""
    matrices = (p for name, p in module.named_parameters() if p.ndim > 1 and not name.endswith("weight_g"))
    return sum(matrix.numel() for matrix in matrices)
