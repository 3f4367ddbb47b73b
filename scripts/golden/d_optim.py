"""Set d: schedules, learning-rate scaling and parameter groups."""

from typing import Any

import torch
from torch import nn

from dinov2 import config
from dinov2.models.weights import flatten_block_names
from dinov2.train.optim import fuse_params_groups, get_params_groups_with_decay
from dinov2.train.schedules import CosineScheduler, Schedules, build_schedules, scale_lr
from scripts.golden.comparison import Comparison
from scripts.golden.recording import Recording

# Both sides compute in float64.
TOLERANCE = 1e-12
ATTRIBUTES = ("lr_multiplier", "wd_multiplier", "is_last_layer")


def replay_schedules(recording: Recording, comparison: Comparison) -> None:
    for case in recording.json["cosine"]:
        kwargs = case["kwargs"]
        schedule = CosineScheduler(**kwargs)
        name = f"cosine.{case['index']}"
        comparison.tensor(name, _values(schedule, len(recording.tensors[name])), tolerance=TOLERANCE)
        for beyond in (kwargs["total_iters"], kwargs["total_iters"] + 7):
            comparison.close(f"{name}[{beyond}]", schedule[beyond], case["past_end"], tolerance=TOLERANCE)
    for case in recording.json["build_schedulers"]:
        schedules = _schedules(case["name"], config.load(None, case["opts"]), 1, case["lr_after_scaling"], comparison)
        prefix = f"build.{case['name']}."
        for name in recording.names(prefix):
            ours = _values(getattr(schedules, name.removeprefix(prefix)), len(recording.tensors[name]))
            comparison.tensor(name, ours, tolerance=TOLERANCE)
    for case in recording.json["full_configs"]:
        cfg = config.load(case["config"])
        comparison.exact(f"{case['config']}: images", cfg.train.batch_size_per_gpu, case["batch_size_per_gpu"])
        schedules = _schedules(case["config"], cfg, case["world_size"], case["lr_after_scaling"], comparison)
        for key, values in case["values"].items():
            steps = [int(step) for step in values]
            ours = torch.tensor([getattr(schedules.at(step), key) for step in steps], dtype=torch.float64)
            theirs = torch.tensor(list(values.values()), dtype=torch.float64)
            comparison.close(f"{case['config']}: {key} at {len(steps)} steps", ours, theirs, tolerance=TOLERANCE)
    for case in recording.json["lr_scaling"]:
        lr = scale_lr(case["base_lr"], case["rule"], case["batch_size_per_gpu"] * case["world_size"])
        comparison.close(f"lr scaling {case}", lr, case["lr"], tolerance=TOLERANCE)


def _values(schedule: CosineScheduler, count: int) -> torch.Tensor:
    return torch.tensor([schedule[step] for step in range(count)], dtype=torch.float64)


def _schedules(label: str, cfg: config.Config, world_size: int, scaled_lr: float, comparison: Comparison) -> Schedules:
    lr = scale_lr(cfg.optim.base_lr, cfg.optim.scaling_rule, cfg.train.batch_size_per_gpu * world_size)
    comparison.close(f"{label}: scaled lr", lr, scaled_lr, tolerance=TOLERANCE)
    return build_schedules(cfg, lr)


def replay_param_groups(recording: Recording, comparison: Comparison) -> None:
    for label, case in recording.json["models"].items():
        params = flatten_block_names(case["params"])
        model = _module_named_like(params)
        groups = get_params_groups_with_decay(model, case["layerwise_decay"], case["patch_embed_lr_mult"])
        ours = {group["name"]: [group[key] for key in ATTRIBUTES] for group in groups}
        comparison.exact(f"{label}: parameters and their order", list(ours), list(params))
        for position, attribute in enumerate(ATTRIBUTES):
            common = [name for name in params if name in ours]
            a, b = (
                torch.tensor([side[name][position] for name in common], dtype=torch.float64) for side in (ours, params)
            )
            comparison.close(f"{label}: {attribute}", a, b, tolerance=TOLERANCE)
        fused = fuse_params_groups(groups)
        comparison.exact(f"{label}: fused groups", len(fused), case["n_fused"])
        compare_groups(comparison, label, fused, {id(g["params"]): g["name"] for g in groups}, case["fused_groups"])


def compare_groups(
    comparison: Comparison,
    label: str,
    ours: list[dict[str, Any]],
    names: dict[int, str],
    recorded: list[dict[str, Any]],
) -> None:
    """Compares optimizer groups in order: their attributes, and their members in order.

    Args:
        ours: Groups of a torch optimizer, or about to be.
        names: ``id`` of a parameter -> its name.
        recorded: Groups with the names of their members.
    """
    comparison.exact(f"{label}: number of groups", len(ours), len(recorded))
    for index, (group, theirs) in enumerate(zip(ours, recorded, strict=False)):
        members = [names[id(param)] for param in group["params"]]
        recorded_members = list(flatten_block_names({name: torch.empty(0) for name in theirs["params"]}))
        comparison.exact(f"{label}: members of group {index}", members, recorded_members)
        for attribute in ATTRIBUTES:
            what = f"{label}: {attribute} of group {index}"
            comparison.close(what, float(group[attribute]), float(theirs[attribute]), tolerance=TOLERANCE)


def _module_named_like(names: dict[str, Any]) -> nn.Module:
    """A module whose parameters, of one number each, have these names in this order.

    The recording names the parameters of models whose sizes it does not give; names are all that groups depend on.
    """
    root: Any = nn.Module()
    for name in names:
        *path, last = name.split(".")
        module: nn.Module = root
        for part in path:
            if part not in dict(module.named_children()):
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(last, nn.Parameter(torch.zeros(1)))
    if "blocks" in dict(root.named_children()):
        root.n_blocks = len(dict(root.get_submodule("blocks").named_children()))
    return root
