"""Set f: training trajectories, from given weights and batches to given losses and final weights.

The steps are those of ``dinov2.train.train``. What happens inside the first iteration (logits, targets, gradients
before clipping) is computed in a copy of the networks, since the training step does not return it.
"""

import copy
import dataclasses
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dinov2 import config, distributed
from dinov2.config import Config
from dinov2.data.augment import MultiCrop
from dinov2.data.collate import Batch, collate_data_and_cast
from dinov2.data.masking import MaskingGenerator
from dinov2.models.weights import flatten_block_names
from dinov2.train.guards import NonFiniteGuard
from dinov2.train.optim import build_optimizer, ema_update, set_hyperparameters
from dinov2.train.parallel import full_tensor, parallelize
from dinov2.train.schedules import build_schedules, scale_lr
from dinov2.train.ssl_meta_arch import Losses, SSLMetaArch
from dinov2.train.train import clip_and_step, forward_backward
from scripts.golden.comparison import Comparison
from scripts.golden.d_optim import compare_groups
from scripts.golden.ranks import replay_on_ranks
from scripts.golden.recording import Recording

SCHEDULE_TOLERANCE = 1e-12
LOSS_TOLERANCE = 1e-5
GRADIENT_NORM_TOLERANCE = 1e-4
WEIGHT_TOLERANCE = 2e-6
SCHEDULED = ("lr", "wd", "momentum", "teacher_temp", "last_layer_lr")
CRITERIA = ("dino_loss", "ibot_patch_loss")

Results = dict[str, Any]


# --- The batches -----------------------------------------------------------------------------------------------------


def replay_batches(recording: Recording, comparison: Comparison) -> None:
    """Collates the recorded crops and masks anew: the order of the rows, and what follows from the masks."""
    data = recording.json["data"]
    for index, batch in enumerate(read_batches(recording)):
        prefix = _batch_prefixes(recording)[index]
        generator = _RecordedMasks(batch.masks, data["gsize"] // data["patch"])
        ours = collate_data_and_cast(
            _samples(batch, data["B"]),
            mask_ratio_tuple=tuple(data["mask_ratio"]),
            mask_probability=data["mask_prob"],
            dtype=recording.tensors[f"{prefix}collated_global_crops"].dtype,
            n_tokens=batch.masks.shape[1],
            mask_generator=generator,
            rng=_RecordedOrder(batch.masks),
        )
        comparison.exact(f"{prefix}collated_global_crops", *_pair(recording, prefix, "global_crops", ours))
        comparison.exact(f"{prefix}collated_local_crops", *_pair(recording, prefix, "local_crops", ours))
        comparison.exact(f"{prefix}collated_masks", *_pair(recording, prefix, "masks", ours))
        comparison.exact(f"{prefix}mask_indices_list", ours.mask_index, batch.mask_index)
        comparison.tensor(f"{prefix}masks_weight", ours.mask_weight, tolerance=1e-6)
        count = recording.tensors[f"{prefix}n_masked_patches"]
        comparison.exact(f"{prefix}n_masked_patches", torch.tensor([len(ours.mask_index)]), count)
        comparison.exact(f"{prefix}n_masked", len(ours.mask_index), recording.json["n_masked"][index])
        comparison.exact(f"{prefix}upperbound", ours.upperbound, recording.json["upperbound"][index])


def _pair(recording: Recording, prefix: str, name: str, ours: Batch) -> tuple[Tensor, Tensor]:
    return getattr(ours, name), recording.tensors[f"{prefix}collated_{name}"]


def _batch_prefixes(recording: Recording) -> list[str]:
    return [f"it{match[1]}." for match in recording.matches(r"it(\d+)\.collated_masks")]


def read_batches(recording: Recording) -> list[Batch]:
    """The recorded batches in order, with crops in float32."""
    return [
        Batch(
            global_crops=recording.input(f"{prefix}collated_global_crops").float(),
            local_crops=recording.input(f"{prefix}collated_local_crops").float(),
            masks=recording.input(f"{prefix}collated_masks"),
            mask_index=recording.input(f"{prefix}mask_indices_list"),
            mask_weight=recording.input(f"{prefix}masks_weight"),
            upperbound=recording.json["upperbound"][index],
        )
        for index, prefix in enumerate(_batch_prefixes(recording))
    ]


def _samples(batch: Batch, images: int) -> list[MultiCrop]:
    first, second = batch.global_crops.split(images)
    local_crops = batch.local_crops.split(images)
    return [MultiCrop((first[i], second[i]), tuple(crop[i] for crop in local_crops)) for i in range(images)]


class _RecordedMasks(MaskingGenerator):
    """Hands out the non-empty recorded masks, then empty ones."""

    def __init__(self, masks: Tensor, side: int) -> None:
        super().__init__((side, side))
        self.masks = iter([row for row in masks.numpy() if row.any()])

    def __call__(self, num_masking_patches: int = 0, *, rng: random.Random) -> np.ndarray:
        empty = np.zeros(self.height * self.width, dtype=bool)
        return next(self.masks, empty).reshape(self.height, self.width)


class _RecordedOrder(random.Random):
    """Shuffles such that masks drawn in the order of their rows, before the empty ones, end up in these rows again."""

    def __init__(self, masks: Tensor) -> None:
        super().__init__(0)
        self.is_masked = masks.any(dim=1).tolist()

    def shuffle(self, x: Any) -> None:
        drawn, empty = iter(range(sum(self.is_masked))), iter(range(sum(self.is_masked), len(self.is_masked)))
        x[:] = [next(drawn) if masked else next(empty) for masked in self.is_masked]


# --- The trajectories ------------------------------------------------------------------------------------------------


def replay_training(recording: Recording, comparison: Comparison) -> None:
    world_size = recording.json["world_size"]
    ranks = replay_on_ranks(_train, recording.path, world_size)
    recording.inputs |= set(recording.names("init."))
    _compare_optimizer(recording, comparison)
    for index, recorded in enumerate(recording.json["iterations"]):
        _compare_iteration(comparison, recorded, [results["iterations"][index] for results in ranks])
    for rank, results in enumerate(ranks):
        prefix = f"rank{rank}." if world_size > 1 else ""
        comparison.tensors({prefix + name: ours for name, ours in results["it0"].items()})
    first = ranks[0]
    comparison.tensors(first["centers"])
    gradients = flatten_block_names(_recorded_below(recording, "it0.grad."))
    for name, (recorded_name, _) in gradients.items():
        comparison.tensor(recorded_name, first["it0_gradients"][name])
    for side in ("student", "teacher"):
        _compare_weights(comparison, f"final.{side}.", first[side])
        for results in ranks[1:]:
            same = all(torch.equal(results[side][name], value) for name, value in first[side].items())
            comparison.exact(f"{side}: the same on all ranks", same, True)


def _recorded_below(recording: Recording, prefix: str) -> dict[str, Any]:
    """Name without prefix -> (full name, tensor)."""
    return {name.removeprefix(prefix): (name, recording.tensors[name]) for name in recording.names(prefix)}


def _compare_iteration(comparison: Comparison, recorded: Mapping[str, Any], ranks: list[Results]) -> None:
    label = f"iteration {recorded['iteration']}"
    for key in SCHEDULED:
        comparison.close(f"{label}: {key}", ranks[0][key], recorded[key], tolerance=SCHEDULE_TOLERANCE)
    mean = {key: sum(rank["losses"][key] for rank in ranks) / len(ranks) for key in ranks[0]["losses"]}
    objective = sum(rank["objective"] for rank in ranks) / len(ranks)
    _compare_losses(comparison, label, mean, recorded["losses"])
    _compare_losses(
        comparison,
        label,
        {"total_loss_displayed": sum(mean.values()), "backprop_loss": objective},
        {key: recorded[key] for key in ("total_loss_displayed", "backprop_loss")},
    )
    for rank, losses in enumerate(recorded.get("per_rank_losses", [])):
        _compare_losses(comparison, f"{label}, rank {rank}", ranks[rank]["losses"], losses)
    for rank, loss in enumerate(recorded.get("per_rank_backprop_loss", [])):
        ours = {"backprop_loss": ranks[rank]["objective"]}
        _compare_losses(comparison, f"{label}, rank {rank}", ours, {"backprop_loss": loss})
    for name, norm in recorded["grad_norm_before_clip"].items():
        what = f"{label}: gradient norm of {name}"
        comparison.close(what, ranks[0]["norms"][name], norm, tolerance=GRADIENT_NORM_TOLERANCE)


def _compare_losses(
    comparison: Comparison, label: str, ours: Mapping[str, float], recorded: Mapping[str, float]
) -> None:
    comparison.exact(f"{label}: loss terms", sorted(ours), sorted(recorded))
    for name in recorded.keys() & ours.keys():
        comparison.close(f"{label}: {name}", ours[name], recorded[name], tolerance=LOSS_TOLERANCE, relative=False)


def _compare_weights(comparison: Comparison, prefix: str, ours: dict[str, Tensor]) -> None:
    recorded = flatten_block_names(_recorded_below(comparison.recording, prefix))
    comparison.exact(f"{prefix}*: names", sorted(ours), sorted(recorded))
    for name, (recorded_name, theirs) in recorded.items():
        if name.endswith("attn.qkv.bias"):
            comparison.leave_out("key third of attn.qkv.bias (its gradient is rounding noise)", recorded_name)
            comparison.close(
                f"{recorded_name}, query and value",
                _without_key(ours[name]),
                _without_key(theirs),
                tolerance=WEIGHT_TOLERANCE,
            )
        else:
            comparison.tensor(recorded_name, ours[name], tolerance=WEIGHT_TOLERANCE)


def _without_key(bias: Tensor) -> Tensor:
    query, _, value = bias.chunk(3)
    return torch.cat([query, value])


def _compare_optimizer(recording: Recording, comparison: Comparison) -> None:
    cfg = read_config(recording)
    model = SSLMetaArch(cfg)
    optimizer = _optimizer(cfg, model)
    names = {id(param): name for name, param in model.student.named_parameters()}
    compare_groups(comparison, "optimizer", optimizer.param_groups, names, recording.json["optimizer_groups"])
    stated = recording.json["optimizer"]
    comparison.exact("optimizer: class", type(optimizer).__name__, stated["type"])
    for key in ("betas", "eps"):
        values = [group[key] for group in optimizer.param_groups]
        wanted = tuple(stated[key]) if key == "betas" else stated[key]
        comparison.exact(f"optimizer: {key}", values, [wanted] * len(values))


def read_config(recording: Recording) -> Config:
    """The recorded configuration with the sizes of the made-up architecture, and the learning rate for its batch."""
    options = copy.deepcopy(recording.json["config"])
    sizes = recording.json.get(f"arch_{options['student']['arch']}")
    if sizes is not None:
        options["student"] |= sizes | {"arch": "vit_small"}
    cfg = config.from_dict(options, recording.name)
    global_batch = cfg.train.batch_size_per_gpu * recording.json["world_size"]
    lr = scale_lr(cfg.optim.base_lr, cfg.optim.scaling_rule, global_batch)
    return dataclasses.replace(cfg, optim=dataclasses.replace(cfg.optim, lr=lr))


def _optimizer(cfg: Config, model: SSLMetaArch) -> torch.optim.AdamW:
    return build_optimizer(
        model.student,
        betas=(cfg.optim.adamw_beta1, cfg.optim.adamw_beta2),
        lr_decay_rate=cfg.optim.layerwise_decay,
        patch_embed_lr_mult=cfg.optim.patch_embed_lr_mult,
    )


class _NormsKept(NonFiniteGuard):
    """Remembers the gradient norms that the training step measured before clipping."""

    norms: Mapping[str, Tensor]

    def refused(self, terms: Mapping[str, Tensor], norms: Mapping[str, Tensor]) -> Tensor:
        self.norms = norms
        return super().refused(terms, norms)


def _train(path: Path, rank: int) -> Results:
    """The whole trajectory as one rank sees it."""
    recording = Recording(path)
    cfg = read_config(recording)
    world_size = recording.json["world_size"]
    batches = read_batches(Recording((path.parent / recording.json["batches_file"]).with_suffix(".json")))
    model = SSLMetaArch(cfg).train()
    model.student.load_state_dict(flatten_block_names(recording.inputs_below("init.")))
    model.teacher.load_state_dict(model.student.state_dict())
    schedules = build_schedules(cfg, cfg.optim.lr)
    it0, it0_gradients = _look_into(model, batches[rank], schedules.at(0).teacher_temp)
    parallelize(model.student, model.teacher, cfg.compute_precision, block_chunks=cfg.student.block_chunks)
    optimizer, scaler = _optimizer(cfg, model), torch.amp.GradScaler("cpu", enabled=False)
    guard = _NormsKept(max_in_a_row=1)
    iterations: list[Results] = []
    centers: dict[str, list[Tensor]] = {name: [] for name in CRITERIA}
    for step in range(len(recording.json["iterations"])):
        for name in CRITERIA:
            centers[name].append(_center(model, name))
        now = schedules.at(step)
        set_hyperparameters(optimizer, now)
        micro_batches = [batches[step * world_size + rank]]
        losses = forward_backward(model, micro_batches, now.teacher_temp, scaler, seed=cfg.train.seed, step=step)
        clip_and_step(losses, model.student, optimizer, scaler, cfg.optim.clip_grad, guard)
        ema_update(model.teacher, model.student, now.momentum)
        guard.report(scaler, all_steps=True)
        iterations.append(now._asdict() | _numbers(losses, guard))
    return {
        "it0": it0,
        "it0_gradients": it0_gradients,
        "iterations": iterations,
        "centers": {f"center.{name}": torch.stack(used) for name, used in centers.items()}
        | {f"center_final.{name}": _center(model, name) for name in CRITERIA},
        "student": {name: full_tensor(value) for name, value in model.student.state_dict().items()},
        "teacher": {name: full_tensor(value) for name, value in model.teacher.state_dict().items()},
    }


def _center(model: SSLMetaArch, criterion: str) -> Tensor:
    return model.get_buffer(f"{criterion}.center").clone()


def _numbers(losses: Losses, guard: _NormsKept) -> Results:
    return {
        "objective": losses.total.item(),
        "losses": {name: value.item() for name, value in losses.published.items()},
        "norms": {name: value.item() for name, value in guard.norms.items()},
    }


def _look_into(model: SSLMetaArch, batch: Batch, teacher_temp: float) -> tuple[Results, dict[str, Tensor]]:
    """Scores, targets and gradients before clipping of one iteration, which leaves no trace in ``model``."""
    model = copy.deepcopy(model)
    [targets] = model.targets([batch], teacher_temp)
    predictions = model.predictions(batch)
    model.losses(batch, targets, predictions).total.backward()
    cls = None if targets.cls is None else targets.cls.flatten(0, 1)
    found = {
        "it0.dino_global.student_logits": predictions.global_cls,
        "it0.dino_global.teacher_probs": cls,
        "it0.dino_local.student_logits": predictions.local_cls,
        "it0.dino_local.teacher_probs": cls,
        "it0.ibot.student_logits": predictions.patch,
        "it0.ibot.teacher_probs": targets.patch,
    }
    return {name: value.detach() for name, value in found.items() if value is not None}, _gradients(model.student)


def _gradients(student: nn.Module) -> dict[str, Tensor]:
    """Averaged over processes."""
    gradients = {name: param.grad for name, param in student.named_parameters() if param.grad is not None}
    return {name: distributed.all_reduce_sum(grad) / distributed.world_size() for name, grad in gradients.items()}
