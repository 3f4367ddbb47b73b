"""Optimization: parameter groups, AdamW, gradient clipping, and the moving average of the teacher."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dinov2.train.parallel import full_tensor, local_tensors
from dinov2.train.schedules import StepValues

ParamGroup = dict[str, Any]

FROZEN_EXCEPT = {
    "none": (),
    "patch_embed": ("patch_embed",),
    "patch_embed_and_registers": ("patch_embed", "register_tokens"),
}
"""Parts of the backbone that learn while it is frozen, for each choice of `optim.freeze_backbone_except`."""

TOKENS = ("cls_token", "pos_embed", "mask_token", "patch_embed", "register_tokens")


def get_vit_lr_decay_rate(name: str, lr_decay_rate: float = 1.0, num_layers: int = 12) -> float:
    """Learning-rate multiplier of a parameter: `lr_decay_rate` to the power of the number of layers up to the output.

    Tokens, position embeddings and the patch projection are layer 0, block i is layer i + 1, everything else (the last
    norm, and all parameters of a head, whose `num_layers` is 0) is the output.
    """
    layer = num_layers + 1
    if any(token in name for token in TOKENS):
        layer = 0
    elif block := re.search(r"\bblocks\.(?:\d+\.)?(\d+)\.", name):  # in chunked names the block is the second number
        layer = int(block[1]) + 1
    return lr_decay_rate ** (num_layers + 1 - layer)


def get_params_groups_with_decay(
    model: nn.Module, lr_decay_rate: float = 1.0, patch_embed_lr_mult: float = 1.0
) -> list[ParamGroup]:
    """Build one group per trainable parameter, with its multipliers of learning rate and weight decay.

    Biases, norms and LayerScale gains have no weight decay; tokens and the weight-norm parameters of heads have, as
    published.
    """
    num_layers = getattr(model, "n_blocks", 0)
    groups = []
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        lr_multiplier = get_vit_lr_decay_rate(name, lr_decay_rate, num_layers)
        undecayed = name.endswith(".bias") or "norm" in name or "gamma" in name
        groups.append(
            {
                "params": param,
                "name": name,
                "lr_multiplier": lr_multiplier * (patch_embed_lr_mult if "patch_embed" in name else 1.0),
                "wd_multiplier": 0.0 if undecayed else 1.0,
                "is_last_layer": "last_layer" in name,
            }
        )
    return groups


def fuse_params_groups(
    all_params_groups: Iterable[ParamGroup], keys: Sequence[str] = ("lr_multiplier", "wd_multiplier", "is_last_layer")
) -> list[ParamGroup]:
    """Merge the groups with equal values of `keys`, in order of first appearance."""
    fused: dict[tuple[Any, ...], ParamGroup] = {}
    for group in all_params_groups:
        identity = tuple(group[key] for key in keys)
        joined = fused.setdefault(identity, {**{key: group[key] for key in keys}, "params": []})
        joined["params"].append(group["params"])
    return list(fused.values())


def build_optimizer(
    student: nn.ModuleDict,
    *,
    betas: tuple[float, float],
    lr_decay_rate: float,
    patch_embed_lr_mult: float,
    freeze_backbone_except: str = "patch_embed",
) -> torch.optim.AdamW:
    """Build AdamW over the groups of all sub-modules; `set_hyperparameters` sets its rates before each step."""
    groups = []
    for name, module in student.items():
        unfused = get_params_groups_with_decay(module, lr_decay_rate, patch_embed_lr_mult)
        for group in unfused:
            learns = any(part in group["name"] for part in FROZEN_EXCEPT[freeze_backbone_except])
            group["can_be_frozen"] = name == "backbone" and not learns
        keys = ("lr_multiplier", "wd_multiplier", "is_last_layer", "can_be_frozen")
        groups += fuse_params_groups(unfused, keys)
    # The fused one reads and writes each number once, and can skip steps on the device (`step_unless`).
    return torch.optim.AdamW(groups, betas=betas, fused=True)


def step_unless(refused: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Step a fused optimizer, except if `refused` (scalar) is 1: then nothing changes, not even the count of steps."""
    # The mechanism of gradient scalers: the device decides, and the host does not wait.
    optimizer.found_inf = refused  # type: ignore[attr-defined]
    optimizer.step()
    del optimizer.found_inf  # type: ignore[attr-defined]


def set_hyperparameters(optimizer: torch.optim.Optimizer, now: StepValues) -> None:
    """Set the scheduled learning rate and weight decay of each group, times its multipliers."""
    for group in optimizer.param_groups:
        lr = now.last_layer_lr if group["is_last_layer"] else now.backbone_lr if group["can_be_frozen"] else now.lr
        group["lr"] = lr * group["lr_multiplier"]
        group["weight_decay"] = now.wd * group["wd_multiplier"]


def clip_gradients(student: nn.ModuleDict, max_norm: float | None) -> dict[str, Tensor]:
    """Clip the gradient of each sub-module **separately** to L2 norm `max_norm`; None or 0 only measures it.

    Returns the norms before clipping by sub-module, as scalars on the device, of sub-modules with gradients.
    """
    return {
        name: full_tensor(nn.utils.clip_grad_norm_(module.parameters(), max_norm or float("inf")))
        for name, module in student.items()
        if any(param.grad is not None for param in module.parameters())
    }


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, for all parameters or the shards of this process."""
    averages, latest = local_tensors(teacher.parameters()), local_tensors(student.parameters())
    torch._foreach_lerp_(averages, latest, 1 - momentum)
